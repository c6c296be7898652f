//! What changed between two trees, and whether two trees mean the same.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use super::{
    Attributes, Directories, MAX_DEPTH, Name, Node,
    walk::{too_deep, walk},
};
use crate::{Blob, StoreError};

/// One path that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Path from the root, without a leading slash; empty for the root directory itself.
    pub path: PathBuf,
    /// What happened to it.
    pub kind: ChangeKind,
    /// The entry before; `None` if added.
    pub old: Option<Node>,
    /// The entry after; `None` if removed.
    pub new: Option<Node>,
}

/// How a path differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// It is new.
    Added,
    /// It is gone.
    Removed,
    /// It is of the same kind, but not the same.
    Modified {
        /// The contents of a file or the target of a symlink differ.
        content: bool,
        /// Mode, mtime, owner or xattrs differ (of a directory: its own).
        attributes: bool,
        /// The number of its hard-link group differs; whether the membership does, this does not say.
        links: bool,
    },
}

/// What changed from tree `old` to tree `new`, in order of path, parents before what is in them.
///
/// A path whose kind changed is removed and then added. Everything in an added or removed directory
/// is listed. A directory is `Modified` only when its own attributes changed. Directories that are
/// equal in both trees are never read, so the cost follows the change.
///
/// # Errors
/// Those of `directories`; [`StoreError::Invalid`] for a tree that is too deep.
pub fn diff(old: &Blob, new: &Blob, directories: &dyn Directories) -> Result<Vec<Change>, StoreError> {
    let mut changes = Vec::new();
    if old == new {
        return Ok(changes);
    }
    // A stack of what is still to be compared, the next on top; so the order of paths is kept.
    let mut todo = vec![Task {
        path: PathBuf::new(),
        depth: 0,
        old: Some(Node::Directory(*old)),
        new: Some(Node::Directory(*new)),
    }];
    while let Some(task) = todo.pop() {
        if task.depth > MAX_DEPTH {
            return Err(too_deep(new));
        }
        task.run(directories, &mut changes, &mut todo)?;
    }
    Ok(changes)
}

struct Task {
    path: PathBuf,
    depth: usize,
    old: Option<Node>,
    new: Option<Node>,
}

impl Task {
    fn run(
        self,
        directories: &dyn Directories,
        changes: &mut Vec<Change>,
        todo: &mut Vec<Task>,
    ) -> Result<(), StoreError> {
        match (&self.old, &self.new) {
            (Some(old), Some(new)) if !old.same_kind(new) => {
                // The removal is on top, so it comes first.
                todo.push(Task { path: self.path.clone(), depth: self.depth, old: None, new: self.new });
                todo.push(Task { path: self.path, depth: self.depth, old: self.old, new: None });
                return Ok(());
            }
            (Some(old), Some(new)) => {
                if let Some(kind) = modified(old, new, directories)? {
                    changes.push(self.change(kind));
                }
            }
            (None, Some(_)) => changes.push(self.change(ChangeKind::Added)),
            (Some(_), None) => changes.push(self.change(ChangeKind::Removed)),
            (None, None) => return Ok(()),
        }
        let mut pairs: BTreeMap<Name, (Option<Node>, Option<Node>)> = BTreeMap::new();
        if let Some(Node::Directory(blob)) = &self.old {
            for (name, node) in &directories.directory(blob)?.entries {
                pairs.entry(name.clone()).or_default().0 = Some(node.clone());
            }
        }
        if let Some(Node::Directory(blob)) = &self.new {
            for (name, node) in &directories.directory(blob)?.entries {
                pairs.entry(name.clone()).or_default().1 = Some(node.clone());
            }
        }
        for (name, (old, new)) in pairs.into_iter().rev() {
            if old != new {
                todo.push(Task { path: self.path.join(&name), depth: self.depth + 1, old, new });
            }
        }
        Ok(())
    }

    fn change(&self, kind: ChangeKind) -> Change {
        Change { path: self.path.clone(), kind, old: self.old.clone(), new: self.new.clone() }
    }
}

/// How two entries of the same kind differ; `None` if only what is inside a directory does.
fn modified(old: &Node, new: &Node, directories: &dyn Directories) -> Result<Option<ChangeKind>, StoreError> {
    if let (Node::Directory(old), Node::Directory(new)) = (old, new) {
        let differ = directories.directory(old)?.attributes != directories.directory(new)?.attributes;
        return Ok(differ.then_some(ChangeKind::Modified { content: false, attributes: true, links: false }));
    }
    let content = match (old, new) {
        (Node::Symlink { target: old, .. }, Node::Symlink { target: new, .. }) => old != new,
        _ => old.content() != new.content(),
    };
    Ok(Some(ChangeKind::Modified {
        content,
        attributes: old.attributes() != new.attributes(),
        links: old.link_group() != new.link_group(),
    }))
}

/// Whether two trees have the same paths with the same contents, attributes and hard links.
///
/// Numbers of hard-link groups do not count, only which paths are links of each other. Reads both
/// trees wholly unless they are named alike.
///
/// # Errors
/// Those of `directories`.
pub fn same_tree(a: &Blob, b: &Blob, directories: &dyn Directories) -> Result<bool, StoreError> {
    Ok(a == b || flatten(a, directories)? == flatten(b, directories)?)
}

#[derive(PartialEq, Eq)]
enum Flat {
    Directory(Attributes),
    /// With the first path of its hard-link group, if that has two members or more.
    Other(Node, Option<PathBuf>),
}

fn flatten(root: &Blob, directories: &dyn Directories) -> Result<BTreeMap<PathBuf, Flat>, StoreError> {
    let mut groups: HashMap<u64, Vec<PathBuf>> = HashMap::new();
    let mut flat = BTreeMap::new();
    let own = directories.directory(root)?.attributes.clone();
    flat.insert(PathBuf::new(), Flat::Directory(own));
    walk(root, directories, |path: &Path, node| {
        if let Some(group) = node.link_group() {
            groups.entry(group).or_default().push(path.to_owned());
        }
        let entry = match node {
            Node::Directory(blob) => Flat::Directory(directories.directory(blob)?.attributes.clone()),
            node => Flat::Other(without_group(node), None),
        };
        flat.insert(path.to_owned(), entry);
        Ok::<(), StoreError>(())
    })?;
    for members in groups.into_values().filter(|m| m.len() > 1) {
        for member in &members {
            if let Some(Flat::Other(_, first)) = flat.get_mut(member) {
                *first = members.first().cloned();
            }
        }
    }
    Ok(flat)
}

fn without_group(node: &Node) -> Node {
    let mut node = node.clone();
    match &mut node {
        Node::Directory(_) => {}
        Node::File { link_group, .. } | Node::Symlink { link_group, .. } | Node::Fifo { link_group, .. } => {
            *link_group = None
        }
    }
    node
}
