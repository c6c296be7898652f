//! What changed between two trees, as git sees it: regular files with their execute bit, and symlinks.
//!
//! Only directories that differ are read, so the cost follows the change. Directories, fifos, times, owners and extended
//! attributes are nothing to git and are left out, and so is everything called `.git` unless it is asked for.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use aether_cas::tree::{self, Directories, Directory, MAX_DEPTH, Node};
use aether_cas::{Blob, Store, StoreError};

/// Directory messages asked for in one call: their sum, in bytes. Well below the message limit of the store's protocol.
const BATCH_BYTES: u64 = 2 << 20;

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
        let directories = Loaded::differing(store, old, new, options).await?;
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

/// The directories that a comparison needs, without what is not to be compared.
struct Loaded(HashMap<Blob, Arc<Directory>>);

impl Loaded {
    /// Reads the directories in which two trees differ, level by level.
    async fn differing(store: &dyn Store, old: Blob, new: Blob, options: Options) -> Result<Self, Error> {
        let mut loaded = Self(HashMap::new());
        let mut bytes = 0;
        let mut seen = HashSet::new();
        let mut level = vec![(Some(old), Some(new))];
        for _ in 0..=MAX_DEPTH {
            level.retain(|pair| pair.0 != pair.1 && seen.insert(*pair));
            if level.is_empty() {
                return Ok(loaded);
            }
            let mut missing = HashSet::new();
            let wanted = level.iter().flat_map(|(old, new)| [*old, *new]).flatten();
            let wanted: Vec<Blob> =
                wanted.filter(|blob| !loaded.0.contains_key(blob) && missing.insert(*blob)).collect();
            bytes += wanted.iter().map(|blob| blob.size).sum::<u64>();
            if bytes > options.directory_bytes {
                return Err(Error::TooLarge { limit: options.directory_bytes });
            }
            for batch in batches(&wanted, BATCH_BYTES) {
                for (blob, data) in batch.iter().zip(store.read_batch(batch).await?) {
                    let mut directory =
                        Directory::decode(&data).map_err(|source| StoreError::NotADirectory { blob: *blob, source })?;
                    if !options.git {
                        directory.entries.retain(|name, _| name.as_bytes() != b".git");
                    }
                    loaded.0.insert(*blob, Arc::new(directory));
                }
            }
            level = level.iter().flat_map(|pair| loaded.below(*pair)).collect();
        }
        Err(StoreError::Invalid(format!("tree {new} is deeper than {MAX_DEPTH} directories")).into())
    }

    /// The pairs of directories of one name in a pair of directories.
    fn below(&self, (old, new): (Option<Blob>, Option<Blob>)) -> Vec<(Option<Blob>, Option<Blob>)> {
        let mut pairs: HashMap<&tree::Name, (Option<Blob>, Option<Blob>)> = HashMap::new();
        let entries = |blob: Option<Blob>| blob.and_then(|blob| self.0.get(&blob));
        for (name, blob) in entries(old).into_iter().flat_map(|directory| directory.subdirectories()) {
            pairs.entry(name).or_default().0 = Some(blob);
        }
        for (name, blob) in entries(new).into_iter().flat_map(|directory| directory.subdirectories()) {
            pairs.entry(name).or_default().1 = Some(blob);
        }
        pairs.into_values().collect()
    }
}

impl Directories for Loaded {
    fn directory(&self, blob: &Blob) -> Result<Arc<Directory>, StoreError> {
        self.0
            .get(blob)
            .cloned()
            .ok_or_else(|| StoreError::NotFound { blob: *blob, store: "the directories that differ".into() })
    }
}

/// Runs of blobs whose sizes add up to at most `limit`; a blob above it stands alone.
pub(crate) fn batches(blobs: &[Blob], limit: u64) -> Vec<&[Blob]> {
    let mut batches = Vec::new();
    let mut start = 0;
    let mut sum = 0;
    for (index, blob) in blobs.iter().enumerate() {
        if sum + blob.size > limit && index > start {
            batches.push(&blobs[start..index]);
            (start, sum) = (index, 0);
        }
        sum += blob.size;
    }
    if start < blobs.len() {
        batches.push(&blobs[start..]);
    }
    batches
}

#[cfg(test)]
mod tests {
    use aether_cas::Digest;

    use super::*;

    #[test]
    fn batches_are_bounded() {
        let blob = |size| Blob { digest: Digest::EMPTY, size };
        let blobs = [blob(3), blob(3), blob(3), blob(20), blob(1)];
        let sizes: Vec<Vec<u64>> =
            batches(&blobs, 7).iter().map(|batch| batch.iter().map(|blob| blob.size).collect()).collect();
        assert_eq!(sizes, [vec![3, 3], vec![3], vec![20], vec![1]]);
        assert!(batches(&[], 7).is_empty());
    }
}
