//! What is compared: Aether, and what a user would pick instead.

mod aether;
mod bare;
mod btrfs;
mod copies;
mod fuse;
mod juicefs;
mod overlay;
mod worktree;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::stage::{Storage, run};

pub(crate) use aether::{Aether, OWNER, Source, connect, start_store};
pub(crate) use bare::Bare;
pub(crate) use btrfs::Snapshots;
pub(crate) use copies::Copies;
pub(crate) use fuse::FuseOverlay;
pub(crate) use juicefs::JuiceFs;
pub(crate) use overlay::Overlay;
pub(crate) use worktree::Worktree;

/// What an idle copy costs besides disk space.
pub(crate) enum Idle {
    /// Nothing that grows with copies: they are directories like any other.
    Nothing,
    /// Memory of the kernel; so many copies are made to measure it.
    Kernel(usize),
    /// Memory of the kernel and of processes.
    Processes(usize, Vec<u32>),
}

/// Something that gives writable copies of the tree. Copies are called by name; each call is timed whole.
pub(crate) trait Subject {
    /// As in the report.
    fn name(&self) -> &'static str;

    /// Makes a copy of the source that can be used at the returned path.
    fn create(&mut self, copy: &str) -> Result<PathBuf>;

    /// Makes a copy of `from` as it is now, while `from` stays in use.
    fn fork(&mut self, from: &str, copy: &str) -> Result<PathBuf>;

    /// Keeps how `from` is now under a name, on this machine.
    fn checkpoint(&mut self, from: &str, name: &str) -> Result<()>;

    /// Takes a copy away.
    fn remove(&mut self, copy: &str) -> Result<()>;

    /// Takes a checkpoint away.
    fn drop_checkpoint(&mut self, name: &str) -> Result<()>;

    /// Where its file system is mounted.
    fn file_system(&self) -> PathBuf;

    /// How memory per copy is to be measured.
    fn idle(&self) -> Idle;

    /// Only there for the cost of the system calls: no work is done in it.
    fn is_reference(&self) -> bool {
        false
    }
}

/// Whether a subject is what is measured, rather than a peer of it.
pub(crate) fn is_ours(subject: &str) -> bool {
    matches!(subject, "aether" | "bare-calls")
}

/// Checks the tree out, as a user has it, with an index that git need not refresh.
fn clone_tree(repository: &Path, to: &Path) -> Result<()> {
    run(Command::new("git").args(["clone", "--quiet", "--no-hardlinks"]).arg(repository).arg(to))
        .context("clone the tree")?;
    run(Command::new("git").arg("-C").arg(to).args(["status", "--porcelain"]))?;
    Ok(())
}

/// A directory of its own on a storage.
fn directory(storage: &Storage, name: &str) -> Result<PathBuf> {
    let path = storage.path.join(name);
    std::fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
    Ok(path)
}

/// `cp -a`, with clones of extents or without.
fn copy_tree(from: &Path, to: &Path, reflink: &str) -> Result<()> {
    run(Command::new("cp").arg("-a").arg(format!("--reflink={reflink}")).arg(from).arg(to))?;
    Ok(())
}

fn remove_tree(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
