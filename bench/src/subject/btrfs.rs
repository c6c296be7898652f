//! `btrfs-snapshot`: a snapshot of a subvolume with the whole tree, by the ioctl.

use std::path::{Path, PathBuf};

use aether_engine::pool::{Btrfs, Medium, Pool};
use anyhow::Result;

use super::{Idle, Subject, clone_tree, directory};
use crate::stage::Storage;

pub(crate) struct Snapshots {
    storage: Storage,
    /// Used for its system calls alone; the tree lies in what the engine calls an upper.
    pool: Btrfs,
}

const TREE: &str = "tree";

impl Snapshots {
    pub(crate) fn new(storage: &Storage, repository: &Path) -> Result<Self> {
        let pool = Btrfs::open(&directory(storage, "btrfs-snapshot")?)?;
        pool.create("base", Medium::Disk)?;
        clone_tree(repository, &pool.upper("base").join(TREE))?;
        Ok(Self { storage: storage.clone(), pool })
    }
}

/// One writable snapshot of a live session: its name as seen from the directory of snapshots, where `fork` looks.
fn beside(session: &str) -> String {
    format!("../sessions/{session}")
}

impl Subject for Snapshots {
    fn name(&self) -> &'static str {
        "btrfs-snapshot"
    }

    fn create(&mut self, copy: &str) -> Result<PathBuf> {
        self.fork("base", copy)
    }

    fn fork(&mut self, from: &str, copy: &str) -> Result<PathBuf> {
        self.pool.fork(&beside(from), copy)?;
        Ok(self.pool.upper(copy).join(TREE))
    }

    fn checkpoint(&mut self, from: &str, name: &str) -> Result<()> {
        Ok(self.pool.snapshot(from, name)?)
    }

    fn remove(&mut self, copy: &str) -> Result<()> {
        Ok(self.pool.delete_session(copy)?)
    }

    fn drop_checkpoint(&mut self, name: &str) -> Result<()> {
        Ok(self.pool.delete_snapshot(name)?)
    }

    fn file_system(&self) -> PathBuf {
        self.storage.path.clone()
    }

    fn idle(&self) -> Idle {
        Idle::Kernel(100)
    }
}
