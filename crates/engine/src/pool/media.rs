//! Two pools as one: sessions on disk and sessions in memory. A name lies where it was made; a copy lies where its
//! original does. What all sessions share is on disk.

use std::path::{Path, PathBuf};

use super::{Btrfs, Kind, Limits, Listing, Medium, Pool, Space, Usage};
use crate::error::Result;

/// The pool of a node that has both.
pub(super) struct Media {
    pub(super) disk: Box<dyn Pool>,
    pub(super) memory: Btrfs,
}

impl Media {
    fn of_session(&self, session: &str) -> &dyn Pool {
        if self.memory.session_dir(session).exists() { &self.memory } else { &*self.disk }
    }

    fn of_snapshot(&self, snapshot: &str) -> &dyn Pool {
        // What is not finished has another name on a directory pool only.
        if self.memory.snapshot_upper(snapshot).exists() { &self.memory } else { &*self.disk }
    }
}

impl Pool for Media {
    fn kind(&self) -> Kind {
        self.disk.kind()
    }

    fn root(&self) -> &Path {
        self.disk.root()
    }

    fn create(&self, session: &str, medium: Medium) -> Result<()> {
        match medium {
            Medium::Disk => self.disk.create(session, medium),
            // To itself it is a pool like any other.
            Medium::Memory => self.memory.create(session, Medium::Disk),
        }
    }

    fn flush(&self, session: &str, limits: Limits) -> Result<()> {
        self.of_session(session).flush(session, limits)
    }

    fn snapshot(&self, session: &str, snapshot: &str) -> Result<()> {
        self.of_session(session).snapshot(session, snapshot)
    }

    fn finish_snapshot(&self, snapshot: &str) -> Result<()> {
        self.of_snapshot(snapshot).finish_snapshot(snapshot)
    }

    fn fork(&self, snapshot: &str, session: &str) -> Result<()> {
        self.of_snapshot(snapshot).fork(snapshot, session)
    }

    fn delete_session(&self, session: &str) -> Result<()> {
        self.of_session(session).delete_session(session)
    }

    fn delete_snapshot(&self, snapshot: &str) -> Result<()> {
        self.of_snapshot(snapshot).delete_snapshot(snapshot)
    }

    fn enforcement(&self) -> Result<String> {
        self.disk.enforcement()
    }

    fn enforcement_of(&self, medium: Medium) -> Result<String> {
        match medium {
            Medium::Disk => self.disk.enforcement(),
            Medium::Memory => self.memory.enforcement(),
        }
    }

    fn remount(&self, vacate: &dyn Fn(&Path) -> Result<()>) -> Result<()> {
        self.disk.remount(vacate)?;
        self.memory.remount(vacate)
    }

    fn usage(&self, session: &str) -> Result<Usage> {
        self.of_session(session).usage(session)
    }

    fn keep(&self, session: &str, limits: Limits) -> Result<Usage> {
        self.of_session(session).keep(session, limits)
    }

    fn sweep(&self) -> Result<usize> {
        Ok(self.disk.sweep()? + self.memory.sweep()?)
    }

    fn session_dir(&self, session: &str) -> PathBuf {
        self.of_session(session).root().join("sessions").join(session)
    }

    fn snapshot_upper(&self, snapshot: &str) -> PathBuf {
        self.of_snapshot(snapshot).root().join("snapshots").join(snapshot).join("upper")
    }

    fn listing(&self) -> Result<Listing> {
        let (mut all, more) = (self.disk.listing()?, self.memory.listing()?);
        all.sessions.extend(more.sessions);
        all.snapshots.extend(more.snapshots);
        Ok(all)
    }

    fn medium_of_snapshot(&self, snapshot: &str) -> Medium {
        if self.memory.snapshot_upper(snapshot).exists() { Medium::Memory } else { Medium::Disk }
    }

    fn space_of(&self, medium: Medium) -> Result<Space> {
        match medium {
            Medium::Disk => self.disk.space_of(medium),
            Medium::Memory => self.memory.space_of(Medium::Disk),
        }
    }
}
