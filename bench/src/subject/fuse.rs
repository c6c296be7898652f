//! `fuse-overlayfs`: an overlay in user space, one process for each copy.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use aether_engine::mount::find_mount;
use anyhow::{Context, Result};
use rustix::mount::UnmountFlags;

use super::overlay::Layers;
use super::{Idle, Subject, clone_tree, directory};
use crate::stage::{Storage, wait_until};

pub(crate) struct FuseOverlay {
    storage: Storage,
    layers: Layers,
    servers: BTreeMap<String, Child>,
}

impl FuseOverlay {
    pub(crate) fn new(storage: &Storage, repository: &Path) -> Result<Self> {
        let layers = Layers::new(directory(storage, "fuse-overlayfs")?);
        clone_tree(repository, &layers.base())?;
        Ok(Self { storage: storage.clone(), layers, servers: BTreeMap::new() })
    }

    fn serve(&mut self, copy: &str, options: &str) -> Result<PathBuf> {
        let merged = self.layers.merged(copy);
        let server = Command::new("fuse-overlayfs")
            .args(["-f", "-o", options])
            .arg(&merged)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start fuse-overlayfs")?;
        self.servers.insert(copy.to_owned(), server);
        wait_until("the mount of fuse-overlayfs", || Ok(find_mount(&merged)?.is_some()))?;
        Ok(merged)
    }
}

impl Subject for FuseOverlay {
    fn name(&self) -> &'static str {
        "fuse-overlayfs"
    }

    fn create(&mut self, copy: &str) -> Result<PathBuf> {
        let options = self.layers.prepare(copy, None)?;
        self.serve(copy, &options)
    }

    fn fork(&mut self, from: &str, copy: &str) -> Result<PathBuf> {
        let options = self.layers.prepare(copy, Some(from))?;
        self.serve(copy, &options)
    }

    fn checkpoint(&mut self, from: &str, name: &str) -> Result<()> {
        self.layers.keep(from, name)
    }

    fn remove(&mut self, copy: &str) -> Result<()> {
        if let Some(mut server) = self.servers.remove(copy) {
            let merged = self.layers.merged(copy);
            if find_mount(&merged)?.is_some() {
                rustix::mount::unmount(&merged, UnmountFlags::empty())
                    .with_context(|| format!("unmount {}", merged.display()))?;
            }
            server.wait()?;
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
        Idle::Processes(20, self.servers.values().map(Child::id).collect())
    }
}
