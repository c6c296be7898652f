//! A tree under construction: directories found by a walk, before they have digests.
//!
//! It owns the two things that need the whole tree at once: the naming of hard-link groups, and the encoding of
//! directories from the leaves upward.
//!
//! A group is named by 64 bits of a digest over a salt and the first path of the group. The same tree therefore gets
//! the same names each time, and a new group cannot take the name of an old one that lives on in a part of the tree
//! that was not read: the salt is the tree that the draft is based on.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use aether_cas::tree::{Attributes, Directory, MAX_DEPTH, Name, Node};
use aether_cas::{Blob, Digest};
use bytes::Bytes;

use crate::error::{Error, Result};
use crate::walk;

/// An inode, as far as hard links go: device and number.
pub(crate) type Inode = (u64, u64);

/// What a name in a directory under construction stands for.
pub(crate) enum Entry {
    /// Another directory of the draft.
    Directory(usize),
    /// Taken over as it is from an older tree.
    Kept(Node),
    /// A leaf that the walk found; members of one inode become a hard-link group.
    Leaf(Node, Inode),
}

/// A directory that the walk found.
pub(crate) struct Drafted {
    /// Relative to the root of the walk.
    pub(crate) path: PathBuf,
    pub(crate) attributes: Attributes,
    pub(crate) entries: BTreeMap<Name, Entry>,
}

/// The directories of a tree; a parent always comes before its children, and the root first.
#[derive(Default)]
pub(crate) struct Draft {
    pub(crate) directories: Vec<Drafted>,
}

impl Draft {
    /// Adds a directory and returns its number.
    ///
    /// # Errors
    /// `Invalid` if it lies deeper than a tree goes.
    pub(crate) fn add(&mut self, path: PathBuf, attributes: Attributes) -> Result<usize> {
        if path.components().count() >= MAX_DEPTH {
            return Err(Error::Invalid {
                what: path.display().to_string(),
                reason: format!("directories are nested more than {MAX_DEPTH} deep"),
            });
        }
        self.directories.push(Drafted { path, attributes, entries: BTreeMap::new() });
        Ok(self.directories.len() - 1)
    }

    /// Encodes every directory, children first, and hands each message to `each`. Returns the root.
    pub(crate) fn finish(
        mut self,
        salt: &[u8],
        mut each: impl FnMut(&Path, Blob, Bytes) -> Result<()>,
    ) -> Result<Blob> {
        let groups = self.groups(salt);
        let mut blobs: Vec<Option<Blob>> = vec![None; self.directories.len()];
        while let Some(drafted) = self.directories.pop() {
            let mut entries = BTreeMap::new();
            for (name, entry) in drafted.entries {
                let node = match entry {
                    Entry::Directory(number) => Node::Directory(
                        blobs[number].take().expect("children come after their parent, so they were encoded before"),
                    ),
                    Entry::Kept(node) => node,
                    Entry::Leaf(node, inode) => in_group(node, groups.get(&inode).copied()),
                };
                entries.insert(name, node);
            }
            let directory = Directory { attributes: drafted.attributes, entries };
            let message = directory.encode();
            let blob = Blob::of(&message);
            each(&drafted.path, blob, message)?;
            blobs[self.directories.len()] = Some(blob);
        }
        blobs
            .first()
            .copied()
            .flatten()
            .ok_or_else(|| Error::Invalid { what: "the tree".into(), reason: "it has no root directory".into() })
    }

    /// The inodes that more than one name leads to, with the name of their group.
    fn groups(&self, salt: &[u8]) -> HashMap<Inode, u64> {
        let mut first: HashMap<Inode, (PathBuf, usize)> = HashMap::new();
        for directory in &self.directories {
            for (name, entry) in &directory.entries {
                let Entry::Leaf(_, inode) = entry else { continue };
                let path = walk::join(&directory.path, name.as_bytes());
                let group = first.entry(*inode).or_insert_with(|| (path.clone(), 0));
                group.1 += 1;
                if path < group.0 {
                    group.0 = path;
                }
            }
        }
        let name = |path: &Path| {
            let path = path.as_os_str().as_encoded_bytes();
            let digest = Digest::of(&[b"aether hard-link group 1\0", salt, b"\0", path].concat());
            u64::from_le_bytes(digest.0[..8].try_into().expect("a digest has 32 bytes"))
        };
        first
            .into_iter()
            .filter(|(_, (_, members))| *members > 1)
            .map(|(inode, (path, _))| (inode, name(&path)))
            .collect()
    }
}

/// The same leaf as a member of a hard-link group, or of none.
pub(crate) fn in_group(mut node: Node, group: Option<u64>) -> Node {
    match &mut node {
        Node::Directory(_) => {}
        Node::File { link_group, .. } | Node::Symlink { link_group, .. } | Node::Fifo { link_group, .. } => {
            *link_group = group;
        }
    }
    node
}
