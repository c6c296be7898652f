//! The facade: one [`Engine`] per node.
//!
//! The life of a session: [`ensure_image`](Engine::ensure_image) brings a tree to the node and makes its image;
//! [`create_session`](Engine::create_session) prepares an empty upper on it, or
//! [`fork_session`](Engine::fork_session) one that begins as a snapshot; [`mount_session`](Engine::mount_session)
//! joins image, objects and upper; [`publish`](Engine::publish) shows that to a pod;
//! [`snapshot`](Engine::snapshot) freezes a moment of it, [`digest`](Engine::digest) turns the moment into a tree and
//! [`upload`](Engine::upload) makes the tree durable; then the same backwards. Sessions are in [`crate::session`],
//! snapshots in [`crate::checkpoint`].
//!
//! Every method may be called again: what is done already is success, and what differs is `AlreadyExists`. Methods on
//! one session wait for each other; different sessions do not. Blocking work runs on threads for blocking work, and
//! goes on to its end if the caller stops waiting.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use aether_cas::transfer::{self, OnProgress, Transferred};
use aether_cas::tree::Owner;
use aether_cas::{Blob, LocalConfig, LocalStore, Store};
use serde::{Deserialize, Serialize};
use tokio::sync::OwnedMutexGuard;

use crate::cache::Cache;
use crate::error::{Context, Error, Result};
use crate::freeze::Freezer;
use crate::lazy::Lazy;
use crate::limits::{self, Limited};
use crate::mount::{self, Overlay, Target};
use crate::mounted::Shown;
use crate::pool::{self, Kind, Medium, Pool, PoolConfig, Space};
use crate::state::{Image, ImageId, State};
use crate::warm::Warmer;
use crate::{hydrate, image, kernel, repair};

/// The mount API takes 255 bytes for a path; the longest of ours adds this much to the root.
const LONGEST_ROOT: usize = 120;

/// How a node's engine is set up.
#[derive(Debug, Clone)]
pub struct Config {
    /// The directory that it owns; made if absent. Its path has at most 120 bytes.
    pub root: PathBuf,
    /// Where writable directories lie.
    pub pool: PoolConfig,
    /// Bytes of contents that the object cache keeps at most, if there is a limit. What sessions and snapshots of the node
    /// need stays whatever it takes.
    pub object_limit: Option<u64>,
    /// Bytes of the node's memory for sessions in memory, which take twice that when they are full; without it there
    /// are none.
    pub memory: Option<u64>,
    /// Sessions may be mounted before their contents are here, over the lazy layer that is served for this directory.
    pub lazy: bool,
    /// The longest that writers are held still for a snapshot. What cannot be done in this time is done unfrozen and
    /// reported as [`PerFile`](crate::Consistency::PerFile).
    pub freeze_limit: Duration,
    /// The longest that writers are held still while a session is restored in place.
    pub restore_limit: Duration,
}

impl Config {
    /// Defaults: automatic pool, no sessions in memory, no limit on contents, freezes of at most two seconds, restores in place of at most a minute.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            pool: PoolConfig::Auto,
            object_limit: None,
            memory: None,
            lazy: false,
            freeze_limit: Duration::from_secs(2),
            restore_limit: Duration::from_secs(60),
        }
    }
}

/// What a node holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatistics {
    /// How the pool keeps sessions.
    pub pool: Kind,
    /// Space of the pool.
    pub space: Space,
    /// Space for sessions in memory, where there is any.
    pub memory: Option<Space>,
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

/// The session engine of a node. Clones share it.
#[derive(Clone)]
pub struct Engine {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) config: Config,
    pub(crate) report: kernel::Report,
    pub(crate) pool: Box<dyn Pool>,
    pub(crate) objects: LocalStore,
    pub(crate) state: State,
    pub(crate) cache: Cache,
    /// Where it is configured, or was, so that what it was needed for is completed.
    pub(crate) lazy: Option<Lazy>,
    pub(crate) limited: Limited,
    pub(crate) freezer: Freezer,
    pub(crate) shown: Shown,
    pub(crate) warmer: Warmer,
    locks: Locks,
    /// Held while an image is looked for and mounted: sessions of one image ask for it at once, and mounts at one
    /// place stack.
    mounting: Mutex<HashMap<ImageId, Arc<Mutex<()>>>>,
}

impl Engine {
    /// Probes the kernel, opens the pool and the records, and repairs what a crash left. Mounts that are still there
    /// are adopted when they are next asked for.
    ///
    /// # Errors
    /// `Unsupported` where the kernel lacks what sessions need, `Busy` where another engine has the directory.
    pub async fn open(config: Config) -> Result<Self> {
        blocking(move || Inner::open(config)).await.map(|inner| Self { inner: Arc::new(inner) })
    }

    /// What this node can do: the table that was probed at start.
    pub fn kernel(&self) -> &kernel::Report {
        &self.inner.report
    }

    /// The node's store of contents and directory messages.
    pub fn objects(&self) -> &LocalStore {
        &self.inner.objects
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// Brings the tree `root` to this node, makes its image for `owner` and mounts it. Callers that want the same
    /// tree at once share one run. `on_progress` hears of contents fetched.
    ///
    /// # Errors
    /// `Store` where something of the tree cannot be had; a later call goes on from there.
    pub async fn ensure_image(
        &self,
        root: Blob,
        owner: Owner,
        remote: &dyn Store,
        on_progress: OnProgress<'_>,
    ) -> Result<Image> {
        let id = ImageId::new(root, owner);
        if self.inner.state.incomplete(root)?.is_some() && self.inner.state.image(id)?.is_some() {
            self.hydrate(root, remote, on_progress).await?;
        }
        let guard = self.inner.lock(Lock::Image(root)).await;
        let _hold = self.inner.cache.hold(root);
        if self.inner.state.image(id)?.is_none() {
            hydrate::fetch_directories(root, remote, &self.inner.objects).await?;
            let missing = self.run(move |inner| hydrate::missing_bytes(root, &inner.objects)).await?;
            self.make_room(missing, remote).await?;
            hydrate::hydrate(root, remote, &self.inner.objects, on_progress).await?;
        }
        self.with(guard, move |inner| inner.finish_image(id)).await
    }

    /// Shows an image read-only at `target` (made if absent), without any session.
    ///
    /// # Errors
    /// `AlreadyExists` where something else is mounted there.
    pub async fn publish_image(&self, image: &Image, target: &Path) -> Result<()> {
        let (id, target) = (image.id(), mount::resolve(target)?);
        let guard = self.inner.lock(Lock::Image(id.root)).await;
        self.with(guard, move |inner| {
            let _kept = inner.cache.changing.read().unwrap_or_else(PoisonError::into_inner);
            inner.require_image(id)?;
            let lower = inner.mount_image(id)?;
            let name = id.to_string();
            if inner.prepare_target(&target, |entry| entry.source == Path::new(&name), true)? {
                return Ok(());
            }
            Overlay { name, lower, data: inner.data_layers(id.root)?, upper: None }.mount(&target)
        })
        .await
    }

    /// Takes away what is published at `target` and removes the directory. Nothing there is success.
    ///
    /// # Errors
    /// `Io` where the directory holds something: it is never emptied.
    pub async fn unpublish(&self, target: &Path) -> Result<()> {
        let target = mount::resolve(target)?;
        blocking(move || {
            while let Target::Mounted(_) = mount::classify(&target)? {
                mount::unmount_lazy(&target)?;
            }
            match fs::remove_dir(&target) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(Error::io("remove directory", &target, error))
                }
                _ => Ok(()),
            }
        })
        .await
    }

    /// Makes a tree durable: stores in `remote` what of it is missing there.
    ///
    /// # Errors
    /// `Store`; what was stored stays, and the next attempt goes on from there.
    pub async fn upload(&self, root: Blob, remote: &dyn Store, on_progress: OnProgress<'_>) -> Result<Transferred> {
        let _hold = self.inner.cache.hold(root);
        transfer::upload_tree(root, Arc::new(self.inner.objects.clone()), remote, on_progress)
            .await
            .map_err(|error| Error::store(format!("upload tree {root}"), error))
    }

    /// What the node holds.
    pub async fn statistics(&self) -> Result<NodeStatistics> {
        self.run(|inner| {
            let sessions = inner.state.sessions()?;
            let mut mounted = 0;
            for session in &sessions {
                mounted += u64::from(mount::is_mountpoint(&inner.mountpoint(&session.id))?);
            }
            let objects = inner.objects.statistics();
            Ok(NodeStatistics {
                pool: inner.pool.kind(),
                space: inner.pool.space_of(Medium::Disk)?,
                memory: inner.pool.space_of(Medium::Memory).ok(),
                images: inner.state.images()?.len() as u64,
                sessions: sessions.len() as u64,
                mounted,
                snapshots: inner.state.snapshots()?.len() as u64,
                objects: objects.file_blobs,
                object_bytes: objects.file_bytes,
            })
        })
        .await
    }

    /// Space of the pool on disk. One call to the kernel, however much the node holds.
    pub async fn space(&self) -> Result<Space> {
        self.run(|inner| inner.pool.space_of(Medium::Disk)).await
    }

    /// Compares records, pool, images, objects and mounts, and reads every object. Changes nothing. Each line names
    /// one thing that is wrong and what helps; none means that all is well.
    pub async fn fsck(&self) -> Result<Vec<String>> {
        self.run(repair::fsck).await
    }

    /// Images that no session or snapshot uses: what [`gc`](Self::gc) removes, unless a read-only view shows it.
    pub async fn unused_images(&self) -> Result<Vec<Image>> {
        self.run(|inner| {
            let sessions = inner.state.sessions()?;
            let snapshots = inner.state.snapshots()?;
            let used = |image: &Image| {
                sessions.iter().any(|session| session.image.id() == image.id())
                    || snapshots.iter().any(|snapshot| snapshot.image.id() == image.id())
            };
            Ok(inner.state.images()?.into_iter().filter(|image| !used(image)).collect())
        })
        .await
    }

    /// Removes images that no session or snapshot uses. Returns what was removed.
    pub async fn gc(&self) -> Result<Vec<String>> {
        self.run(repair::collect).await
    }

    /// Runs blocking work.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = self.inner.clone();
        blocking(move || work(&inner)).await
    }

    /// Runs blocking work under a lock, to its end.
    pub(crate) async fn with<T: Send + 'static>(
        &self,
        guard: Guard,
        work: impl FnOnce(&Inner) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = self.inner.clone();
        blocking(move || {
            let _guard = guard;
            work(&inner)
        })
        .await
    }
}

impl Inner {
    fn open(mut config: Config) -> Result<Self> {
        fs::create_dir_all(&config.root).at("create", &config.root)?;
        // Mount tables show paths without symbolic links; ours must compare equal to them.
        config.root = fs::canonicalize(&config.root).at("resolve", &config.root)?;
        let root = &config.root;
        if root.as_os_str().len() > LONGEST_ROOT {
            return Err(Error::Invalid {
                what: format!("engine directory {}", root.display()),
                reason: format!("its path is longer than {LONGEST_ROOT} bytes"),
            });
        }
        for directory in ["index", "mnt"] {
            fs::create_dir_all(root.join(directory)).at("create", root.join(directory))?;
        }
        // First the records: their lock keeps a second engine from repairing under the first one's hands.
        let state = State::open(&root.join("index/state"))?;
        mount::isolate(&root.join("mnt"))?;
        for directory in ["image", "session"] {
            let path = root.join("mnt").join(directory);
            fs::create_dir_all(&path).at("create", &path)?;
        }
        let freezer = Freezer::open(&root.join("index/frozen"))?;
        let pool = pool::open(root, &config.pool, config.memory)?;
        // What the kernel made read-only takes writes again only as a new mount; nothing of it is open yet.
        pool.remount(&|pool| limits::vacate(root, pool))?;
        let report = kernel::probe(&*pool, &root.join("mnt"))?;
        report.require()?;
        let objects = LocalStore::open(LocalConfig {
            objects: pool.root().join("objects"),
            index: root.join("index/objects"),
            // Every content is a file, so that the kernel can read it.
            inline_limit: 0,
        })
        .map_err(|error| Error::store(format!("open the objects of {}", root.display()), error))?;
        let lazy = (config.lazy || !state.incompletes()?.is_empty()).then(|| Lazy::open(root)).transpose()?;
        let limited = Limited::read(&state)?;
        let inner = Self {
            config,
            report,
            pool,
            objects,
            state,
            cache: Cache::default(),
            lazy,
            limited,
            freezer,
            shown: Shown::default(),
            warmer: Warmer::new()?,
            locks: Locks::default(),
            mounting: Mutex::default(),
        };
        repair::repair(&inner)?;
        Ok(inner)
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.pool.root().join("images")
    }

    /// Where a session's merged view is mounted.
    pub(crate) fn mountpoint(&self, session: &str) -> PathBuf {
        self.config.root.join("mnt/session").join(session)
    }

    pub(crate) fn image_mountpoint(&self, id: ImageId) -> PathBuf {
        self.config.root.join("mnt/image").join(id.to_string())
    }

    /// Builds an image whose directories are here, records it and mounts it, as far as that is not done.
    pub(crate) fn finish_image(&self, id: ImageId) -> Result<Image> {
        let image = match self.state.image(id)? {
            Some(image) => image,
            None => {
                let (bytes, summary) = image::build(&self.images(), id, &self.objects)?;
                let image = Image::new(id, summary, bytes);
                self.state.put_image(&image)?;
                image
            }
        };
        self.mount_image(id)?;
        Ok(image)
    }

    /// An image that was removed meanwhile has lost its contents with it.
    pub(crate) fn require_image(&self, id: ImageId) -> Result<()> {
        match self.state.image(id)? {
            Some(_) => Ok(()),
            None => Err(Error::NotFound { kind: "image", name: id.to_string() }),
        }
    }

    /// Mounts an image if it is not, building it if its file was collected, and returns its tree.
    pub(crate) fn mount_image(&self, id: ImageId) -> Result<PathBuf> {
        let mountpoint = self.image_mountpoint(id);
        let tree = mountpoint.join(image::TREE);
        let mounting = self.mounting.lock().unwrap_or_else(PoisonError::into_inner).entry(id).or_default().clone();
        let _mounting = mounting.lock().unwrap_or_else(PoisonError::into_inner);
        if !mount::is_mountpoint(&mountpoint)? {
            let (bytes, summary) = image::build(&self.images(), id, &self.objects)?;
            if self.state.image(id)?.is_none() {
                self.state.put_image(&Image::new(id, summary, bytes))?;
            }
            fs::create_dir_all(&mountpoint).at("create", &mountpoint)?;
            let path = image::path(&self.images(), id);
            // Its time says when it was last of use.
            File::open(&path).and_then(|file| file.set_modified(SystemTime::now())).at("set the time of", &path)?;
            mount::mount_erofs(&path, &mountpoint)?;
        }
        Ok(tree)
    }

    /// Makes `target` ready to be mounted on. Returns true if what is wanted, by `is_ours`, is mounted there already.
    pub(crate) fn prepare_target(
        &self,
        target: &Path,
        is_ours: impl Fn(&mount::MountEntry) -> bool,
        read_only: bool,
    ) -> Result<bool> {
        match mount::classify(target)? {
            Target::Mounted(entry) => {
                let wrong = if entry.fs_type != "overlay" || !is_ours(&entry) {
                    format!("{} ({}) is mounted there", entry.source.display(), entry.fs_type)
                } else if entry.is_read_only() != read_only {
                    format!("it is published there {}", if read_only { "writable" } else { "read-only" })
                } else {
                    return Ok(true);
                };
                Err(Error::AlreadyExists { kind: "mount", name: target.display().to_string(), detail: wrong })
            }
            Target::Directory => Ok(false),
            Target::Absent => fs::create_dir_all(target).at("create", target).map(|()| false),
            Target::Other => Err(Error::Invalid {
                what: target.display().to_string(),
                reason: "is not a directory, so nothing can be published there".into(),
            }),
        }
    }

    pub(crate) async fn lock(&self, key: Lock) -> Guard {
        self.locks.lock(key).await
    }
}

/// Runs blocking work on a thread for it; a panic there is one here.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => Err(Error::store("run blocking work: the runtime is shutting down", error)),
        },
    }
}

/// What can be locked.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Lock {
    /// One tree's images.
    Image(Blob),
    /// The fetching of one tree's contents.
    Hydration(Blob),
    /// One session.
    Session(String),
    /// One snapshot.
    Snapshot(String),
}

#[derive(Default)]
struct Locks {
    all: Arc<Mutex<HashMap<Lock, Arc<tokio::sync::Mutex<()>>>>>,
}

/// Holds a lock until dropped.
pub(crate) struct Guard {
    held: Option<OwnedMutexGuard<()>>,
    key: Lock,
    all: Arc<Mutex<HashMap<Lock, Arc<tokio::sync::Mutex<()>>>>>,
}

impl Locks {
    async fn lock(&self, key: Lock) -> Guard {
        let mutex = {
            let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
            all.entry(key.clone()).or_default().clone()
        };
        Guard { held: Some(mutex.lock_owned().await), key, all: self.all.clone() }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.held = None;
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody waits: only the map knows it, and taking a further reference needs the map.
        if all.get(&self.key).is_some_and(|mutex| Arc::strong_count(mutex) == 1) {
            all.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lock_is_exclusive_and_leaves_nothing_behind() {
        let locks = Arc::new(Locks::default());
        let key = || Lock::Session("a".into());
        let first = locks.lock(key()).await;
        let other = tokio::spawn({
            let locks = locks.clone();
            async move { drop(locks.lock(Lock::Session("a".into())).await) }
        });
        tokio::task::yield_now().await;
        assert!(!other.is_finished());
        drop(locks.lock(Lock::Session("b".into())).await);
        drop(first);
        other.await.unwrap();
        assert!(locks.all.lock().unwrap().is_empty());
    }
}
