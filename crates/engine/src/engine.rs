//! The facade: one [`Engine`] per node.
//!
//! The life of a session: [`ensure_image`](Engine::ensure_image) brings a tree to the node and makes its image;
//! [`create_session`](Engine::create_session) prepares an empty upper on it, or
//! [`fork_session`](Engine::fork_session) one that begins as a snapshot; [`mount_session`](Engine::mount_session)
//! joins image, objects and upper; [`publish`](Engine::publish) shows that to a pod;
//! [`snapshot`](Engine::snapshot) freezes a moment of it, [`digest`](Engine::digest) turns the moment into a tree and
//! [`upload`](Engine::upload) makes the tree durable; then the same backwards.
//!
//! Every method may be called again: what is done already is success, and what differs is `AlreadyExists`. Methods on
//! one session wait for each other; different sessions do not. Blocking work runs on threads for blocking work.

use std::path::{Path, PathBuf};
use std::time::Duration;

use aether_cas::transfer::{OnProgress, Transferred};
use aether_cas::tree::Owner;
use aether_cas::{Blob, LocalStore, Store};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::pool::{Kind, PoolConfig, Space};
pub use crate::state::{Consistency, Digested, Image, ImageId, Session, Snapshot};

/// How a node's engine is set up.
#[derive(Debug, Clone)]
pub struct Config {
    /// The directory that it owns, absolute, at most 120 bytes long.
    pub root: PathBuf,
    /// Where writable directories lie.
    pub pool: PoolConfig,
    /// The longest that writers are held still for a snapshot. What cannot be done in this time is done unfrozen and
    /// reported as [`Consistency::PerFile`].
    pub freeze_limit: Duration,
}

impl Config {
    /// Defaults: automatic pool, freezes of at most two seconds.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), pool: PoolConfig::Auto, freeze_limit: Duration::from_secs(2) }
    }
}

/// A session as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SessionStatus {
    /// Its record.
    #[serde(flatten)]
    pub session: Session,
    /// Where its merged view is mounted, if it is.
    pub mountpoint: Option<PathBuf>,
    /// Where it is published.
    pub targets: Vec<PathBuf>,
    /// Bytes that its upper takes on disk.
    pub own_bytes: u64,
    /// Inodes of its upper.
    pub own_inodes: u64,
    /// Bytes of the tree below it, shared with every session of that tree.
    pub shared_bytes: u64,
}

/// What a node holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatistics {
    /// How the pool keeps sessions.
    pub pool: Kind,
    /// Space of the pool.
    pub space: Space,
    /// Images on the node.
    pub images: u64,
    /// Sessions on the node.
    pub sessions: u64,
    /// Of those, mounted ones.
    pub mounted: u64,
    /// Snapshots on the node.
    pub snapshots: u64,
    /// Contents on the node.
    pub objects: u64,
    /// Their bytes.
    pub object_bytes: u64,
}

/// The result of restoring a mounted session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RestoreReport {
    /// What the session was digested to afterwards; equals the target.
    pub root: Blob,
    /// Paths that were changed.
    pub changed: u64,
    /// How long the writers were held still.
    pub frozen: Duration,
}

/// The session engine of a node. Clones share it.
#[derive(Clone)]
pub struct Engine {
    config: std::sync::Arc<Config>,
}

fn pending<T>() -> Result<T> {
    Err(Error::Unsupported { what: "this operation".into(), remedy: "it is being written".into() })
}

impl Engine {
    /// Probes the kernel, opens the pool and the records, repairs what a crash left, and mounts again what was mounted
    /// before a reboot. Mounts that are still there are adopted.
    pub async fn open(config: Config) -> Result<Self> {
        let _ = config;
        pending()
    }

    /// What this node can do: the table that was probed at start.
    pub fn kernel(&self) -> &crate::kernel::Report {
        unreachable!()
    }

    /// The node's store of contents and directory messages.
    pub fn objects(&self) -> &LocalStore {
        unreachable!()
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Brings the tree `root` to this node, makes its image for `owner` and mounts it. Callers that want the same
    /// image at once share one run. `on_progress` hears of contents fetched.
    pub async fn ensure_image(&self, root: Blob, owner: Owner, remote: &dyn Store, on_progress: OnProgress<'_>) -> Result<Image> {
        let _ = (root, owner, remote, on_progress);
        pending()
    }

    /// Makes the session `id` with an empty upper on `image`. Not mounted yet.
    pub async fn create_session(&self, id: &str, image: &Image) -> Result<Session> {
        let _ = (id, image);
        pending()
    }

    /// Makes the session `id` whose upper begins as a copy of the snapshot's. Not mounted yet. Deleting the snapshot
    /// afterwards does not touch it.
    pub async fn fork_session(&self, id: &str, from: &str) -> Result<Session> {
        let _ = (id, from);
        pending()
    }

    /// Makes `image` the base of a session that is not mounted, with an empty upper; what the session had is gone.
    /// Nothing happens if the session's head is already that tree, digested from exactly this upper.
    pub async fn reset_session(&self, id: &str, image: &Image) -> Result<Session> {
        let _ = (id, image);
        pending()
    }

    /// Mounts the session and returns where. Mounted already is success.
    pub async fn mount_session(&self, id: &str) -> Result<PathBuf> {
        let _ = id;
        pending()
    }

    /// Unmounts the session. `Busy` while it is published or processes use it.
    pub async fn unmount_session(&self, id: &str) -> Result<()> {
        let _ = id;
        pending()
    }

    /// Shows a mounted session at `target` (made if absent) with `nosuid,nodev`. Published there already with the same
    /// mode is success; anything else mounted there is `AlreadyExists`.
    pub async fn publish(&self, id: &str, target: &Path, read_only: bool) -> Result<()> {
        let _ = (id, target, read_only);
        pending()
    }

    /// Shows an image read-only at `target`, without any session.
    pub async fn publish_image(&self, image: &Image, target: &Path) -> Result<()> {
        let _ = (image, target);
        pending()
    }

    /// Takes away what is published at `target` and removes the directory. Nothing there is success.
    pub async fn unpublish(&self, target: &Path) -> Result<()> {
        let _ = target;
        pending()
    }

    /// Where the session is published on this node.
    pub async fn published(&self, id: &str) -> Result<Vec<PathBuf>> {
        let _ = id;
        pending()
    }

    /// Freezes the cgroups (see [`crate::freeze::pod_cgroups`]), copies the session's upper under the name `snapshot`
    /// and thaws. No cgroup given means that nobody writes; pass what cannot be frozen as `unfrozen`, a reason that the
    /// snapshot then reports. The same name again returns the snapshot that is there.
    pub async fn snapshot(&self, session: &str, snapshot: &str, cgroups: &[PathBuf], unfrozen: Option<&str>) -> Result<Snapshot> {
        let _ = (session, snapshot, cgroups, unfrozen);
        pending()
    }

    /// Turns a snapshot into a tree in [`objects`](Self::objects). The result is recorded; a second call returns it.
    pub async fn digest(&self, snapshot: &str) -> Result<Digested> {
        let _ = snapshot;
        pending()
    }

    /// Snapshots a session that nobody writes to, digests it, forgets the snapshot and records the tree as the
    /// session's head.
    pub async fn digest_session(&self, id: &str) -> Result<Digested> {
        let _ = id;
        pending()
    }

    /// Makes a tree durable: stores in `remote` what of it is missing there.
    pub async fn upload(&self, root: Blob, remote: &dyn Store, on_progress: OnProgress<'_>) -> Result<Transferred> {
        let _ = (root, remote, on_progress);
        pending()
    }

    /// Makes a mounted session show the tree `target` again, through its mount, with the cgroups frozen. Take a
    /// snapshot first: a failure in the middle leaves a mixture.
    pub async fn restore_in_place(&self, id: &str, target: Blob, cgroups: &[PathBuf], remote: &dyn Store) -> Result<RestoreReport> {
        let _ = (id, target, cgroups, remote);
        pending()
    }

    /// Deletes a session that is not published, with its upper. Not there is success.
    pub async fn delete_session(&self, id: &str) -> Result<()> {
        let _ = id;
        pending()
    }

    /// Deletes a snapshot. Not there is success.
    pub async fn delete_snapshot(&self, id: &str) -> Result<()> {
        let _ = id;
        pending()
    }

    /// A session's record. `NotFound` if it is not on this node.
    pub async fn session(&self, id: &str) -> Result<Session> {
        let _ = id;
        pending()
    }

    /// One session as it is now.
    pub async fn session_status(&self, id: &str) -> Result<SessionStatus> {
        let _ = id;
        pending()
    }

    /// All sessions of this node as they are now.
    pub async fn sessions(&self) -> Result<Vec<SessionStatus>> {
        pending()
    }

    /// All snapshots of this node.
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>> {
        pending()
    }

    /// What the node holds.
    pub async fn statistics(&self) -> Result<NodeStatistics> {
        pending()
    }

    /// Compares records, pool, images, objects and mounts. Changes nothing.
    pub async fn fsck(&self) -> Result<Vec<String>> {
        pending()
    }

    /// Removes images that no session or snapshot uses, and directories in the pool that no record names.
    pub async fn gc(&self) -> Result<Vec<String>> {
        pending()
    }
}
