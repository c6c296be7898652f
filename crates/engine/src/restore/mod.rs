//! Applies the difference between two trees to a live session, through its merged mount.
//!
//! [`plan`] compares the trees and decides everything beforehand without touching the mount: what is to be done, which
//! contents are needed and how much room it takes. [`Plan::apply`] does it. The cost follows the difference; only where a
//! hard link is part of the difference are both trees read wholly, to know the fellows of each link.
//!
//! Promises, for processes that are frozen meanwhile and go on afterwards:
//! - a file whose content changes is replaced by rename, so who has it open keeps the old contents;
//! - a directory that is in both trees stays the same inode, also where it was moved or swapped, so a working directory
//!   in it stays valid;
//! - everything happens strictly beneath the mount, and no symbolic link is followed;
//! - when there is too little room, nothing has been touched.
//!
//! A restore that is interrupted leaves a mixture of both trees; the caller has kept what was there before it started
//! and checks the result with [`verify`]. Doing it again from what is there then completes it.

mod apply;
mod links;
mod moves;
mod plan;

use std::path::PathBuf;

use aether_cas::Blob;
use aether_cas::tree::{Attributes, Directories, diff, same_tree};

use crate::error::{Error, Result};

/// Prefix of the names that a restore uses while it runs.
pub const TEMPORARY: &str = ".aether-restore-";

/// What a restore does, in order.
#[derive(Debug, Default)]
pub struct Plan {
    steps: Vec<Step>,
    /// Set at the very end, since every other step changes times of directories.
    directories: Vec<(PathBuf, Attributes)>,
    room: Room,
}

/// Space in a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Bytes of contents.
    pub bytes: u64,
    /// Entries.
    pub inodes: u64,
}

/// What a restore did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Entries written, linked or given other attributes.
    pub changed: u64,
    /// Entries removed; a directory with all that is in it counts once.
    pub removed: u64,
    /// Directories moved back.
    pub moved: u64,
    /// Bytes of contents written.
    pub bytes: u64,
}

/// One thing to do. Paths are relative to the root of the session.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Move a directory, found where the old tree has it, out of the way under a number.
    Aside {
        from: PathBuf,
        number: usize,
    },
    /// Move it to where the new tree has it.
    Place {
        number: usize,
        to: PathBuf,
    },
    /// Remove an entry and all that is in it.
    Remove {
        path: PathBuf,
    },
    MakeDirectory {
        path: PathBuf,
    },
    File {
        path: PathBuf,
        content: Blob,
        attributes: Attributes,
    },
    Symlink {
        path: PathBuf,
        target: Vec<u8>,
        attributes: Attributes,
    },
    Fifo {
        path: PathBuf,
        attributes: Attributes,
    },
    /// Make `path` another name of `first`.
    Link {
        first: PathBuf,
        path: PathBuf,
    },
    /// Change the attributes of a leaf in place.
    Attributes {
        path: PathBuf,
        attributes: Attributes,
    },
}

/// Compares tree `from`, which is what the session shows, with tree `to`, which it is to show.
///
/// # Errors
/// `Store` if a message of either tree cannot be had.
pub fn plan(from: &Blob, to: &Blob, directories: &dyn Directories) -> Result<Plan> {
    plan::make(from, to, directories)
}

/// Checks that a session shows what it was restored to: `after` is the tree digested from it.
///
/// # Errors
/// `Damaged` names the first paths that differ.
pub fn verify(after: &Blob, target: &Blob, directories: &dyn Directories) -> Result<()> {
    let store = |error| Error::store("compare the restored session with its target", error);
    if same_tree(after, target, directories).map_err(store)? {
        return Ok(());
    }
    let changes = diff(target, after, directories).map_err(store)?;
    let mut paths: Vec<_> = changes.iter().take(5).map(|change| format!("/{}", change.path.display())).collect();
    if changes.len() > paths.len() {
        paths.push(format!("and {} more", changes.len() - paths.len()));
    }
    Err(Error::Damaged {
        what: "the restored session".into(),
        detail: format!("it differs from tree {target} at {}", paths.join(", ")),
    })
}

impl Plan {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.directories.is_empty()
    }

    /// The contents that must be at hand before [`Plan::apply`].
    pub fn contents(&self) -> impl Iterator<Item = Blob> + '_ {
        self.steps.iter().filter_map(|step| match step {
            Step::File { content, .. } if content.size > 0 => Some(*content),
            _ => None,
        })
    }

    /// Space that is needed while it is applied: new contents are written before old ones go.
    pub fn room(&self) -> Room {
        self.room
    }

    fn push(&mut self, step: Step) {
        match &step {
            Step::File { content, .. } => {
                self.room.bytes += content.size;
                self.room.inodes += 1;
            }
            Step::MakeDirectory { .. } | Step::Symlink { .. } | Step::Fifo { .. } => self.room.inodes += 1,
            Step::Aside { .. }
            | Step::Place { .. }
            | Step::Remove { .. }
            | Step::Link { .. }
            | Step::Attributes { .. } => {}
        }
        self.steps.push(step);
    }
}
