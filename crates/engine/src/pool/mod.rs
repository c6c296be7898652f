//! Pools: one file system that keeps the writable directories of sessions, their snapshots, and what they share.
//!
//! Layout: `objects/`, `images/`, `sessions/<session>/{upper,work}`, `snapshots/<snapshot>/upper`. A pool promises
//! that a session or snapshot appears under its name complete or not at all, and that what it has acknowledged is on
//! disk. Names that begin with a dot are a pool's own, half-made or half-deleted.

mod btrfs;
mod directory;
mod limits;
mod media;
mod quota;

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::mount;

pub use btrfs::Btrfs;
pub(crate) use directory::copy_contents;
pub use directory::{Directory, copy_tree};
pub(crate) use limits::walk_usage;
pub use limits::{Limits, Reached, Usage};

/// How a pool keeps its sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Snapshots are one ioctl.
    Btrfs,
    /// Snapshots walk and clone.
    Directory,
}

/// What a session's changes are kept on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Medium {
    /// The pool of the node: survives the end of the machine.
    #[default]
    Disk,
    /// The node's memory: gone with the machine, except for what was uploaded.
    Memory,
}

/// Where the pool lies.
#[derive(Debug, Clone, Default)]
pub enum PoolConfig {
    /// What the directory holds already; else the directory itself if it lies on btrfs; else an image of this many
    /// bytes (0: half of what is free) if the kernel has btrfs and `mkfs.btrfs` is installed; else plain directories.
    #[default]
    Auto,
    /// A btrfs image file of this many bytes, preallocated, on a loop device. 0: half of what is free.
    Image {
        /// Size when it is first made.
        bytes: u64,
    },
    /// A block device that carries btrfs.
    Device(PathBuf),
    /// A directory on a mounted btrfs.
    Subvolume(PathBuf),
    /// Plain directories on whatever file system holds the engine's directory.
    Directory,
}

/// Space of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Space {
    /// Bytes in all.
    pub total_bytes: u64,
    /// Bytes that can still be written.
    pub available_bytes: u64,
    /// Inodes in all; 0 where the file system makes them as needed.
    pub total_inodes: u64,
    /// Inodes that can still be made.
    pub available_inodes: u64,
    /// It takes no writes: the kernel found its disk failing, or somebody remounted it.
    #[serde(default)]
    pub read_only: bool,
}

/// Makes, snapshots and deletes session directories.
pub trait Pool: Send + Sync {
    /// Which kind it is.
    fn kind(&self) -> Kind;

    /// The directory with `objects`, `images`, `sessions` and `snapshots` in it.
    fn root(&self) -> &Path;

    /// Makes an empty session with `upper` and `work`.
    fn create(&self, session: &str, medium: Medium) -> Result<()>;

    /// Makes ready for a snapshot: brings what a session has not yet written back to disk, so that the snapshot is short, and
    /// sees to it that what the snapshot will pin is not held against the session's `limits`.
    fn flush(&self, session: &str, limits: Limits) -> Result<()>;

    /// Copies a session's upper as it is now. Writers may be held still meanwhile, so this does no more than it must;
    /// the snapshot is there when [`finish_snapshot`](Self::finish_snapshot) returns.
    fn snapshot(&self, session: &str, snapshot: &str) -> Result<()>;

    /// Brings a snapshot to disk and under its name.
    fn finish_snapshot(&self, snapshot: &str) -> Result<()>;

    /// Makes a session whose upper begins as a copy of a snapshot's.
    fn fork(&self, snapshot: &str, session: &str) -> Result<()>;

    /// Deletes a session directory. It must not be mounted. Nothing there is success.
    fn delete_session(&self, session: &str) -> Result<()>;

    /// Deletes a snapshot. Nothing there is success.
    fn delete_snapshot(&self, snapshot: &str) -> Result<()>;

    /// By what the kernel enforces limits of sessions here; `Unsupported` says why they are only counted.
    fn enforcement(&self) -> Result<String>;

    /// As [`enforcement`](Self::enforcement), of a medium.
    fn enforcement_of(&self, _: Medium) -> Result<String> {
        self.enforcement()
    }

    /// Mounts a pool that the kernel has made read-only anew, after `vacate` has taken down what keeps it mounted; does
    /// nothing to one that takes writes.
    fn remount(&self, vacate: &dyn Fn(&Path) -> Result<()>) -> Result<()>;

    /// What a session takes up. Costs the same however much that is, where limits are enforced; else walks the upper.
    fn usage(&self, session: &str) -> Result<Usage>;

    /// Sets the limits of a session, also while it is written to, and returns what it takes up. Called again from time
    /// to time for every session that has limits: they are as exact as that is often, see each pool.
    fn keep(&self, session: &str, limits: Limits) -> Result<Usage>;

    /// Deletes what a crash left under a dotted name. Returns how many there were.
    fn sweep(&self) -> Result<usize>;

    /// `sessions/<session>`.
    fn session_dir(&self, session: &str) -> PathBuf {
        self.root().join("sessions").join(session)
    }

    /// `sessions/<session>/upper`.
    fn upper(&self, session: &str) -> PathBuf {
        self.session_dir(session).join("upper")
    }

    /// `sessions/<session>/work`.
    fn work(&self, session: &str) -> PathBuf {
        self.session_dir(session).join("work")
    }

    /// `snapshots/<snapshot>/upper`.
    fn snapshot_upper(&self, snapshot: &str) -> PathBuf {
        self.root().join("snapshots").join(snapshot).join("upper")
    }

    /// Sessions and snapshots on disk, whoever made them.
    fn listing(&self) -> Result<Listing> {
        Ok(Listing {
            sessions: names(&self.root().join("sessions"))?,
            snapshots: names(&self.root().join("snapshots"))?,
        })
    }

    /// What a snapshot is kept on.
    fn medium_of_snapshot(&self, _: &str) -> Medium {
        Medium::Disk
    }

    /// Space of a medium.
    fn space_of(&self, medium: Medium) -> Result<Space> {
        if medium == Medium::Memory {
            return Err(no_memory());
        }
        let stat = rustix::fs::statvfs(self.root()).at("read the free space of", self.root())?;
        Ok(Space {
            total_bytes: stat.f_blocks * stat.f_frsize,
            available_bytes: stat.f_bavail * stat.f_frsize,
            total_inodes: stat.f_files,
            available_inodes: stat.f_favail,
            read_only: stat.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY),
        })
    }
}

/// What is said where a session in memory is asked for and there is no place for it.
fn no_memory() -> Error {
    Error::Unsupported {
        what: "a session in memory".into(),
        remedy: "the driver was given no memory for sessions; set driver.pool.memorySize (--memory-size)".into(),
    }
}

/// What a pool holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// Names under `sessions`.
    pub sessions: Vec<String>,
    /// Names under `snapshots`.
    pub snapshots: Vec<String>,
}

/// Names of a directory in order, without those that begin with a dot.
fn names(directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).at("list", directory)? {
        let name = entry.at("list", directory)?.file_name();
        match name.into_string() {
            Ok(name) if !name.starts_with('.') => names.push(name),
            _ => {}
        }
    }
    names.sort();
    Ok(names)
}

/// Entries of a directory that begin with a dot.
fn dotted(directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).at("list", directory)? {
        let name = entry.at("list", directory)?.file_name();
        if let Ok(name) = name.into_string()
            && name.starts_with('.')
        {
            names.push(name);
        }
    }
    Ok(names)
}

/// A session or snapshot name becomes a file name and part of a mount option.
pub fn validate_name(kind: &'static str, name: &str) -> Result<()> {
    let ok = !name.is_empty()
        && name.len() <= 100
        && !name.starts_with(['.', '-'])
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'));
    if ok {
        return Ok(());
    }
    Err(Error::Invalid {
        what: format!("{kind} name {name:?}"),
        reason: "must be 1 to 100 letters, digits, '-', '_' or '.', and begin with a letter or digit".into(),
    })
}

/// Opens the pool of the engine's directory `root`, making it on first use, and one of at most `memory` bytes in the
/// node's memory if that is wanted. A directory keeps the kind that it began with: `pool.kind` remembers it.
pub fn open(root: &Path, config: &PoolConfig, memory: Option<u64>) -> Result<Box<dyn Pool>> {
    let disk = open_disk(root, config)?;
    let directory = root.join("memory");
    let memory = match memory {
        Some(bytes) => Btrfs::memory(&directory, bytes)?,
        // Not wanted any more, but what sessions have there goes only with the machine.
        None if mount::is_mountpoint(&directory)? => Btrfs::memory_again(&directory)?,
        None => return Ok(disk),
    };
    Ok(Box::new(media::Media { disk, memory }))
}

fn open_disk(root: &Path, config: &PoolConfig) -> Result<Box<dyn Pool>> {
    fs::create_dir_all(root).at("create", root)?;
    let directory = root.join("pool");
    fs::create_dir_all(&directory).at("create", &directory)?;
    let marker = root.join("pool.kind");
    let known = match fs::read_to_string(&marker) {
        Ok(text) => Some(text.trim().to_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(Error::io("read", &marker, error)),
    };
    let chosen = match config {
        PoolConfig::Auto => match known.as_deref() {
            Some("image") => PoolConfig::Image { bytes: 0 },
            Some("directory") => PoolConfig::Directory,
            Some("subvolume") => PoolConfig::Subvolume(directory.clone()),
            Some(other) => return Err(mismatch(root, other, "auto")),
            None if btrfs::is_btrfs(&directory)? => PoolConfig::Subvolume(directory.clone()),
            None if btrfs::is_available() => PoolConfig::Image { bytes: 0 },
            None => PoolConfig::Directory,
        },
        other => other.clone(),
    };
    let name = match &chosen {
        PoolConfig::Image { .. } => "image",
        PoolConfig::Device(_) => "device",
        PoolConfig::Subvolume(_) => "subvolume",
        PoolConfig::Directory | PoolConfig::Auto => "directory",
    };
    match known.as_deref() {
        Some(known) if known != name => return Err(mismatch(root, known, name)),
        Some(_) => {}
        None => crate::state::write_file(&marker, format!("{name}\n").as_bytes())?,
    }
    let pool: Box<dyn Pool> = match chosen {
        PoolConfig::Image { bytes } => Box::new(Btrfs::image(&root.join("pool.img"), bytes, &directory)?),
        PoolConfig::Device(device) => Box::new(Btrfs::device(&device, &directory)?),
        PoolConfig::Subvolume(path) => Box::new(Btrfs::open(&path)?),
        PoolConfig::Directory | PoolConfig::Auto => Box::new(Directory::open(&directory)?),
    };
    for name in ["objects", "images"] {
        let path = pool.root().join(name);
        fs::create_dir_all(&path).at("create", &path)?;
    }
    Ok(pool)
}

fn mismatch(root: &Path, known: &str, asked: &str) -> Error {
    Error::Invalid {
        what: format!("pool kind {asked}"),
        reason: format!(
            "{} holds a pool of kind {known}; keep that kind, or empty the directory after its sessions are durable",
            root.display()
        ),
    }
}

fn make_layout(root: &Path) -> Result<()> {
    for name in ["sessions", "snapshots"] {
        let path = root.join(name);
        fs::create_dir_all(&path).at("create", &path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_their_directory_are_refused() {
        for name in ["", ".", "..", ".new-x", "a/b", "a b", "-x", "a,b", "a:b", &"x".repeat(101)] {
            assert!(validate_name("session", name).is_err(), "{name:?}");
        }
        for name in ["a", "3f2c-11", "recovered-4.x_y"] {
            validate_name("session", name).unwrap();
        }
    }
}
