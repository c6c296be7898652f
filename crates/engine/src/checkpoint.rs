//! Snapshots of sessions: taken in milliseconds, turned into trees behind, and brought back.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::{Duration, Instant, SystemTime};

use aether_cas::tree::Directory;
use aether_cas::{Blob, Store};
use rayon::prelude::*;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use crate::crash::crash_point;
use crate::engine::{Engine, Inner, Lock};
use crate::error::{Context, Error, Result};
use crate::freeze::Frozen;
use crate::pool::{self, Kind, validate_name};
use crate::state::{Consistency, Digested, Session, Snapshot};
use crate::upper::{Interpretation, NoCache, StatCache, Upper};
use crate::{hydrate, mount, restore, walk};

/// After a flush that took no longer than this there is little left to write back in the freeze.
const SHORT_FLUSH: Duration = Duration::from_millis(50);
/// Beside a writer that is as fast as the disk no number of flushes is enough.
const MOST_FLUSHES: usize = 3;
/// How often a restore holds the writers still to find that there is more to fetch.
const MOST_FREEZES: usize = 8;

/// The result of restoring a mounted session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RestoreReport {
    /// What the session was digested to afterwards: the same tree as the target.
    pub root: Blob,
    /// Entries written, moved or given other attributes.
    pub changed: u64,
    /// Entries removed.
    pub removed: u64,
    /// Bytes of contents written.
    pub bytes: u64,
    /// How long the writers were held still, in microseconds.
    pub frozen_micros: u64,
}

/// What came of an attempt at a restore.
enum Attempt {
    /// The session was changed; the snapshot `after` is what it showed then.
    Done { report: RestoreReport, after: String },
    /// Nothing was touched: these contents are not here.
    Missing(Vec<Blob>),
}

/// A restore before anything is touched.
enum Planned {
    Ready(restore::Plan),
    Missing(Vec<Blob>),
}

impl Engine {
    /// Freezes the cgroups (see [`crate::freeze::pod_processes`]), copies the session's upper under the name `snapshot`
    /// and thaws. No cgroup given means that nobody writes; pass as `unfrozen` the reason why a writer cannot be
    /// frozen, and the snapshot is made and reports it. The same name again returns the snapshot that is there.
    ///
    /// # Errors
    /// `AlreadyExists` for a snapshot of that name of another session.
    pub async fn snapshot(
        &self,
        session: &str,
        snapshot: &str,
        cgroups: &[PathBuf],
        unfrozen: Option<&str>,
    ) -> Result<Snapshot> {
        let (name, cgroups, unfrozen) = (snapshot.to_owned(), cgroups.to_vec(), unfrozen.map(String::from));
        self.with_session(session, move |inner, id| {
            inner.take_snapshot(&inner.session(id)?, &name, &cgroups, unfrozen, false)
        })
        .await
    }

    /// Turns a snapshot into a tree in [`objects`](Self::objects). The result is recorded; a second call returns it.
    ///
    /// # Errors
    /// `NotFound` without the snapshot, `Damaged` or `Io` with the path that could not be read.
    pub async fn digest(&self, snapshot: &str) -> Result<Digested> {
        let id = snapshot.to_owned();
        let guard = self.inner.lock(Lock::Snapshot(id.clone())).await;
        self.with(guard, move |inner| inner.digest(inner.snapshot_record(&id)?)).await
    }

    /// Digests a session that nobody writes to, and records the tree as the session's head, so that it is used again
    /// as it is when it is mounted on that tree later.
    ///
    /// # Errors
    /// `Busy` while it is mounted anywhere.
    pub async fn digest_session(&self, id: &str) -> Result<Digested> {
        let name = format!("head-{}", uuid::Uuid::new_v4().simple());
        let taken = self
            .with_session(id, {
                let name = name.clone();
                move |inner, id| {
                    let session = inner.session(id)?;
                    if mount::is_mountpoint(&inner.mountpoint(id))? {
                        let by = "it is mounted; unmount it first, or take a snapshot".into();
                        return Err(Error::Busy { what: format!("session {id}"), by });
                    }
                    inner.require_unused(&session.directory)?;
                    inner.take_snapshot(&session, &name, &[], None, true)?;
                    Ok(session)
                }
            })
            .await?;
        // Not under the session's lock: a pod that comes back mounts it meanwhile.
        let digested = self.digest(&name).await;
        self.delete_snapshot(&name).await?;
        let digested = digested?;
        let root = digested.root;
        self.with_session(id, move |inner, id| {
            let session = inner.session(id)?;
            if session.generation == taken.generation && session.directory == taken.directory {
                inner.state.put_session(&Session { head: Some(root), ..session })?;
            }
            Ok(())
        })
        .await?;
        Ok(digested)
    }

    /// Brings to this node what a restore of a session to `target` will need, while its writers run. Without it,
    /// [`Self::restore_in_place`] holds them still once more, to learn what it has to fetch.
    ///
    /// # Errors
    /// `NotFound` without the session, `Store` if something of the target cannot be had.
    pub async fn prepare_restore(&self, id: &str, target: Blob, remote: &dyn Store) -> Result<()> {
        let _hold = self.inner.cache.hold(target);
        hydrate::fetch_directories(target, remote, self.objects()).await?;
        let now = self.passing_tree(id).await?;
        let wanted = self
            .run(move |inner| {
                let plan = restore::plan(&now, &target, &inner.objects)?;
                Ok(plan.contents().collect::<Vec<Blob>>())
            })
            .await?;
        self.fetch_contents(wanted, remote).await
    }

    /// Makes a mounted session show the tree `target` again, through its mount, with the cgroups frozen.
    ///
    /// What the session shows in that moment is kept as the snapshot `safety`, and nothing is touched before it is. So
    /// after an error or a kill that snapshot tells: where it is not there, or is `temporary`, the session is as it was; where
    /// it is, the session may be a mixture of what the snapshot has, of the target, and of what was written since.
    ///
    /// # Errors
    /// `AlreadyExists` if there is a snapshot `safety`; `Busy` if the writers could not be frozen; `Io` of kind
    /// `StorageFull` before anything was touched; `Damaged` if the session does not show the target afterwards.
    pub async fn restore_in_place(
        &self,
        id: &str,
        safety: &str,
        target: Blob,
        cgroups: &[PathBuf],
        remote: &dyn Store,
    ) -> Result<RestoreReport> {
        let _hold = self.inner.cache.hold(target);
        hydrate::fetch_directories(target, remote, self.objects()).await?;
        for _ in 0..MOST_FREEZES {
            let (safety, cgroups) = (safety.to_owned(), cgroups.to_vec());
            let attempt = self
                .with_session(id, move |inner, id| {
                    inner.restore_frozen(&inner.session(id)?, &safety, &target, &cgroups)
                })
                .await?;
            match attempt {
                Attempt::Done { report, after } => {
                    let digested = self.digest(&after).await;
                    self.delete_snapshot(&after).await?;
                    let root = digested?.root;
                    self.run(move |inner| restore::verify(&root, &target, &inner.objects)).await?;
                    return Ok(RestoreReport { root, ..report });
                }
                // It was not prepared, or the writers changed something since.
                Attempt::Missing(contents) => self.fetch_contents(contents, remote).await?,
            }
        }
        let by = "its pods go on changing files whose former contents must be fetched first; try again".into();
        Err(Error::Busy { what: format!("session {id}"), by })
    }

    /// Deletes a snapshot. Not there is success.
    pub async fn delete_snapshot(&self, id: &str) -> Result<()> {
        let id = id.to_owned();
        let guard = self.inner.lock(Lock::Snapshot(id.clone())).await;
        self.with(guard, move |inner| match inner.state.snapshot(&id)? {
            None => Ok(()),
            Some(snapshot) => {
                inner.state.put_snapshot(&Snapshot { deleting: true, ..snapshot.clone() })?;
                inner.finish_snapshot_deletion(&snapshot)
            }
        })
        .await
    }

    /// A snapshot's record. `NotFound` if it is not on this node.
    pub async fn snapshot_record(&self, id: &str) -> Result<Snapshot> {
        let id = id.to_owned();
        self.run(move |inner| inner.snapshot_record(&id)).await
    }

    /// All snapshots of this node.
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>> {
        self.run(|inner| inner.state.snapshots()).await
    }

    /// The tree that the session shows at some moment, through a snapshot that is thrown away.
    async fn passing_tree(&self, id: &str) -> Result<Blob> {
        let name = format!("passing-{}", uuid::Uuid::new_v4().simple());
        self.with_session(id, {
            let name = name.clone();
            move |inner, id| inner.take_snapshot(&inner.session(id)?, &name, &[], None, true)
        })
        .await?;
        let digested = self.digest(&name).await;
        self.delete_snapshot(&name).await?;
        Ok(digested?.root)
    }

    async fn fetch_contents(&self, wanted: Vec<Blob>, remote: &dyn Store) -> Result<()> {
        let missing = self
            .run(move |inner| {
                inner.objects.missing_contents(&wanted).map_err(|error| Error::store("look up contents", error))
            })
            .await?;
        self.make_room(missing.iter().map(|blob| blob.size).sum(), remote).await?;
        let mut arrived = Vec::new();
        for blob in missing {
            let path = self.objects().temporary_path();
            remote.fetch_to(blob, &path).await.map_err(|error| Error::store(format!("fetch content {blob}"), error))?;
            arrived.push((blob, path));
        }
        self.run(move |inner| inner.objects.adopt_batch(arrived).map_err(|error| Error::store("keep contents", error)))
            .await
    }
}

impl Inner {
    /// The record of a snapshot that is not being deleted.
    pub(crate) fn snapshot_record(&self, id: &str) -> Result<Snapshot> {
        match self.state.snapshot(id)? {
            Some(snapshot) if !snapshot.deleting => Ok(snapshot),
            _ => Err(Error::NotFound { kind: "snapshot", name: id.into() }),
        }
    }

    fn take_snapshot(
        &self,
        session: &Session,
        name: &str,
        cgroups: &[PathBuf],
        unfrozen: Option<String>,
        temporary: bool,
    ) -> Result<Snapshot> {
        validate_name("snapshot", name)?;
        if let Some(snapshot) = self.state.snapshot(name)? {
            if snapshot.session == session.id && !snapshot.deleting {
                return Ok(snapshot);
            }
            let detail = format!("of session {}", snapshot.session);
            return Err(Error::AlreadyExists { kind: "snapshot", name: name.into(), detail });
        }
        // What a crash left under this name was never acknowledged.
        self.pool.delete_snapshot(name)?;
        // Where nobody is held still the snapshot may take the time to write back what is dirty. With a limit, that must be
        // charged to the session before.
        let flushed = !cgroups.is_empty() || session.limits.bytes.is_some();
        if flushed {
            self.flush(session, !cgroups.is_empty())?;
        }
        let (frozen, mut reason) = self.hold_still(cgroups, unfrozen)?;
        crash_point!("snapshot.frozen");
        let mut taken = SystemTime::now();
        let mut result = self.pool.snapshot(&session.directory, name);
        if !flushed && matches!(result, Err(Error::Full { .. })) {
            // A flush waits for space that was freed.
            self.flush(session, false)?;
            taken = SystemTime::now();
            result = self.pool.snapshot(&session.directory, name);
        }
        let (held, whole) = frozen.map_or((Duration::ZERO, true), Frozen::thaw);
        result?;
        self.pool.finish_snapshot(name)?;
        if !whole {
            reason = Some("the time limit of the freeze passed before the copy was complete".into());
        }
        crash_point!("snapshot.taken");
        let since = taken.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let snapshot = Snapshot {
            id: name.into(),
            session: session.id.clone(),
            directory: session.directory.clone(),
            image: session.image.clone(),
            consistency: if reason.is_none() { Consistency::PointInTime } else { Consistency::PerFile },
            reason,
            frozen_micros: micros(held),
            taken_nanos: i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
            digested: None,
            temporary,
            deleting: false,
        };
        self.state.put_snapshot(&snapshot)?;
        crash_point!("snapshot.recorded");
        Ok(snapshot)
    }

    /// Writes back what would prolong the freeze. While that went on the writers have written more.
    fn flush(&self, session: &Session, written: bool) -> Result<()> {
        for _ in 0..MOST_FLUSHES {
            let started = Instant::now();
            self.pool.flush(&session.directory, session.limits)?;
            if !written || started.elapsed() < SHORT_FLUSH {
                break;
            }
        }
        Ok(())
    }

    /// Freezes the writers, or says why the snapshot will not be a point in time.
    fn hold_still(&self, cgroups: &[PathBuf], unfrozen: Option<String>) -> Result<(Option<Frozen>, Option<String>)> {
        if cgroups.is_empty() {
            return Ok((None, unfrozen));
        }
        // One writer that cannot be found is no reason to let the others run.
        match self.freezer.freeze(cgroups, self.config.freeze_limit) {
            Ok(frozen) => Ok((Some(frozen), unfrozen)),
            Err(error) => {
                tracing::warn!(%error, "a snapshot is taken without freezing its writers");
                Ok((None, Some(error.to_string())))
            }
        }
    }

    fn digest(&self, snapshot: Snapshot) -> Result<Digested> {
        if let Some(digested) = snapshot.digested {
            return Ok(digested);
        }
        let started = Instant::now();
        let path = self.pool.snapshot_upper(&snapshot.id);
        let taken = SystemTime::UNIX_EPOCH + Duration::from_nanos(u64::try_from(snapshot.taken_nanos).unwrap_or(0));
        let cache = self.cache(&snapshot.directory);
        let upper = Upper {
            path: &path,
            lower: snapshot.image.root,
            owner: snapshot.image.id().owner(),
            directories: &self.objects,
            cache: &*cache,
            taken,
            interpretation: Interpretation::default(),
        };
        let tree = upper.tree()?;
        let _kept = self.cache.changing.read().unwrap_or_else(PoisonError::into_inner);
        self.keep_contents(&path, &tree.contents)?;
        self.keep_directories(&tree.directories)?;
        let digested = Digested {
            root: tree.root,
            changed_files: tree.counts.changed,
            deleted_files: tree.counts.deleted,
            own_bytes: tree.counts.own_bytes,
            read_files: tree.counts.read,
            milliseconds: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        };
        crash_point!("digest.done");
        self.state.put_snapshot(&Snapshot { digested: Some(digested.clone()), ..snapshot })?;
        Ok(digested)
    }

    /// One attempt at a restore with the writers held still.
    fn restore_frozen(&self, session: &Session, safety: &str, target: &Blob, cgroups: &[PathBuf]) -> Result<Attempt> {
        let mountpoint = self.mountpoint(&session.id);
        if !mount::is_mountpoint(&mountpoint)? {
            return Err(Error::Invalid {
                what: format!("session {}", session.id),
                reason: "is not mounted; reset it to the target instead".into(),
            });
        }
        match self.state.snapshot(safety)? {
            None => {}
            // Of an attempt that touched nothing.
            Some(left) if left.temporary && left.session == session.id => self.finish_snapshot_deletion(&left)?,
            Some(other) => {
                let detail = format!("of session {}, from before", other.session);
                return Err(Error::AlreadyExists { kind: "snapshot", name: safety.into(), detail });
            }
        }
        self.flush(session, !cgroups.is_empty())?;
        let begun = Instant::now();
        let frozen = self.freezer.freeze(cgroups, self.config.restore_limit)?;
        // Temporary until something is about to be touched: what fails or is killed before that leaves nothing.
        let taken = self.take_snapshot(session, safety, &[], None, true)?;
        let plan = match self.plan_restore(session, &taken, target, &mountpoint) {
            Ok(Planned::Ready(plan)) if frozen.holds() => plan,
            refused => {
                drop(frozen);
                self.finish_snapshot_deletion(&taken)?;
                return match refused? {
                    Planned::Missing(contents) => Ok(Attempt::Missing(contents)),
                    Planned::Ready(_) => Err(Error::Busy {
                        what: format!("session {}", session.id),
                        by: "comparing it with the target took longer than its writers may be held still".into(),
                    }),
                };
            }
        };
        let taken = self.snapshot_record(safety)?;
        self.state.put_snapshot(&Snapshot { temporary: false, frozen_micros: micros(begun.elapsed()), ..taken })?;
        crash_point!("restore.kept");
        let done = plan.apply(&mountpoint, session.image.id().owner(), &self.objects, self.room_left(session)?)?;
        crash_point!("restore.applied");
        let after = format!("restored-{}", uuid::Uuid::new_v4().simple());
        self.take_snapshot(session, &after, &[], None, true)?;
        let (held, whole) = frozen.thaw();
        if !whole {
            tracing::warn!(session = session.id, "writers ran again before a restore was complete");
        }
        let report = RestoreReport {
            root: *target,
            changed: done.changed + done.moved,
            removed: done.removed,
            bytes: done.bytes,
            frozen_micros: micros(held),
        };
        Ok(Attempt::Done { report, after })
    }

    /// What turns the tree of a moment into the target, if everything for it is at hand.
    fn plan_restore(&self, session: &Session, moment: &Snapshot, target: &Blob, mountpoint: &Path) -> Result<Planned> {
        let now = self.digest(moment.clone())?.root;
        let plan = restore::plan(&now, target, &self.objects)?;
        let contents: Vec<Blob> = plan.contents().collect();
        let missing = self.objects.missing_contents(&contents);
        let missing = missing.map_err(|error| Error::store("look up contents", error))?;
        if !missing.is_empty() {
            return Ok(Planned::Missing(missing));
        }
        plan.check_room(mountpoint, self.room_left(session)?)?;
        Ok(Planned::Ready(plan))
    }

    /// A copy made by walking has inode numbers of its own, for which there is nothing to remember.
    fn cache(&self, directory: &str) -> Box<dyn StatCache> {
        match self.pool.kind() {
            Kind::Btrfs => Box::new(self.state.stat_cache(directory)),
            Kind::Directory => Box::new(NoCache),
        }
    }

    /// Clones the contents that are not here yet into the objects.
    fn keep_contents(&self, upper: &Path, contents: &[(Blob, PathBuf)]) -> Result<()> {
        let blobs: Vec<Blob> = contents.iter().map(|(blob, _)| *blob).collect();
        let missing = self.objects.missing_contents(&blobs).map_err(|error| Error::store("look up contents", error))?;
        let missing: HashSet<Blob> = missing.into_iter().collect();
        let root = walk::open_root(upper)?;
        let cloned = contents
            .par_iter()
            .filter(|(blob, _)| missing.contains(blob))
            .map(|(blob, path)| {
                let from = walk::open_beneath(root.as_fd(), path, OFlags::RDONLY).at("open", upper.join(path))?;
                let to = self.objects.temporary_path();
                let file: File = OpenOptions::new().write(true).create_new(true).open(&to).at("create", &to)?;
                pool::copy_contents(from.as_fd(), file.as_fd(), blob.size).at("copy", upper.join(path))?;
                Ok((*blob, to))
            })
            .collect::<Result<Vec<_>>>()?;
        self.objects.adopt_batch(cloned).map_err(|error| Error::store("keep contents", error))
    }

    fn keep_directories(&self, messages: &[(Blob, bytes::Bytes)]) -> Result<()> {
        let blobs: Vec<Blob> = messages.iter().map(|(blob, _)| *blob).collect();
        let missing = self.objects.missing_directories(&blobs);
        let missing: HashSet<Blob> =
            missing.map_err(|error| Error::store("look up directories", error))?.into_iter().collect();
        let directories = messages
            .iter()
            .filter(|(blob, _)| missing.contains(blob))
            .map(|(blob, message)| {
                Directory::decode(message).map_err(|error| Error::store(format!("keep directory {blob}"), error))
            })
            .collect::<Result<Vec<_>>>()?;
        self.objects.put_directories(&directories).map(|_| ()).map_err(|error| Error::store("keep directories", error))
    }

    /// The rest of a deletion, from wherever it was interrupted.
    pub(crate) fn finish_snapshot_deletion(&self, snapshot: &Snapshot) -> Result<()> {
        self.pool.delete_snapshot(&snapshot.id)?;
        self.state.remove_snapshot(&snapshot.id)
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
