//! Two trees -> the steps that turn one into the other.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aether_cas::Blob;
use aether_cas::tree::{Directories, Directory, Node};

use super::links::{Links, Rewrite};
use super::moves::Moves;
use super::{Plan, Step};
use crate::draft::in_group;
use crate::error::{Error, Result};
use crate::walk::join;

/// Reads messages of both trees.
#[derive(Clone, Copy)]
pub(super) struct Trees<'a> {
    pub(super) from: Blob,
    pub(super) to: Blob,
    directories: &'a dyn Directories,
}

impl Trees<'_> {
    pub(super) fn read(&self, blob: &Blob) -> Result<Arc<Directory>> {
        self.directories.directory(blob).map_err(|error| Error::store(format!("read directory {blob}"), error))
    }
}

/// Whether two entries are the same apart from the number of their hard-link group.
pub(super) fn alike(a: &Node, b: &Node) -> bool {
    a == b || in_group(a.clone(), None) == in_group(b.clone(), None)
}

/// A directory of the old tree.
pub(super) struct Old {
    pub(super) path: PathBuf,
    pub(super) blob: Blob,
}

pub(super) fn make(from: &Blob, to: &Blob, directories: &dyn Directories) -> Result<Plan> {
    if from == to {
        return Ok(Plan::default());
    }
    let trees = Trees { from: *from, to: *to, directories };
    let moves = Moves::find(trees)?;
    let links = Links::find(trees, &moves)?;

    let mut planner = Planner {
        trees,
        moves: &moves,
        links: &links,
        plan: Plan::default(),
        numbers: HashMap::new(),
        late: Vec::new(),
    };
    planner.put_aside();
    let root = Old { path: PathBuf::new(), blob: *from };
    planner.directory(Some(root), PathBuf::new(), *to)?;
    let mut plan = planner.plan;
    planner.late.into_iter().for_each(|link| plan.push(link));
    Ok(plan)
}

struct Planner<'a> {
    trees: Trees<'a>,
    moves: &'a Moves,
    links: &'a Links,
    plan: Plan,
    /// Numbers of directories put aside, by where the old tree has them.
    numbers: HashMap<PathBuf, usize>,
    /// Links, made when everything they lead to is there.
    late: Vec<Step>,
}

impl Planner<'_> {
    /// Inner directories first, so that each is still where the old tree has it.
    fn put_aside(&mut self) {
        let mut moved: Vec<&PathBuf> = self.moves.sources().collect();
        moved.sort_by_key(|path| (std::cmp::Reverse(path.components().count()), *path));
        for (number, from) in moved.into_iter().enumerate() {
            self.numbers.insert(from.clone(), number);
            self.plan.push(Step::Aside { from: from.clone(), number });
        }
    }

    /// Turns `old` into `new`, the directory that is to be at `path`. Its place has been made before.
    fn directory(&mut self, old: Option<Old>, path: PathBuf, new: Blob) -> Result<()> {
        // Not recursive: trees may be deeper than a thread's stack.
        let mut todo = vec![(old, path, new)];
        while let Some((old, path, new)) = todo.pop() {
            let unchanged = old.as_ref().is_some_and(|old| old.blob == new && !self.moves.disturbs(&old.path));
            if unchanged && !self.links.touch(&path) {
                continue;
            }
            let next = self.entries(old, &path, new)?;
            todo.extend(next.into_iter().rev());
        }
        Ok(())
    }

    /// Plans one directory; returns those in it that need a look.
    fn entries(&mut self, old: Option<Old>, path: &Path, new: Blob) -> Result<Vec<(Option<Old>, PathBuf, Blob)>> {
        let directory = self.trees.read(&new)?;
        let before = match &old {
            Some(old) => self.trees.read(&old.blob)?,
            None => Arc::default(),
        };
        let old_path = old.as_ref().map(|old| old.path.as_path());
        let kept = |name: &[u8]| -> Option<Old> {
            let Some(Node::Directory(blob)) = before.entries.get(name) else { return None };
            let path = join(old_path?, name);
            (!self.moves.takes(&path)).then_some(Old { path, blob: *blob })
        };

        for (name, node) in &before.entries {
            let below = join(path, name.as_bytes());
            let stays = match (node, directory.entries.get(name.as_bytes())) {
                (_, None) => false,
                (Node::Directory(_), Some(Node::Directory(_))) => self.moves.source(&below).is_none(),
                (Node::Directory(_), Some(_)) | (_, Some(Node::Directory(_))) => false,
                // A rename replaces it.
                (_, Some(_)) => true,
            };
            let gone = matches!(node, Node::Directory(_)) && kept(name.as_bytes()).is_none();
            if !stays && !gone {
                self.plan.push(Step::Remove { path: below });
            }
        }

        let mut next = Vec::new();
        for (name, node) in &directory.entries {
            let below = join(path, name.as_bytes());
            let Node::Directory(blob) = node else {
                self.leaf(below, before.entries.get(name.as_bytes()), node);
                continue;
            };
            let source = match self.moves.source(&below) {
                Some(moved) => {
                    let number = self.numbers[&moved.path];
                    self.plan.push(Step::Place { number, to: below.clone() });
                    Some(Old { path: moved.path.clone(), blob: moved.blob })
                }
                None => kept(name.as_bytes()),
            };
            if source.is_none() {
                self.plan.push(Step::MakeDirectory { path: below.clone() });
            }
            next.push((source, below, *blob));
        }
        self.plan.directories.push((path.to_owned(), directory.attributes.clone()));
        Ok(next)
    }

    fn leaf(&mut self, path: PathBuf, before: Option<&Node>, node: &Node) {
        match self.links.rewrite(&path) {
            Some(Rewrite::Link { first }) => return self.late.push(Step::Link { first: first.clone(), path }),
            Some(Rewrite::Afresh) => {}
            None => match before {
                Some(before) if alike(before, node) => return,
                Some(before) if same_content(before, node) => {
                    let attributes = node.attributes().cloned().unwrap_or_default();
                    return self.plan.push(Step::Attributes { path, attributes });
                }
                _ => {}
            },
        }
        match node.clone() {
            Node::Directory(_) => unreachable!("the caller knows it for a leaf"),
            Node::File { content, attributes, .. } => self.plan.push(Step::File { path, content, attributes }),
            Node::Symlink { target, attributes, .. } => self.plan.push(Step::Symlink { path, target, attributes }),
            Node::Fifo { attributes, .. } => self.plan.push(Step::Fifo { path, attributes }),
        }
    }
}

/// Whether only attributes differ.
fn same_content(a: &Node, b: &Node) -> bool {
    match (a, b) {
        (Node::File { content: a, .. }, Node::File { content: b, .. }) => a == b,
        (Node::Symlink { target: a, .. }, Node::Symlink { target: b, .. }) => a == b,
        (Node::Fifo { .. }, Node::Fifo { .. }) => true,
        _ => false,
    }
}
