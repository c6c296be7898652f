//! `bare-calls`: the system calls that a session cannot do without, and nothing else: one snapshot, one overlay, one
//! bind mount where the pod looks. A fork needs two snapshots: the moment, which stays as it is while it is digested and uploaded,
//! and the fork's own copy of it. No record, nothing synced beyond what the snapshots themselves write.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use aether_engine::mount;
use aether_engine::pool::{Btrfs, Medium, Pool};
use anyhow::Result;

use super::{Idle, Subject};

pub(crate) struct Bare {
    home: PathBuf,
    /// The engine's own file system.
    shared: PathBuf,
    pool: Btrfs,
    lower: PathBuf,
    objects: PathBuf,
    mounted: BTreeSet<String>,
}

impl Bare {
    /// `pool` is the engine's own file system, `lower` the tree of its image.
    pub(crate) fn new(home: PathBuf, pool: PathBuf, lower: PathBuf) -> Result<Self> {
        let objects = pool.join("objects");
        let directory = pool.join("bare");
        fs::create_dir_all(&directory)?;
        fs::create_dir_all(&home)?;
        Ok(Self { home, shared: pool, pool: Btrfs::open(&directory)?, lower, objects, mounted: BTreeSet::new() })
    }

    fn show(&mut self, copy: &str) -> Result<PathBuf> {
        let [merged, target] = ["merged", "target"].map(|name| self.home.join(copy).join(name));
        fs::create_dir_all(&merged)?;
        fs::create_dir_all(&target)?;
        mount::Overlay {
            name: copy.to_owned(),
            lower: self.lower.clone(),
            data: vec![self.objects.clone()],
            upper: Some((self.pool.upper(copy), self.pool.work(copy))),
        }
        .mount(&merged)?;
        mount::bind(&merged, &target, false)?;
        self.mounted.insert(copy.to_owned());
        Ok(target)
    }
}

fn moment_of(copy: &str) -> String {
    format!("of-{copy}")
}

impl Subject for Bare {
    fn name(&self) -> &'static str {
        "bare-calls"
    }

    fn create(&mut self, copy: &str) -> Result<PathBuf> {
        self.pool.create(copy, Medium::Disk)?;
        self.show(copy)
    }

    fn fork(&mut self, from: &str, copy: &str) -> Result<PathBuf> {
        self.pool.snapshot(from, &moment_of(copy))?;
        self.pool.fork(&moment_of(copy), copy)?;
        self.show(copy)
    }

    fn checkpoint(&mut self, from: &str, name: &str) -> Result<()> {
        Ok(self.pool.snapshot(from, name)?)
    }

    fn remove(&mut self, copy: &str) -> Result<()> {
        if self.mounted.remove(copy) {
            for name in ["target", "merged"] {
                mount::unmount(&self.home.join(copy).join(name))?;
            }
        }
        self.pool.delete_session(copy)?;
        Ok(self.pool.delete_snapshot(&moment_of(copy))?)
    }

    fn drop_checkpoint(&mut self, name: &str) -> Result<()> {
        Ok(self.pool.delete_snapshot(name)?)
    }

    fn file_system(&self) -> PathBuf {
        self.shared.clone()
    }

    fn idle(&self) -> Idle {
        Idle::Kernel(300)
    }

    fn is_reference(&self) -> bool {
        true
    }
}
