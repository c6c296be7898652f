//! Ways over a whole tree, without recursion, so that depth costs no stack.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{Directories, Directory, MAX_DEPTH, Node};
use crate::{Blob, StoreError};

/// Counts of a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Regular files.
    pub files: u64,
    /// Directories, the root included.
    pub directories: u64,
    /// Symlinks and fifos.
    pub others: u64,
    /// Sum of the sizes of the regular files, in bytes.
    pub bytes: u64,
}

/// Visits every entry of the tree `root` in order of path, parents first; the root itself is not an entry.
///
/// # Errors
/// Those of `directories` and of `visit`; [`StoreError::Invalid`] for a tree deeper than [`MAX_DEPTH`].
pub fn walk<E: From<StoreError>>(
    root: &Blob,
    directories: &dyn Directories,
    mut visit: impl FnMut(&Path, &Node) -> Result<(), E>,
) -> Result<(), E> {
    struct Level {
        directory: Arc<Directory>,
        last: Option<super::Name>,
    }
    let mut path = PathBuf::new();
    let mut stack = vec![Level { directory: directories.directory(root)?, last: None }];
    while let Some(level) = stack.last_mut() {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = level.last.as_ref().map_or(Unbounded, Excluded);
        let Some((name, node)) = level.directory.entries.range::<super::Name, _>((from, Unbounded)).next() else {
            stack.pop();
            path.pop();
            continue;
        };
        let (name, node) = (name.clone(), node.clone());
        level.last = Some(name.clone());
        path.push(name.as_os_str());
        visit(&path, &node)?;
        match node {
            Node::Directory(blob) => {
                if stack.len() >= MAX_DEPTH {
                    return Err(too_deep(root).into());
                }
                stack.push(Level { directory: directories.directory(&blob)?, last: None });
            }
            _ => {
                path.pop();
            }
        }
    }
    Ok(())
}

/// Counts the entries of the tree `root`.
///
/// # Errors
/// Those of `directories`.
pub fn summary(root: &Blob, directories: &dyn Directories) -> Result<Summary, StoreError> {
    let mut summary = Summary { directories: 1, ..Default::default() };
    walk(root, directories, |_, node| {
        match node {
            Node::Directory(_) => summary.directories += 1,
            Node::File { content, .. } => {
                summary.files += 1;
                summary.bytes += content.size;
            }
            Node::Symlink { .. } | Node::Fifo { .. } => summary.others += 1,
        }
        Ok::<(), StoreError>(())
    })?;
    Ok(summary)
}

/// All directories of the tree `root`, each once, children before their parents; those for which
/// `prune` says yes are left out with all below them.
///
/// # Errors
/// Those of `directories`; [`StoreError::Invalid`] for a tree deeper than [`MAX_DEPTH`].
pub fn bottom_up(
    root: &Blob,
    directories: &dyn Directories,
    prune: impl Fn(&Blob) -> bool,
) -> Result<Vec<(Blob, Arc<Directory>)>, StoreError> {
    struct Open {
        blob: Blob,
        directory: Arc<Directory>,
        children: std::vec::IntoIter<Blob>,
    }
    let open = |blob: Blob| -> Result<Open, StoreError> {
        let directory = directories.directory(&blob)?;
        let children: Vec<Blob> = directory.subdirectories().map(|(_, b)| b).collect();
        Ok(Open { blob, directory, children: children.into_iter() })
    };
    let mut seen = HashSet::new();
    let mut done = Vec::new();
    if prune(root) {
        return Ok(done);
    }
    seen.insert(*root);
    let mut stack = vec![open(*root)?];
    while let Some(top) = stack.last_mut() {
        match top.children.next() {
            Some(child) if seen.contains(&child) || prune(&child) => {}
            Some(_) if stack.len() >= MAX_DEPTH => return Err(too_deep(root)),
            Some(child) => {
                seen.insert(child);
                stack.push(open(child)?);
            }
            None => {
                if let Some(open) = stack.pop() {
                    done.push((open.blob, open.directory));
                }
            }
        }
    }
    Ok(done)
}

pub(crate) fn too_deep(root: &Blob) -> StoreError {
    StoreError::Invalid(format!("tree {root} is deeper than {MAX_DEPTH} directories"))
}
