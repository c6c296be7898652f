//! What changed between two trees, as git can hold it, and what git cannot hold of it.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;

use aether_cas::transfer::Differing;
use aether_cas::tree::{self, Attributes, Change, Directories, Directory, Node};
use aether_cas::{Blob, StoreError};

use crate::losses::Losses;

/// From the root, without a leading slash; any bytes but NUL.
pub(super) type Path = Vec<u8>;

/// What git records of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Object {
    /// A regular file, and whether its owner may execute it.
    File { content: Blob, executable: bool },
    /// A symlink and where it points.
    Symlink(Vec<u8>),
}

/// What changed.
#[derive(Debug, Default)]
pub(super) struct Difference {
    /// What is there no more.
    pub(super) removed: BTreeSet<Path>,
    /// What is new or other than before.
    pub(super) written: BTreeMap<Path, Object>,
    /// What git cannot hold.
    pub(super) losses: Losses,
}

/// What a commit does not say as the tree did.
pub(super) mod loss {
    pub(in crate::git) const FIFO: &str = "named pipes are left out, because git does not keep them";
    pub(in crate::git) const MODE: &str = "of these modes git keeps only whether the owner may execute";
    pub(in crate::git) const OWNER: &str = "owners are left out, because git does not keep them";
    pub(in crate::git) const XATTRS: &str = "extended attributes are left out, because git does not keep them";
    pub(in crate::git) const EMPTY: &str = "empty directories are left out, because git does not keep them";
    pub(in crate::git) const REPOSITORY: &str =
        "repositories within the repository: their files are committed, their histories are not";
    pub(in crate::git) const SUBMODULE: &str = "changes in submodules are left out: they are to be committed there";
    pub(in crate::git) const NAME: &str = "files of these names are left out, because git takes them for its own";
    pub(in crate::git) const CONVERTED: &str = "these are committed as .gitattributes says, which is not byte for byte";
}

impl Difference {
    /// What changed from `old` to `new`. `submodules` are paths at which git has commits of other repositories.
    pub(super) fn between(
        trees: &Differing,
        old: &Blob,
        new: &Blob,
        submodules: &BTreeSet<Path>,
    ) -> Result<Self, StoreError> {
        let mut difference = Self::default();
        for change in tree::diff(old, new, trees)? {
            let Change { path, old, new, .. } = change;
            let path = path.into_os_string().into_vec();
            if let Some(module) = above(&path, submodules) {
                if !difference.removed.contains(module) {
                    difference.losses.add(loss::SUBMODULE, &path);
                }
                continue;
            }
            // As it is for git, a directory at a submodule's path is one object.
            if submodules.contains(&path) && old.is_some() && !matches!(new, Some(Node::Directory(_))) {
                difference.removed.insert(path.clone());
            }
            let (before, after) = (old.as_ref().and_then(object), new.as_ref().and_then(object));
            if !submodules.contains(&path) {
                difference.lose(trees, &path, old.as_ref(), new.as_ref())?;
            }
            match after {
                Some(after) if before.as_ref() != Some(&after) => {
                    difference.written.insert(path, after);
                }
                None if before.is_some() => {
                    difference.removed.insert(path);
                }
                _ => {}
            }
        }
        Ok(difference)
    }

    /// How many paths differ.
    pub(super) fn paths(&self) -> u64 {
        self.removed.iter().chain(self.written.keys()).collect::<BTreeSet<_>>().len() as u64
    }

    /// Notes what git does not keep of a new state.
    fn lose(
        &mut self,
        trees: &Differing,
        path: &[u8],
        old: Option<&Node>,
        new: Option<&Node>,
    ) -> Result<(), StoreError> {
        let Some(new) = new else { return Ok(()) };
        let before = old.map(|node| attributes(trees, node)).transpose()?.unwrap_or_default();
        let now = attributes(trees, new)?;
        match new {
            Node::Fifo { .. } => self.losses.add(loss::FIFO, path),
            Node::Directory(blob) => {
                let empty = |blob: &Blob| trees.directory(blob).map(|directory| is_empty(&directory));
                let was_empty = matches!(old, Some(Node::Directory(old)) if empty(old)?);
                if empty(blob)? && !was_empty && !path.is_empty() {
                    self.losses.add(loss::EMPTY, path);
                }
                let was_repository = matches!(old, Some(Node::Directory(old)) if trees.is_shortened(old));
                if trees.is_shortened(blob) && !was_repository && !path.is_empty() {
                    self.losses.add(loss::REPOSITORY, path);
                }
            }
            Node::File { .. } | Node::Symlink { .. } => {}
        }
        // A group that may write is a matter of the umask of whoever works there.
        let usual = match (new, now.mode & !0o020) {
            (Node::Directory(_), mode) => mode == 0o755,
            (Node::File { .. }, mode) => mode == 0o755 || mode == 0o644,
            (Node::Symlink { .. } | Node::Fifo { .. }, _) => true,
        };
        if !usual && now.mode != before.mode {
            self.losses.add(loss::MODE, path);
        }
        if now.owner.is_some() && now.owner != before.owner {
            self.losses.add(loss::OWNER, path);
        }
        if !now.xattrs.is_empty() && now.xattrs != before.xattrs {
            self.losses.add(loss::XATTRS, path);
        }
        Ok(())
    }
}

/// The submodule in which a path lies.
fn above<'a>(path: &[u8], submodules: &'a BTreeSet<Path>) -> Option<&'a Path> {
    let slashes = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
    slashes.into_iter().find_map(|at| submodules.get(&path[..at]))
}

fn object(node: &Node) -> Option<Object> {
    match node {
        Node::File { content, attributes, .. } => {
            Some(Object::File { content: *content, executable: attributes.mode & 0o100 != 0 })
        }
        Node::Symlink { target, .. } => Some(Object::Symlink(target.clone())),
        Node::Directory(_) | Node::Fifo { .. } => None,
    }
}

fn attributes(trees: &Differing, node: &Node) -> Result<Attributes, StoreError> {
    match (node, node.attributes()) {
        (_, Some(attributes)) => Ok(attributes.clone()),
        (Node::Directory(blob), None) => {
            trees.directory(blob).map(|directory: Arc<Directory>| directory.attributes.clone())
        }
        (_, None) => Ok(Attributes::default()),
    }
}

/// Whether git has nothing to keep of what is right in it.
fn is_empty(directory: &Directory) -> bool {
    directory.entries.values().all(|node| matches!(node, Node::Fifo { .. }))
}
