//! `copy` and `xfs-reflink`: `cp -a` of the whole tree.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{Idle, Subject, clone_tree, copy_tree, directory, remove_tree};
use crate::stage::Storage;

pub(crate) struct Copies {
    name: &'static str,
    reflink: &'static str,
    storage: Storage,
    home: PathBuf,
}

impl Copies {
    pub(crate) fn new(name: &'static str, storage: &Storage, reflink: &'static str, repository: &Path) -> Result<Self> {
        let home = directory(storage, name)?;
        clone_tree(repository, &home.join("base"))?;
        Ok(Self { name, reflink, storage: storage.clone(), home })
    }
}

impl Subject for Copies {
    fn name(&self) -> &'static str {
        self.name
    }

    fn create(&mut self, copy: &str) -> Result<PathBuf> {
        self.fork("base", copy)
    }

    fn fork(&mut self, from: &str, copy: &str) -> Result<PathBuf> {
        let path = self.home.join(copy);
        copy_tree(&self.home.join(from), &path, self.reflink)?;
        Ok(path)
    }

    fn checkpoint(&mut self, from: &str, name: &str) -> Result<()> {
        self.fork(from, name).map(|_| ())
    }

    fn remove(&mut self, copy: &str) -> Result<()> {
        remove_tree(&self.home.join(copy))
    }

    fn drop_checkpoint(&mut self, name: &str) -> Result<()> {
        self.remove(name)
    }

    fn file_system(&self) -> PathBuf {
        self.storage.path.clone()
    }

    fn idle(&self) -> Idle {
        Idle::Nothing
    }
}
