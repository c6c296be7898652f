//! What changed between two trees, as git sees it: regular files with their execute bit, and symlinks.
//!
//! Only directories that differ are read, so the cost follows the change. Directories, fifos, times, owners and extended
//! attributes are nothing to git and are left out, and so is everything called `.git` unless it is asked for.

use std::collections::HashSet;

use aether_cas::transfer::{Differing, Extent};
use aether_cas::tree::{self, Node};
use aether_cas::{Blob, Store, StoreError};

/// The changed paths on both sides.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// What was there before and differs now.
    pub base: Vec<Entry>,
    /// What is there now and differed before.
    pub head: Vec<Entry>,
}

/// One path on one side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// From the root, without a leading slash; any bytes but NUL.
    pub path: Vec<u8>,
    /// What git would record for it.
    pub object: Object,
}

/// What git records of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A regular file.
    File {
        /// Its contents.
        content: Blob,
        /// Whether its owner may execute it, which is all that git keeps of a mode.
        executable: bool,
    },
    /// A symlink and where it points.
    Symlink(Vec<u8>),
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store failed, or lacks a directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The change is larger than is allowed.
    #[error("the change touches more than {limit} bytes of directory listings")]
    TooLarge {
        /// The limit, in bytes.
        limit: u64,
    },
}

/// What to compare.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Whether to compare what is called `.git` too.
    pub git: bool,
    /// The most bytes of directory messages to read.
    pub directory_bytes: u64,
}

impl Changes {
    /// Compares two trees of `store`.
    ///
    /// # Errors
    /// Those of the store, and [`Error::TooLarge`].
    pub async fn between(store: &dyn Store, old: Blob, new: Blob, options: Options) -> Result<Self, Error> {
        let extent = Extent { without: (!options.git).then_some(b".git"), bytes: options.directory_bytes };
        let directories = Differing::read(store, old, new, extent).await?;
        let directories = directories.ok_or(Error::TooLarge { limit: options.directory_bytes })?;
        let mut changes = Self::default();
        for change in tree::diff(&old, &new, &directories)? {
            let (old, new) = (change.old.and_then(object), change.new.and_then(object));
            if old == new {
                continue;
            }
            use std::os::unix::ffi::OsStringExt;
            let path = change.path.into_os_string().into_vec();
            if let Some(object) = old {
                changes.base.push(Entry { path: path.clone(), object });
            }
            if let Some(object) = new {
                changes.head.push(Entry { path, object });
            }
        }
        Ok(changes)
    }

    /// The contents of all files of both sides, each once, in order of first use.
    pub fn contents(&self) -> Vec<Blob> {
        let mut seen = HashSet::new();
        let files = self.base.iter().chain(&self.head).filter_map(|entry| match entry.object {
            Object::File { content, .. } => Some(content),
            Object::Symlink(_) => None,
        });
        files.filter(|content| seen.insert(*content)).collect()
    }
}

fn object(node: Node) -> Option<Object> {
    match node {
        Node::File { content, attributes, .. } => {
            Some(Object::File { content, executable: attributes.mode & 0o100 != 0 })
        }
        Node::Symlink { target, .. } => Some(Object::Symlink(target)),
        Node::Directory(_) | Node::Fifo { .. } => None,
    }
}
