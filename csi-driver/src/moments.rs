//! Moments of a session: taken in milliseconds with its pods held still, made durable behind their backs, counted
//! against the session's base.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use aether_api::session::{self, Durability, Head};
use aether_api::{AetherSession, names};
use aether_cas::tree::{self, Node};
use aether_cas::{Blob, transfer};
use aether_engine::{Digested, Snapshot};
use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use tokio::sync::OnceCell;

use crate::cluster::update_status;
use crate::driver::{Driver, parse_root};
use crate::failure::{Failure, Result};
use crate::lease;

/// A snapshot that several wait for.
type Coming = Shared<BoxFuture<'static, Result<Arc<Snapshot>, Arc<Failure>>>>;

/// What is known of moments while the process lives; the engine and the API remember the rest.
#[derive(Default)]
pub(crate) struct Moments {
    /// Snapshots that are being made durable, so that all who want the same one share the work.
    durable: Mutex<HashMap<String, Arc<OnceCell<Digested>>>>,
    /// The next moment of a session, not begun yet: forks that wait together share it.
    coming: Mutex<HashMap<String, Coming>>,
    /// Bytes of trees that sessions were compared with.
    sizes: Mutex<HashMap<Blob, u64>>,
    /// Snapshots that work under way needs, however long it takes.
    used: Arc<Mutex<HashSet<String>>>,
}

impl Moments {
    /// Keeps the housekeeping from a snapshot that is there or is about to be, until dropped.
    pub(crate) fn using(&self, snapshot: &str) -> Using {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).insert(snapshot.to_owned());
        Using { used: self.used.clone(), snapshot: snapshot.to_owned() }
    }

    /// Whether work under way needs a snapshot.
    pub(crate) fn is_used(&self, snapshot: &str) -> bool {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).contains(snapshot)
    }
}

/// The use of a snapshot by one who gave it its name.
pub(crate) struct Using {
    used: Arc<Mutex<HashSet<String>>>,
    snapshot: String,
}

impl Drop for Using {
    fn drop(&mut self) {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.snapshot);
    }
}

/// What a tree has and has not in common with a session's base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Account {
    /// Paths of files, symlinks and fifos that differ.
    pub changed_files: i64,
    /// Bytes of contents that the base does not have, each content once.
    pub own_bytes: i64,
    /// Bytes of the base's files that are still as they were.
    pub shared_bytes: i64,
}

impl Driver {
    /// Takes a moment of a session that this node holds, under a name that makes it the same moment when asked again.
    /// Whoever calls it holds the session's lock.
    pub(crate) async fn snapshot(&self, uid: &str, name: &str) -> Result<Snapshot> {
        let writers = self.writers(uid).await?;
        let unfrozen = (!writers.doubts.is_empty())
            .then(|| format!("{}, so not every writer could be held still", writers.doubts.join("; ")));
        let snapshot = self.engine.snapshot(uid, name, &writers.cgroups, unfrozen.as_deref()).await?;
        #[allow(clippy::cast_precision_loss)]
        self.metrics.frozen.observe(snapshot.frozen_micros as f64 / 1e6);
        tracing::info!(
            session = uid,
            snapshot = name,
            frozen_microseconds = snapshot.frozen_micros,
            consistency = ?snapshot.consistency,
            reason = snapshot.reason.as_deref().unwrap_or_default(),
            "snapshot taken"
        );
        Ok(snapshot)
    }

    /// The next moment of a session: all who ask before it begins get the same one.
    ///
    /// # Errors
    /// As a text, because all who wait get it.
    pub(crate) async fn next_moment(self: &Arc<Self>, uid: &str) -> Result<Arc<Snapshot>> {
        let coming = {
            let mut all = self.moments.coming.lock().unwrap_or_else(PoisonError::into_inner);
            all.entry(uid.to_owned())
                .or_insert_with(|| {
                    let (driver, uid) = (self.clone(), uid.to_owned());
                    async move {
                        let _session = driver.session_locks.lock(&uid).await;
                        // From here on, whoever comes is too late for this one.
                        driver.moments.coming.lock().unwrap_or_else(PoisonError::into_inner).remove(&uid);
                        let Some((_, record)) = driver.holds_now(&uid).await.map_err(Arc::new)? else {
                            return Err(Arc::new(Failure::NotYet("the session is no longer held by this node".into())));
                        };
                        let name = under_epoch(&format!("fork-{}", uuid::Uuid::new_v4()), record.epoch);
                        driver.snapshot(&uid, &name).await.map(Arc::new).map_err(Arc::new)
                    }
                    .boxed()
                    .shared()
                })
                .clone()
        };
        coming.await.map_err(|failure| Failure::NotYet(crate::failure::chain(&*failure)))
    }

    /// Turns a snapshot into a tree in the store. Those who ask for the same snapshot at once share the work; done
    /// already is success.
    pub(crate) async fn make_durable(&self, snapshot: &str) -> Result<Digested> {
        let cell = {
            let mut all = self.moments.durable.lock().unwrap_or_else(PoisonError::into_inner);
            all.entry(snapshot.to_owned()).or_default().clone()
        };
        let digested = cell
            .get_or_try_init(async || {
                let _permit = self.workers.acquire().await.map_err(|_| Failure::Lost("worker pool"))?;
                let digested = self.engine.digest(snapshot).await?;
                self.metrics.digest.observe(std::time::Duration::from_millis(digested.milliseconds).as_secs_f64());
                let uploading = Instant::now();
                let moved = self.engine.upload(digested.root, &*self.remote, &|_| {}).await?;
                self.metrics.upload.observe(uploading.elapsed().as_secs_f64());
                self.metrics.uploaded.inc_by(moved.bytes);
                tracing::info!(
                    snapshot,
                    root = %digested.root,
                    changed_files = digested.changed_files,
                    digest_ms = digested.milliseconds,
                    upload_ms = u64::try_from(uploading.elapsed().as_millis()).unwrap_or(u64::MAX),
                    uploaded_files = moved.files,
                    uploaded_bytes = moved.bytes,
                    "durable"
                );
                Ok::<_, Failure>(digested)
            })
            .await?;
        Ok(digested.clone())
    }

    /// Deletes a snapshot that nobody needs any more; a failure is logged, the housekeeping tries again.
    pub(crate) async fn drop_snapshot(&self, snapshot: &str) {
        self.moments.durable.lock().unwrap_or_else(PoisonError::into_inner).remove(snapshot);
        if let Err(error) = self.engine.delete_snapshot(snapshot).await {
            tracing::warn!(snapshot, %error, "snapshot could not be deleted");
        }
    }

    /// Compares a tree that is on this node with the base of its session.
    pub(crate) async fn account(&self, base: Option<&str>, root: Blob) -> Result<Account> {
        let base = base.map_or(Ok(root), |base| parse_root(base, "the session's base"))?;
        transfer::fetch_directories(base, &*self.remote, self.engine.objects()).await?;
        let known = self.moments.sizes.lock().unwrap_or_else(PoisonError::into_inner).get(&base).copied();
        let objects = self.engine.objects().clone();
        let (account, size) = tokio::task::spawn_blocking(move || {
            let size = known.map_or_else(|| tree::summary(&base, &objects).map(|summary| summary.bytes), Ok)?;
            let changes = tree::diff(&base, &root, &objects)?;
            Ok::<_, Failure>((count(&changes, size), size))
        })
        .await
        .map_err(|_| Failure::Lost("the comparison of two trees"))??;
        let mut sizes = self.moments.sizes.lock().unwrap_or_else(PoisonError::into_inner);
        if sizes.len() > 1024 {
            sizes.clear();
        }
        sizes.insert(base, size);
        Ok(account)
    }

    /// Moves the head of a session that this node holds on to the durable tree of a moment that was taken under the same
    /// epoch, unless it is further already. A moment of an earlier holding, such as what was recovered, moves nothing.
    pub(crate) async fn move_head(&self, moment: &Snapshot, root: Blob, account: Account) -> Result<()> {
        let uid = moment.session.as_str();
        let _lock = self.session_locks.lock(uid).await;
        let Some((session, mut record)) = self.holds_now(uid).await? else { return Ok(()) };
        if epoch_of(&moment.id) != Some(record.epoch) {
            return Ok(());
        }
        let local = record.head_nanos;
        if local.is_none_or(|local| local < moment.taken_nanos) {
            // Written first: an older moment that comes later must not pass this one, also when the answer is lost.
            record.head_nanos = Some(moment.taken_nanos);
            self.sessions.put(record.clone()).await?;
        }
        let api = self.cluster.sessions.api(&record.namespace);
        let after = update_status(&api, session, names::DRIVER_MANAGER, |session| {
            let status = session.status.as_ref()?;
            let ours = lease::holds(status.attachment.as_ref(), &record, self.node());
            (ours && newer(status.head.as_ref(), local, moment.taken_nanos))
                .then(|| head_status(root, taken_at(moment), Some(account)))
        })
        .await;
        let after = match after {
            Err(failure) if failure.is_gone() => return Ok(()),
            other => other?,
        };
        let status = after.status.as_ref();
        let ours = lease::holds(status.and_then(|status| status.attachment.as_ref()), &record, self.node());
        if ours && after.head_root() == Some(root.to_string().as_str()) {
            record.last_root = Some(root.to_string());
            self.sessions.put(record).await?;
        }
        Ok(())
    }
}

/// Whether a moment is not older than a session's head. The API keeps whole seconds; within one, `local` decides: the
/// nanoseconds of the newest moment that this node made the head under its present epoch.
pub(crate) fn newer(head: Option<&Head>, local: Option<i64>, taken_nanos: i64) -> bool {
    let after_head = head.is_none_or(|head| taken_nanos.div_euclid(1_000_000_000) >= head.time.0.as_second());
    after_head && local.is_none_or(|local| local <= taken_nanos)
}

/// The name of a moment that is taken under `epoch`: what is made of it later counts as the session only under that epoch.
pub(crate) fn under_epoch(stem: &str, epoch: i64) -> String {
    format!("{stem}.e{epoch}")
}

/// The epoch under which a moment was taken.
pub(crate) fn epoch_of(moment: &str) -> Option<i64> {
    moment.rsplit_once(".e")?.1.parse().ok()
}

/// The name of a moment without its epoch.
pub(crate) fn stem_of(moment: &str) -> &str {
    epoch_of(moment).and_then(|_| moment.rsplit_once(".e")).map_or(moment, |(stem, _)| stem)
}

/// The part of a session's status that a durable tree moves on.
pub(crate) fn head_status(root: Blob, taken: Timestamp, account: Option<Account>) -> serde_json::Value {
    let head = Head { root: root.to_string(), durability: Durability::Durable, time: Time(taken) };
    let mut status = serde_json::json!({"head": head});
    // A tree that the session had already has its counts there.
    if let Some(account) = account {
        status["changedFiles"] = account.changed_files.into();
        status["ownBytes"] = account.own_bytes.into();
        status["sharedBytes"] = account.shared_bytes.into();
    }
    status
}

/// Counts changes against a base of `base_bytes`.
fn count(changes: &[tree::Change], base_bytes: u64) -> Account {
    let mut own = HashSet::new();
    let mut replaced = 0;
    let mut changed_files = 0;
    for change in changes {
        let content = |node: &Option<Node>| match node {
            Some(Node::File { content, .. }) => Some(*content),
            _ => None,
        };
        let is_directory = |node: &Option<Node>| matches!(node, None | Some(Node::Directory(_)));
        // A directory's time changes with everything in it; people count files.
        if !(is_directory(&change.old) && is_directory(&change.new)) {
            changed_files += 1;
        }
        let (old, new) = (content(&change.old), content(&change.new));
        if old != new {
            replaced += old.map_or(0, |old| old.size);
            own.extend(new);
        }
    }
    let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    Account {
        changed_files,
        own_bytes: signed(own.iter().map(|content| content.size).sum()),
        shared_bytes: signed(base_bytes.saturating_sub(replaced)),
    }
}

/// When a snapshot was taken.
pub(crate) fn taken_at(snapshot: &Snapshot) -> Timestamp {
    Timestamp::from_nanosecond(snapshot.taken_nanos.into()).unwrap_or_else(|_| Timestamp::now())
}

/// How exact it is, in the API's words.
pub(crate) fn consistency(snapshot: &Snapshot) -> session::Consistency {
    match snapshot.consistency {
        aether_engine::Consistency::PointInTime => session::Consistency::PointInTime,
        aether_engine::Consistency::PerFile => session::Consistency::PerFile,
    }
}

/// For how long pods stood still, in the API's type.
pub(crate) fn frozen_microseconds(snapshot: &Snapshot) -> i64 {
    i64::try_from(snapshot.frozen_micros).unwrap_or(i64::MAX)
}

/// `namespace/name` of an object, for messages.
pub(crate) fn full_name(object: &impl kube::ResourceExt) -> String {
    format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any())
}

/// The root of a session's base.
pub(crate) fn base_root(session: &AetherSession) -> Option<&str> {
    session.status.as_ref()?.base.as_ref()?.root.as_deref()
}

/// The uid, which every object from the API server has.
pub(crate) fn uid(object: &impl kube::ResourceExt) -> String {
    object.uid().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_cas::tree::{Attributes, Directory, MemoryDirectories};

    fn file(text: &str) -> Node {
        Node::File { content: Blob::of(text.as_bytes()), attributes: Attributes::default(), link_group: None }
    }

    #[test]
    fn the_head_never_goes_back_within_a_second() {
        const SECOND: i64 = 1_000_000_000;
        let head = |second| Head {
            root: "ab/1".into(),
            durability: Durability::Durable,
            time: Time(Timestamp::from_second(second).unwrap()),
        };
        assert!(newer(None, None, 5 * SECOND));
        assert!(newer(Some(&head(5)), None, 6 * SECOND));
        assert!(!newer(Some(&head(5)), None, 5 * SECOND - 1));
        // Stored as second 5 is what was taken at 5.9.
        assert!(!newer(Some(&head(5)), Some(5 * SECOND + 900), 5 * SECOND + 200));
        assert!(newer(Some(&head(5)), Some(5 * SECOND + 200), 5 * SECOND + 900));
        // The same moment again, after an answer that was lost.
        assert!(newer(Some(&head(5)), Some(5 * SECOND + 900), 5 * SECOND + 900));
        // The newer one was noted and has not been written yet: the older one waits for nothing.
        assert!(!newer(Some(&head(5)), Some(7 * SECOND), 6 * SECOND));
    }

    #[test]
    fn a_moment_carries_its_epoch() {
        let name = under_epoch("0f5e-e77", 12);
        assert_eq!(epoch_of(&name), Some(12));
        assert_eq!(stem_of(&name), "0f5e-e77");
        for other in ["0f5e-e77", "recovered-0f5e-4", "recovered-0f5e-4-2", "x.e", "x.east"] {
            assert_eq!(epoch_of(other), None, "{other}");
            assert_eq!(stem_of(other), other);
        }
    }

    #[test]
    fn a_tree_is_counted_against_its_base() {
        let directories = MemoryDirectories::default();
        let tree = |entries: &[(&str, &str)]| {
            let mut directory = Directory::default();
            for (name, text) in entries {
                directory.entries.insert((*name).try_into().unwrap(), file(text));
            }
            directories.insert(directory)
        };
        let base = tree(&[("same", "12345"), ("edited", "123"), ("removed", "1234567")]);
        let root = tree(&[("same", "12345"), ("edited", "1234"), ("copy", "1234"), ("renamed-same", "12345")]);
        let changes = tree::diff(&base, &root, &directories).unwrap();
        let size = tree::summary(&base, &directories).unwrap().bytes;
        assert_eq!(size, 15);
        let account = count(&changes, size);
        assert_eq!(account.changed_files, 4);
        // "1234" once and "12345", which is counted although the base has it elsewhere.
        assert_eq!(account.own_bytes, 9);
        assert_eq!(account.shared_bytes, 5);
        assert_eq!(count(&[], size), Account { changed_files: 0, own_bytes: 0, shared_bytes: 15 });
    }
}
