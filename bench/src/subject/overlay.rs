//! `overlay-by-hand`: the kernel's overlay over a checkout, mounted by the system call, with default options.
//!
//! A fork copies the upper; nothing makes that copy a point in time.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags};

use super::{Idle, Subject, clone_tree, copy_tree, directory, remove_tree};
use crate::stage::Storage;

/// The directories of a hand-made overlay.
pub(super) struct Layers {
    home: PathBuf,
}

impl Layers {
    pub(super) fn new(home: PathBuf) -> Self {
        Self { home }
    }

    pub(super) fn base(&self) -> PathBuf {
        self.home.join("base")
    }

    fn copy(&self, copy: &str) -> PathBuf {
        self.home.join("copies").join(copy)
    }

    pub(super) fn merged(&self, copy: &str) -> PathBuf {
        self.copy(copy).join("merged")
    }

    /// Makes the directories, with a copy of another's upper if there is one, and returns the mount options.
    pub(super) fn prepare(&self, copy: &str, from: Option<&str>) -> Result<String> {
        let directory = self.copy(copy);
        for name in ["work", "merged"] {
            fs::create_dir_all(directory.join(name))?;
        }
        match from {
            Some(from) => copy_tree(&self.copy(from).join("upper"), &directory.join("upper"), "auto")?,
            None => fs::create_dir(directory.join("upper"))?,
        }
        let path = directory.display();
        Ok(format!("lowerdir={},upperdir={path}/upper,workdir={path}/work", self.base().display()))
    }

    pub(super) fn keep(&self, from: &str, name: &str) -> Result<()> {
        let directory = self.copy(name);
        fs::create_dir_all(&directory)?;
        copy_tree(&self.copy(from).join("upper"), &directory.join("upper"), "auto")
    }

    pub(super) fn remove(&self, copy: &str) -> Result<()> {
        remove_tree(&self.copy(copy))
    }
}

pub(crate) struct Overlay {
    name: &'static str,
    storage: Storage,
    layers: Layers,
}

impl Overlay {
    pub(crate) fn new(name: &'static str, storage: &Storage, repository: &Path) -> Result<Self> {
        let layers = Layers::new(directory(storage, name)?);
        clone_tree(repository, &layers.base())?;
        Ok(Self { name, storage: storage.clone(), layers })
    }

    fn mount(&self, copy: &str, options: String) -> Result<PathBuf> {
        let merged = self.layers.merged(copy);
        let options = std::ffi::CString::new(options)?;
        rustix::mount::mount(copy, &merged, "overlay", MountFlags::empty(), options.as_c_str())
            .context("mount an overlay")?;
        Ok(merged)
    }
}

impl Subject for Overlay {
    fn name(&self) -> &'static str {
        self.name
    }

    fn create(&mut self, copy: &str) -> Result<PathBuf> {
        let options = self.layers.prepare(copy, None)?;
        self.mount(copy, options)
    }

    fn fork(&mut self, from: &str, copy: &str) -> Result<PathBuf> {
        let options = self.layers.prepare(copy, Some(from))?;
        self.mount(copy, options)
    }

    fn checkpoint(&mut self, from: &str, name: &str) -> Result<()> {
        self.layers.keep(from, name)
    }

    fn remove(&mut self, copy: &str) -> Result<()> {
        let merged = self.layers.merged(copy);
        if aether_engine::mount::find_mount(&merged)?.is_some() {
            rustix::mount::unmount(&merged, UnmountFlags::empty())
                .with_context(|| format!("unmount {}", merged.display()))?;
        }
        self.layers.remove(copy)
    }

    fn drop_checkpoint(&mut self, name: &str) -> Result<()> {
        self.layers.remove(name)
    }

    fn file_system(&self) -> PathBuf {
        self.storage.path.clone()
    }

    fn idle(&self) -> Idle {
        Idle::Kernel(300)
    }
}
