//! Hard links in a restore: which names must be written afresh or linked so that the new tree's groups come out right.
//!
//! A group that is the same in both trees is left alone. Any other is made anew from its first name, because a link of
//! an image's file parts from its fellows at the first change, so nothing about an old group can be relied on.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aether_cas::Blob;
use aether_cas::tree::Node;

use super::moves::Moves;
use super::plan::{Old, Trees, alike};
use crate::error::Result;
use crate::walk::join;

/// What a name needs beyond the comparison with its predecessor.
pub(super) enum Rewrite {
    /// A file of its own, even if an equal one is there.
    Afresh,
    /// To be a link.
    Link { first: PathBuf },
}

/// Names that need a rewrite.
#[derive(Default)]
pub(super) struct Links {
    rewrites: HashMap<PathBuf, Rewrite>,
    /// Directories that such names are in, at any depth.
    touched: HashSet<PathBuf>,
}

impl Links {
    /// Reads both trees if the difference between them has to do with hard links.
    pub(super) fn find(trees: Trees<'_>, moves: &Moves) -> Result<Self> {
        if !in_difference(trees, moves)? {
            return Ok(Self::default());
        }
        let (old, new) = (Leaves::of(trees, trees.from)?, Leaves::of(trees, trees.to)?);
        let mut links = Self::default();
        for (path, node) in &new.nodes {
            let before = moves.natural(path).filter(|before| moves.natural_is_there(before, path));
            let fellows = new.fellows(path, node);
            let clean = match &before {
                Some(before) => match old.nodes.get(before) {
                    Some(predecessor) => {
                        let expected: Option<BTreeSet<PathBuf>> =
                            fellows.iter().map(|fellow| moves.natural(fellow)).collect();
                        let same_group = expected.is_some_and(|expected| expected == old.fellows(before, predecessor));
                        // Of a single name, whatever else differs is a matter of the ordinary comparison.
                        same_group && (fellows.len() == 1 || new.group_is_alike(&fellows, &old, moves))
                    }
                    None => fellows.len() == 1,
                },
                None => fellows.len() == 1,
            };
            if clean {
                continue;
            }
            let first = fellows.first().expect("a name is a fellow of itself").clone();
            let rewrite = if first == *path { Rewrite::Afresh } else { Rewrite::Link { first } };
            links.touched.extend(path.ancestors().skip(1).map(Path::to_owned));
            links.rewrites.insert(path.clone(), rewrite);
        }
        Ok(links)
    }

    /// Whether a name in the directory at a new path, or below, needs a rewrite.
    pub(super) fn touch(&self, path: &Path) -> bool {
        self.touched.contains(path)
    }

    /// What the name at a new path needs.
    pub(super) fn rewrite(&self, path: &Path) -> Option<&Rewrite> {
        self.rewrites.get(path)
    }
}

/// Every name of a tree that is not a directory, and the groups among them.
struct Leaves {
    nodes: HashMap<PathBuf, Node>,
    groups: HashMap<u64, BTreeSet<PathBuf>>,
}

impl Leaves {
    fn of(trees: Trees<'_>, root: Blob) -> Result<Self> {
        let mut leaves = Self { nodes: HashMap::new(), groups: HashMap::new() };
        let mut todo = vec![(PathBuf::new(), root)];
        while let Some((path, blob)) = todo.pop() {
            for (name, node) in &trees.read(&blob)?.entries {
                let path = join(&path, name.as_bytes());
                match node {
                    Node::Directory(blob) => todo.push((path, *blob)),
                    leaf => {
                        if let Some(group) = leaf.link_group() {
                            leaves.groups.entry(group).or_default().insert(path.clone());
                        }
                        leaves.nodes.insert(path, leaf.clone());
                    }
                }
            }
        }
        Ok(leaves)
    }

    /// All names of the inode that `path` is a name of.
    fn fellows(&self, path: &Path, node: &Node) -> BTreeSet<PathBuf> {
        let group = node.link_group().and_then(|group| self.groups.get(&group));
        group.cloned().unwrap_or_else(|| BTreeSet::from([path.to_owned()]))
    }

    /// Whether each member of a group is as it was.
    fn group_is_alike(&self, fellows: &BTreeSet<PathBuf>, old: &Leaves, moves: &Moves) -> bool {
        fellows.iter().all(|fellow| {
            let before = moves.natural(fellow).and_then(|before| old.nodes.get(&before));
            before.is_some_and(|before| alike(before, &self.nodes[fellow]))
        })
    }
}

impl Moves {
    /// Whether what the old tree has at `before` is still there when its new parent has been put in place: nothing
    /// between the two was moved elsewhere.
    fn natural_is_there(&self, before: &Path, path: &Path) -> bool {
        for (old, new) in before.ancestors().zip(path.ancestors()).skip(1) {
            // Above a moved directory the two paths have nothing to do with each other.
            if self.source(new).is_some() {
                return true;
            }
            if self.takes(old) {
                return false;
            }
        }
        true
    }
}

/// Whether any leaf that differs is part of a group. What moves as a whole keeps its links.
fn in_difference(trees: Trees<'_>, moves: &Moves) -> Result<bool> {
    let root = Old { path: PathBuf::new(), blob: trees.from };
    let mut todo = vec![(Some(root), PathBuf::new(), Some(trees.to))];
    while let Some((old, path, new)) = todo.pop() {
        if old.as_ref().is_some_and(|old| Some(old.blob) == new && !moves.disturbs(&old.path)) {
            continue;
        }
        let read = |blob: Option<Blob>| blob.map_or_else(|| Ok(Arc::default()), |blob| trees.read(&blob));
        let (before, after) = (read(old.as_ref().map(|old| old.blob))?, read(new)?);
        let linked = |node: &Node, other: Option<&Node>| node.link_group().is_some() && other != Some(node);

        for (name, node) in &before.entries {
            let opposite = after.entries.get(name.as_bytes());
            if linked(node, opposite) {
                return Ok(true);
            }
            let below = join(&path, name.as_bytes());
            let stays = matches!(opposite, Some(Node::Directory(_))) && moves.source(&below).is_none();
            if let (Node::Directory(blob), Some(old), false) = (node, &old, stays) {
                let old = Old { path: join(&old.path, name.as_bytes()), blob: *blob };
                if !moves.takes(&old.path) {
                    todo.push((Some(old), below, None));
                }
            }
        }
        for (name, node) in &after.entries {
            let opposite = before.entries.get(name.as_bytes());
            if linked(node, opposite) {
                return Ok(true);
            }
            let Node::Directory(blob) = node else { continue };
            let below = join(&path, name.as_bytes());
            let source = match (moves.source(&below), opposite, &old) {
                (Some(moved), ..) => Some(Old { path: moved.path.clone(), blob: moved.blob }),
                (None, Some(Node::Directory(blob)), Some(old)) => {
                    Some(Old { path: join(&old.path, name.as_bytes()), blob: *blob })
                        .filter(|old| !moves.takes(&old.path))
                }
                _ => None,
            };
            todo.push((source, below, Some(*blob)));
        }
    }
    Ok(false)
}
