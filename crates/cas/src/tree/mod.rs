//! Trees: Merkle trees of directories, named by the blob of their root directory message.
//!
//! This module holds the model; [`codec`] its one encoding, [`diff`] what changed between two
//! trees, [`walk`] ways over a tree.
//!
//! A tree keeps names, kinds, modes, mtimes to the nanosecond, `user.*` xattrs, symlink targets,
//! hard-link groups, fifos, and owners where they differ from the owner of the session. It keeps
//! no sockets, no device nodes, no ctime and no atime.

pub mod codec;
pub mod diff;
pub mod name;
pub mod walk;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, RwLock},
};

use bytes::Bytes;

pub use codec::TreeError;
pub use diff::{Change, ChangeKind, diff, same_tree};
pub use name::{Name, NameError};
pub use walk::{Summary, summary, walk};

use crate::{Blob, StoreError};

/// Entries a directory may have.
pub const MAX_ENTRIES: usize = 1_000_000;
/// Bytes an encoded directory may have.
pub const MAX_DIRECTORY_BYTES: usize = 128 << 20;
/// The first bytes of messages that a directory can begin with: the tags of its fields.
pub(crate) const DIRECTORY_TAGS: [u8; 4] = [0x0a, 0x12, 0x1a, 0x2a];
/// Directories a path may go down from the root. Linux takes paths of 4096 bytes, so of 2048 names.
pub const MAX_DEPTH: usize = 2048;
/// Bytes of a symlink's target (Linux: PATH_MAX without its NUL).
pub const MAX_TARGET_BYTES: usize = 4095;
/// Bytes of an xattr's name (Linux: XATTR_NAME_MAX).
pub const MAX_XATTR_NAME_BYTES: usize = 255;
/// Bytes of an xattr's value (Linux: XATTR_SIZE_MAX).
pub const MAX_XATTR_VALUE_BYTES: usize = 65_536;

/// One directory: its own attributes and what is in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    /// The directory's own mode, mtime, owner and xattrs.
    pub attributes: Attributes,
    /// Its entries by name.
    pub entries: BTreeMap<Name, Node>,
}

/// What a file system records beside names and contents.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attributes {
    /// Permission, set-id and sticky bits: at most 0o7777.
    pub mode: u32,
    /// Time of the last modification of the contents.
    pub mtime: Mtime,
    /// Owner; `None` is the owner of the session that uses the tree.
    pub owner: Option<Owner>,
    /// Extended attributes of the `user.` namespace, by full name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// A time as the kernel keeps it: seconds since 1970 (UTC) and nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mtime {
    /// Seconds since the Unix epoch, negative before it.
    pub seconds: i64,
    /// Nanoseconds within the second: 0 to 999,999,999.
    pub nanos: u32,
}

/// Numeric user and group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// One entry of a directory.
///
/// Entries with the same `link_group` anywhere in one tree are names of one inode. Group numbers
/// mean nothing else and are unique within a tree only. A group of one is no hard link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// A directory; its attributes are in its own message.
    Directory(Blob),
    /// A regular file.
    File {
        /// Its contents.
        content: Blob,
        /// Its attributes.
        attributes: Attributes,
        /// Its hard-link group.
        link_group: Option<u64>,
    },
    /// A symbolic link.
    Symlink {
        /// Where it points, any bytes but NUL.
        target: Vec<u8>,
        /// Its attributes.
        attributes: Attributes,
        /// Its hard-link group.
        link_group: Option<u64>,
    },
    /// A named pipe.
    Fifo {
        /// Its attributes.
        attributes: Attributes,
        /// Its hard-link group.
        link_group: Option<u64>,
    },
}

impl Node {
    /// The entry's attributes; `None` for a directory, which has them in its message.
    pub fn attributes(&self) -> Option<&Attributes> {
        match self {
            Self::Directory(_) => None,
            Self::File { attributes, .. } | Self::Symlink { attributes, .. } | Self::Fifo { attributes, .. } => {
                Some(attributes)
            }
        }
    }

    /// The entry's hard-link group.
    pub fn link_group(&self) -> Option<u64> {
        match self {
            Self::Directory(_) => None,
            Self::File { link_group, .. } | Self::Symlink { link_group, .. } | Self::Fifo { link_group, .. } => {
                *link_group
            }
        }
    }

    /// The contents of a regular file.
    pub fn content(&self) -> Option<Blob> {
        match self {
            Self::File { content, .. } => Some(*content),
            _ => None,
        }
    }

    /// Whether two entries are of the same kind.
    pub fn same_kind(&self, other: &Node) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

impl Directory {
    /// The subdirectories, in order of name.
    pub fn subdirectories(&self) -> impl Iterator<Item = (&Name, Blob)> {
        self.entries.iter().filter_map(|(name, node)| match node {
            Node::Directory(blob) => Some((name, *blob)),
            _ => None,
        })
    }

    /// The contents of the regular files, in order of name.
    pub fn contents(&self) -> impl Iterator<Item = Blob> {
        self.entries.values().filter_map(Node::content)
    }
}

/// A place to read the directories of trees from, without waiting for a network.
pub trait Directories: Send + Sync {
    /// The directory named by `blob`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::NotADirectory`] or what the place itself meets.
    fn directory(&self, blob: &Blob) -> Result<Arc<Directory>, StoreError>;

    /// Its encoded message.
    ///
    /// # Errors
    /// As [`Directories::directory`].
    fn directory_bytes(&self, blob: &Blob) -> Result<Bytes, StoreError> {
        Ok(self.directory(blob)?.encode())
    }
}

impl<T: Directories + ?Sized> Directories for Arc<T> {
    fn directory(&self, blob: &Blob) -> Result<Arc<Directory>, StoreError> {
        (**self).directory(blob)
    }

    fn directory_bytes(&self, blob: &Blob) -> Result<Bytes, StoreError> {
        (**self).directory_bytes(blob)
    }
}

/// Directories held in memory.
#[derive(Debug, Default)]
pub struct MemoryDirectories(RwLock<HashMap<Blob, Arc<Directory>>>);

impl MemoryDirectories {
    /// No directories.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory and returns its name.
    pub fn insert(&self, directory: Directory) -> Blob {
        let blob = directory.blob();
        self.map_mut().insert(blob, Arc::new(directory));
        blob
    }

    /// Number of directories.
    pub fn len(&self) -> usize {
        self.map().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn map(&self) -> std::sync::RwLockReadGuard<'_, HashMap<Blob, Arc<Directory>>> {
        self.0.read().unwrap_or_else(|e| e.into_inner())
    }

    fn map_mut(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<Blob, Arc<Directory>>> {
        self.0.write().unwrap_or_else(|e| e.into_inner())
    }
}

impl Directories for MemoryDirectories {
    fn directory(&self, blob: &Blob) -> Result<Arc<Directory>, StoreError> {
        self.map().get(blob).cloned().ok_or_else(|| StoreError::NotFound { blob: *blob, store: "memory".to_owned() })
    }
}
