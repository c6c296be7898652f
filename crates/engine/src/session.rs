//! Sessions: made, mounted, published, taken down.
//!
//! A session directory of the pool without a record was never acknowledged; a record is written last when a session
//! is made, and removed last when it is deleted.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use aether_cas::tree::Directories;
use rustix::fs::{CWD, Timespec, Timestamps};
use serde::{Deserialize, Serialize};

use crate::crash::crash_point;
use crate::engine::{Engine, Inner, Lock};
use crate::error::{Context, Error, Result};
use crate::mount::{self, Overlay};
use crate::pool::{Kind, Limits, Medium, validate_name, walk_usage};
use crate::state::{Image, ImageId, Session};

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
    /// Inodes of its upper, without its root.
    pub own_inodes: u64,
    /// Bytes of the tree below it, shared with every session of that tree.
    pub shared_bytes: u64,
}

impl Engine {
    /// Makes the session `id` with an empty upper on `image`. Not mounted yet.
    ///
    /// # Errors
    /// `AlreadyExists` for a session of that name on another image.
    pub async fn create_session(&self, id: &str, image: &Image) -> Result<Session> {
        self.create_session_on(Medium::Disk, id, image).await
    }

    /// As [`create_session`](Self::create_session), with its changes on `medium`.
    ///
    /// # Errors
    /// `Unsupported` where the node has no such medium.
    pub async fn create_session_on(&self, medium: Medium, id: &str, image: &Image) -> Result<Session> {
        let image = image.clone();
        self.with_session(id, move |inner, id| {
            validate_name("session", id)?;
            if let Some(session) = inner.state.session(id)? {
                return same(session, |session| {
                    session.image.id() == image.id() && session.medium == medium && session.forked_from.is_none()
                });
            }
            let _kept = inner.cache.changing.read().unwrap_or_else(PoisonError::into_inner);
            inner.prepare_upper(id, image.id(), medium)?;
            inner.record(Session::new(id, image, medium, None))
        })
        .await
    }

    /// Makes the session `id` whose upper begins as a copy of the snapshot's, on the same medium. Not mounted yet. Deleting the
    /// snapshot afterwards does not touch it.
    ///
    /// # Errors
    /// `NotFound` without the snapshot; `AlreadyExists` for a session of that name that is no fork of it.
    pub async fn fork_session(&self, id: &str, from: &str) -> Result<Session> {
        let from = from.to_owned();
        self.with_session(id, move |inner, id| {
            validate_name("session", id)?;
            if let Some(session) = inner.state.session(id)? {
                return same(session, |session| session.forked_from.as_deref() == Some(from.as_str()));
            }
            let snapshot = inner.snapshot_record(&from)?;
            inner.discard_directory(id)?;
            inner.pool.fork(&from, id)?;
            crash_point!("fork.made");
            inner.record(Session::new(id, snapshot.image, inner.pool.medium_of_snapshot(&from), Some(from)))
        })
        .await
    }

    /// Makes `image` the base of a session that is not mounted, with an empty upper; what the upper held is gone.
    /// Nothing happens if the session's head is already that tree, digested from exactly this upper.
    ///
    /// # Errors
    /// `Busy` while it is mounted anywhere.
    pub async fn reset_session(&self, id: &str, image: &Image) -> Result<Session> {
        let image = image.clone();
        self.with_session(id, move |inner, id| {
            let session = inner.session(id)?;
            let same_owner = session.image.id().owner() == image.id().owner();
            if session.head == Some(image.root) && same_owner {
                return Ok(session);
            }
            if mount::is_mountpoint(&inner.mountpoint(id))? {
                let by = "it is mounted; unmount it first, or restore it in place".into();
                return Err(Error::Busy { what: format!("session {id}"), by });
            }
            inner.take_down(&session)?;
            // An upper belongs to one image for life, so another base means another directory.
            let _kept = inner.cache.changing.read().unwrap_or_else(PoisonError::into_inner);
            let directory = format!("{id}.{}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
            inner.prepare_upper(&directory, image.id(), session.medium)?;
            inner.pool.keep(&directory, session.limits)?;
            crash_point!("reset.created");
            let former = session.directory.clone();
            let session = Session { head: Some(image.root), directory, image, ..session };
            inner.state.swap_directory(&session, &former)?;
            crash_point!("reset.recorded");
            inner.pool.delete_session(&former)?;
            Ok(session)
        })
        .await
    }

    /// Mounts the session and returns where. Mounted already is success; a mount of it that an earlier run of this
    /// engine made is taken over.
    ///
    /// # Errors
    /// `Busy` names who else has its upper mounted.
    pub async fn mount_session(&self, id: &str) -> Result<PathBuf> {
        self.with_session(id, |inner, id| inner.mount(&inner.session(id)?)).await
    }

    /// Unmounts the session. Not mounted is success.
    ///
    /// # Errors
    /// `Busy` while it is published, or a process still uses it.
    pub async fn unmount_session(&self, id: &str) -> Result<()> {
        self.with_session(id, |inner, id| inner.take_down(&inner.session(id)?)).await
    }

    /// Shows a mounted session at `target` (made if absent) with `nosuid,nodev`. Published there already with the same
    /// mode is success.
    ///
    /// # Errors
    /// `AlreadyExists` where anything else is mounted there.
    pub async fn publish(&self, id: &str, target: &Path, read_only: bool) -> Result<()> {
        let target = mount::resolve(target)?;
        self.with_session(id, move |inner, id| {
            let session = inner.session(id)?;
            let mountpoint = inner.mount(&session)?;
            if inner.prepare_target(&target, |entry| inner.shows(entry, &session), read_only)? {
                return Ok(());
            }
            mount::bind(&mountpoint, &target, read_only)?;
            inner.shown.add(id, &target);
            crash_point!("session.published");
            inner.warmer.published(id, mountpoint);
            Ok(())
        })
        .await
    }

    /// Waits until the kernel has been shown every name of a published session, so that the first look at it costs no
    /// more than the next. Returns false where it was not: for want of memory, or because the session was not published
    /// by this run of the engine.
    pub async fn wait_until_warm(&self, id: &str) -> Result<bool> {
        let id = id.to_owned();
        self.run(move |inner| Ok(inner.warmer.wait(&id))).await
    }

    /// Where the session is published on this node.
    pub async fn published(&self, id: &str) -> Result<Vec<PathBuf>> {
        self.with_session(id, |inner, id| inner.targets(&inner.session(id)?)).await
    }

    /// Deletes a session that is not published, with its upper; its snapshots stay. Not there is success.
    ///
    /// # Errors
    /// `Busy` while it is published, or a process still uses it.
    pub async fn delete_session(&self, id: &str) -> Result<()> {
        self.with_session(id, |inner, id| match inner.state.session(id)? {
            None => Ok(()),
            Some(session) => {
                inner.take_down(&session)?;
                inner.state.put_session(&Session { deleting: true, ..session.clone() })?;
                crash_point!("delete.recorded");
                inner.finish_deletion(&session)
            }
        })
        .await
    }

    /// A session's record. `NotFound` if it is not on this node.
    pub async fn session(&self, id: &str) -> Result<Session> {
        let id = id.to_owned();
        self.run(move |inner| inner.session(&id)).await
    }

    /// The records of all sessions, without looking at their directories.
    pub async fn session_records(&self) -> Result<Vec<Session>> {
        self.run(|inner| Ok(inner.state.sessions()?.into_iter().filter(|session| !session.deleting).collect())).await
    }

    /// One session as it is now. Walks its upper.
    pub async fn session_status(&self, id: &str) -> Result<SessionStatus> {
        let id = id.to_owned();
        self.run(move |inner| inner.status(inner.session(&id)?, &inner.shown.mounts(&id)?)).await
    }

    /// All sessions of this node as they are now. Walks their uppers.
    pub async fn sessions(&self) -> Result<Vec<SessionStatus>> {
        self.run(|inner| {
            let table = mount::table()?;
            let sessions = inner.state.sessions()?;
            sessions.into_iter().map(|session| inner.status(session, &table)).collect()
        })
        .await
    }

    pub(crate) async fn with_session<T: Send + 'static>(
        &self,
        id: &str,
        work: impl FnOnce(&Inner, &str) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let id = id.to_owned();
        let guard = self.inner.lock(Lock::Session(id.clone())).await;
        self.with(guard, move |inner| work(inner, &id)).await
    }
}

impl Session {
    fn new(id: &str, image: Image, medium: Medium, forked_from: Option<String>) -> Self {
        Self {
            id: id.into(),
            // An empty upper shows the image's tree; a fork's has not been digested.
            head: forked_from.is_none().then_some(image.root),
            image,
            directory: id.into(),
            forked_from,
            generation: 0,
            created: jiff::Timestamp::now().as_second(),
            medium,
            limits: Limits::default(),
            deleting: false,
        }
    }
}

fn same(session: Session, matches: impl Fn(&Session) -> bool) -> Result<Session> {
    if !session.deleting && matches(&session) {
        return Ok(session);
    }
    let detail = if session.deleting {
        "it is being deleted".into()
    } else {
        format!(
            "on tree {} for {}:{}, on {:?}",
            session.image.root, session.image.uid, session.image.gid, session.medium
        )
    };
    Err(Error::AlreadyExists { kind: "session", name: session.id, detail })
}

impl Inner {
    /// The record of a session that is not being deleted.
    pub(crate) fn session(&self, id: &str) -> Result<Session> {
        match self.state.session(id)? {
            Some(session) if !session.deleting => Ok(session),
            _ => Err(Error::NotFound { kind: "session", name: id.into() }),
        }
    }

    fn record(&self, session: Session) -> Result<Session> {
        self.state.put_session(&session)?;
        crash_point!("session.recorded");
        Ok(session)
    }

    /// Makes an empty upper that looks like the root of the image: the merged root shows the upper's attributes.
    fn prepare_upper(&self, directory: &str, image: ImageId, medium: Medium) -> Result<()> {
        self.require_image(image)?;
        self.discard_directory(directory)?;
        // All sessions of an image begin alike. Where a copy is one call that commits itself, it saves them the stamping and
        // a sync each. Its name is the pool's own, so it goes at the next start, whatever becomes of the image.
        let stamped = (self.pool.kind() == Kind::Btrfs).then(|| format!(".stamped-{image}-{medium:?}"));
        if let Some(stamped) = &stamped
            && self.pool.snapshot_upper(stamped).exists()
        {
            self.pool.fork(stamped, directory)?;
            crash_point!("session.stamped");
            return Ok(());
        }
        self.pool.create(directory, medium)?;
        crash_point!("session.created");
        self.stamp(directory, image)?;
        if let Some(stamped) = &stamped {
            match self.pool.snapshot(directory, stamped) {
                // Another session of the image was as fast.
                Err(error) if error.io_kind() == Some(std::io::ErrorKind::AlreadyExists) => {}
                other => other?,
            }
        }
        crash_point!("session.stamped");
        Ok(())
    }

    fn stamp(&self, directory: &str, image: ImageId) -> Result<()> {
        let root = self
            .objects
            .directory(&image.root)
            .map_err(|error| Error::store(format!("read the root of tree {}", image.root), error))?;
        let attributes = &root.attributes;
        let upper = self.pool.upper(directory);
        let owner = attributes.owner.unwrap_or(image.owner());
        chown(&upper, Some(owner.uid), Some(owner.gid)).at("set owner of", &upper)?;
        fs::set_permissions(&upper, fs::Permissions::from_mode(attributes.mode)).at("set mode of", &upper)?;
        for (name, value) in &attributes.xattrs {
            mount::set_xattr(&upper, std::ffi::OsStr::from_bytes(name), value)?;
        }
        let time = Timespec { tv_sec: attributes.mtime.seconds, tv_nsec: attributes.mtime.nanos.into() };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, &upper, &times, rustix::fs::AtFlags::empty()).at("set times of", &upper)?;
        File::open(&upper).and_then(|upper| upper.sync_all()).at("sync", &upper)
    }

    /// Deletes a directory that no record names: what a failed attempt left.
    fn discard_directory(&self, directory: &str) -> Result<()> {
        if !self.pool.session_dir(directory).exists() {
            return Ok(());
        }
        self.require_unused(directory)?;
        self.pool.delete_session(directory)
    }

    /// `Busy` if the upper of a session directory is part of any overlay on this kernel.
    pub(crate) fn require_unused(&self, directory: &str) -> Result<()> {
        let upper = self.pool.upper(directory);
        let began = Instant::now();
        while upper.exists() && mount::upper_in_use(&upper)? {
            let holders = mount::holders(&upper);
            if holders.is_empty() && began.elapsed() < mount::PASSING_USE {
                std::thread::sleep(Duration::from_millis(2));
                continue;
            }
            return Err(Error::Busy {
                what: format!("session directory {directory}"),
                by: if holders.is_empty() {
                    "a process keeps a file open in a mount that was taken away".into()
                } else {
                    holders.join(", ")
                },
            });
        }
        Ok(())
    }

    fn mount(&self, session: &Session) -> Result<PathBuf> {
        let mountpoint = self.mountpoint(&session.id);
        if mount::is_mountpoint(&mountpoint)? {
            return Ok(mountpoint);
        }
        let (upper, work) = (self.pool.upper(&session.directory), self.pool.work(&session.directory));
        if !upper.is_dir() {
            return Err(Error::Damaged {
                what: format!("session {}", session.id),
                detail: format!("{} is gone; restore the session from its last durable head", upper.display()),
            });
        }
        fs::create_dir_all(&mountpoint).at("create", &mountpoint)?;
        // What was never mounted is in no use: the kernel need not be asked, which costs about a millisecond.
        if session.generation > 0 && mount::upper_in_use(&upper)? {
            // An earlier run of this process mounted it in a namespace that ended; what it published lives on.
            let known = self.shown.mounts(&session.id)?.into_iter().find(|entry| self.shows(entry, session));
            let found = match known {
                Some(entry) => Some(entry),
                None => mount::table()?.into_iter().find(|entry| self.shows(entry, session)),
            };
            let Some(entry) = found else {
                self.require_unused(&session.directory)?;
                return Err(Error::Busy {
                    what: format!("session {}", session.id),
                    by: "a mount that just ended".into(),
                });
            };
            mount::bind(&entry.target, &mountpoint, false)?;
            return Ok(mountpoint);
        }
        let lower = self.mount_image(session.image.id())?;
        // Written first: from the mount on, the upper may be anything. Only a head must not come back after a power cut.
        let next = Session { head: None, generation: session.generation + 1, ..session.clone() };
        match session.head {
            // Of a session that was never mounted before, a repair tells by its work directory that it was.
            Some(_) if session.generation > 0 => self.state.put_session(&next)?,
            _ => self.state.put_session_unsynced(&next)?,
        }
        Overlay {
            name: session.id.clone(),
            lower,
            data: self.data_layers(session.image.root)?,
            upper: Some((upper, work)),
        }
        .mount(&mountpoint)?;
        crash_point!("session.mounted");
        Ok(mountpoint)
    }

    /// Whether a mount is this session's, wherever it lies.
    fn shows(&self, entry: &mount::MountEntry, session: &Session) -> bool {
        entry.fs_type == "overlay"
            && entry.source == Path::new(&session.id)
            && entry.root == Path::new("/")
            && entry.super_option("upperdir").as_deref() == Some(&self.pool.upper(&session.directory))
    }

    /// Where the session is mounted besides its own mountpoint.
    fn targets(&self, session: &Session) -> Result<Vec<PathBuf>> {
        Ok(self.targets_in(session, &self.shown.mounts(&session.id)?))
    }

    fn targets_in(&self, session: &Session, table: &[mount::MountEntry]) -> Vec<PathBuf> {
        let own = self.mountpoint(&session.id);
        let shown = table.iter().filter(|entry| self.shows(entry, session) && entry.target != own);
        shown.map(|entry| entry.target.clone()).collect()
    }

    /// Unmounts a session that is not published, and makes sure that no mount of it is left anywhere.
    fn take_down(&self, session: &Session) -> Result<()> {
        let targets = self.targets(session)?;
        if !targets.is_empty() {
            let shown: Vec<_> = targets.iter().map(|target| target.display().to_string()).collect();
            return Err(Error::Busy {
                what: format!("session {}", session.id),
                by: format!("published at {}", shown.join(", ")),
            });
        }
        self.warmer.stop(&session.id);
        let mountpoint = self.mountpoint(&session.id);
        match mount::unmount(&mountpoint) {
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::ResourceBusy => {
                return Err(Error::Busy {
                    what: format!("session {}", session.id),
                    by: format!("a process uses {}", mountpoint.display()),
                });
            }
            other => other?,
        }
        if let Err(error) = fs::remove_dir(&mountpoint)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(Error::io("remove directory", &mountpoint, error));
        }
        self.require_unused(&session.directory)?;
        self.shown.forget(&session.id);
        Ok(())
    }

    /// The rest of a deletion, from wherever it was interrupted.
    pub(crate) fn finish_deletion(&self, session: &Session) -> Result<()> {
        self.require_unused(&session.directory)?;
        self.pool.delete_session(&session.directory)?;
        crash_point!("delete.removed");
        self.state.remove_session(session)
    }

    fn status(&self, session: Session, table: &[mount::MountEntry]) -> Result<SessionStatus> {
        let mountpoint = self.mountpoint(&session.id);
        let (own_bytes, own_inodes) = walk_usage(&self.pool.upper(&session.directory))?;
        Ok(SessionStatus {
            mountpoint: mount::is_mountpoint(&mountpoint)?.then_some(mountpoint),
            targets: self.targets_in(&session, table),
            own_bytes,
            own_inodes,
            shared_bytes: session.image.bytes,
            session,
        })
    }
}
