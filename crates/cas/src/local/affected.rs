//! Which pinned trees name a blob that is lost, and under which paths.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{Damage, LocalStore, Root};
use crate::{
    Blob, Digest, StoreError,
    store::Result,
    tree::{Directories, Directory, MAX_DEPTH, Node, walk::too_deep},
};

/// Directories remembered as whole, 32 bytes each and some. When there are more, they are forgotten and walked again.
const WHOLE_DIRECTORIES: usize = 1 << 20;

/// A pinned tree that names blobs that are lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Affected {
    /// The pin.
    pub root: Root,
    /// Where it names them. The root itself has the empty path; a directory stands for all below.
    pub paths: Vec<(PathBuf, Blob)>,
    /// How many paths there are beside those.
    pub more: u64,
}

impl LocalStore {
    /// The pinned trees that name one of `damages`, or a directory that is not there, with up to `limit` paths each.
    ///
    /// Subtrees that are whole are walked once, however many pins have them.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn affected(&self, damages: &[Damage], limit: usize) -> Result<Vec<Affected>> {
        affected(self, self.roots(None, None)?, damages, limit)
    }
}

/// As [`LocalStore::affected`], of any store with pins `roots`.
///
/// # Errors
/// Those of the store.
pub fn affected(store: &dyn Directories, roots: Vec<Root>, damages: &[Damage], limit: usize) -> Result<Vec<Affected>> {
    let lost: HashSet<Digest> = damages.iter().map(|damage| damage.blob.digest).collect();
    let mut search = Search { store, lost: &lost, limit, whole: HashSet::new() };
    let mut affected = Vec::new();
    for root in roots {
        let found = search.tree(root)?;
        if !found.paths.is_empty() {
            affected.push(found);
        }
    }
    Ok(affected)
}

struct Search<'a> {
    store: &'a dyn Directories,
    lost: &'a HashSet<Digest>,
    limit: usize,
    whole: HashSet<Digest>,
}

struct Level {
    digest: Digest,
    subdirectories: std::vec::IntoIter<(PathBuf, Blob)>,
    whole: bool,
}

impl Search<'_> {
    fn tree(&mut self, root: Root) -> Result<Affected> {
        let tree = root.tree;
        let mut affected = Affected { root, paths: Vec::new(), more: 0 };
        let mut stack: Vec<Level> = self.enter(PathBuf::new(), tree, &mut affected)?.into_iter().collect();
        while let Some(level) = stack.last_mut() {
            match level.subdirectories.next() {
                Some((_, blob)) if self.whole.contains(&blob.digest) => {}
                Some((path, blob)) => match self.enter(path, blob, &mut affected)? {
                    None => level.whole = false,
                    Some(_) if stack.len() >= MAX_DEPTH => return Err(too_deep(&tree)),
                    Some(below) => stack.push(below),
                },
                None => {
                    let Some(done) = stack.pop() else { break };
                    if done.whole {
                        self.remember(done.digest);
                    } else if let Some(above) = stack.last_mut() {
                        above.whole = false;
                    }
                }
            }
        }
        Ok(affected)
    }

    /// Looks at a directory itself; `None` when it is lost.
    fn enter(&self, path: PathBuf, blob: Blob, affected: &mut Affected) -> Result<Option<Level>> {
        let directory: Arc<Directory> = match self.store.directory(&blob) {
            Ok(directory) => directory,
            Err(StoreError::NotFound { .. } | StoreError::Corrupt { .. } | StoreError::NotADirectory { .. }) => {
                self.report(path, blob, affected);
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let mut whole = true;
        let mut subdirectories = Vec::new();
        for (name, node) in &directory.entries {
            let path = || path.join(Path::new(name.as_os_str()));
            match node {
                Node::Directory(blob) => subdirectories.push((path(), *blob)),
                Node::File { content, .. } if self.lost.contains(&content.digest) => {
                    whole = false;
                    self.report(path(), *content, affected);
                }
                _ => {}
            }
        }
        Ok(Some(Level { digest: blob.digest, subdirectories: subdirectories.into_iter(), whole }))
    }

    fn report(&self, path: PathBuf, blob: Blob, affected: &mut Affected) {
        if affected.paths.len() < self.limit {
            affected.paths.push((path, blob));
        } else {
            affected.more += 1;
        }
    }

    fn remember(&mut self, digest: Digest) {
        if self.whole.len() == WHOLE_DIRECTORIES {
            self.whole.clear();
        }
        self.whole.insert(digest);
    }
}
