//! Directories of a store in memory: all of a tree, or those in which two trees differ.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;

use super::{batches, read_batch};
use crate::{
    Blob, Store, StoreError,
    store::Result,
    tree::{Directories, Directory, MAX_DEPTH, MemoryDirectories, Name, walk::too_deep},
};

/// The directories in which two trees differ, which is all that a comparison needs.
#[derive(Debug, Default)]
pub struct Differing {
    directories: HashMap<Blob, Arc<Directory>>,
    /// Those that had an entry of the name that is left out.
    shortened: HashSet<Blob>,
}

/// What is read of two trees.
#[derive(Clone, Copy, Debug)]
pub struct Extent<'a> {
    /// Entries of this name are taken for absent, and nothing below them is read.
    pub without: Option<&'a [u8]>,
    /// The most bytes of directory messages.
    pub bytes: u64,
}

/// Two directories of one path.
type Pair = (Option<Blob>, Option<Blob>);

impl Differing {
    /// Reads them level by level, so that the cost follows the change. `None` when there is more than `extent` allows.
    ///
    /// # Errors
    /// Those of the store; [`StoreError::NotADirectory`] and [`StoreError::Invalid`] for trees that break the rules.
    pub async fn read(store: &dyn Store, old: Blob, new: Blob, extent: Extent<'_>) -> Result<Option<Self>> {
        let mut found = Self::default();
        let mut bytes = 0;
        let mut seen = HashSet::new();
        let mut level: Vec<Pair> = vec![(Some(old), Some(new))];
        for _ in 0..=MAX_DEPTH {
            level.retain(|pair| pair.0 != pair.1 && seen.insert(*pair));
            if level.is_empty() {
                return Ok(Some(found));
            }
            let mut once = HashSet::new();
            let wanted = level.iter().flat_map(|(old, new)| [*old, *new]).flatten();
            let wanted: Vec<Blob> =
                wanted.filter(|blob| !found.directories.contains_key(blob) && once.insert(*blob)).collect();
            bytes += wanted.iter().map(|blob| blob.size).sum::<u64>();
            if bytes > extent.bytes {
                return Ok(None);
            }
            for batch in batches(wanted) {
                for (blob, message) in read_batch(batch, store).await? {
                    found.add(blob, &message, extent.without)?;
                }
            }
            level = level.iter().flat_map(|pair| found.below(*pair)).collect();
        }
        Err(too_deep(&new))
    }

    fn add(&mut self, blob: Blob, message: &Bytes, without: Option<&[u8]>) -> Result<()> {
        let mut directory = decode(blob, message)?;
        let all = directory.entries.len();
        directory.entries.retain(|name, _| Some(name.as_bytes()) != without);
        if directory.entries.len() < all {
            self.shortened.insert(blob);
        }
        self.directories.insert(blob, Arc::new(directory));
        Ok(())
    }

    /// The pairs of directories of one name in a pair of directories.
    fn below(&self, (old, new): Pair) -> Vec<Pair> {
        let below = |blob: Option<Blob>| {
            let directory = blob.and_then(|blob| self.directories.get(&blob));
            directory.into_iter().flat_map(|directory| directory.subdirectories())
        };
        let mut pairs: HashMap<&Name, Pair> = HashMap::new();
        for (name, blob) in below(old) {
            pairs.entry(name).or_default().0 = Some(blob);
        }
        for (name, blob) in below(new) {
            pairs.entry(name).or_default().1 = Some(blob);
        }
        pairs.into_values().collect()
    }

    /// Whether this directory has an entry of the name that is left out.
    pub fn is_shortened(&self, blob: &Blob) -> bool {
        self.shortened.contains(blob)
    }
}

impl Directories for Differing {
    fn directory(&self, blob: &Blob) -> Result<Arc<Directory>> {
        let found = self.directories.get(blob).cloned();
        found.ok_or_else(|| StoreError::NotFound { blob: *blob, store: "the directories that differ".into() })
    }
}

/// Reads all directories of a tree.
///
/// # Errors
/// As [`Differing::read`].
pub async fn read_directories(store: &dyn Store, root: Blob) -> Result<MemoryDirectories> {
    let directories = MemoryDirectories::new();
    let mut bulk: HashMap<Blob, Bytes> = store.read_tree(root).await?.into_iter().collect();
    let mut seen = HashSet::from([root]);
    let mut level = vec![root];
    for _ in 0..=MAX_DEPTH {
        let (mut messages, mut missing) = (Vec::new(), Vec::new());
        for blob in std::mem::take(&mut level) {
            match bulk.remove(&blob) {
                Some(message) => messages.push((blob, message)),
                None => missing.push(blob),
            }
        }
        for batch in batches(missing) {
            messages.extend(read_batch(batch, store).await?);
        }
        for (blob, message) in messages {
            let directory = decode(blob, &message)?;
            level.extend(directory.subdirectories().map(|(_, below)| below).filter(|below| seen.insert(*below)));
            directories.insert(directory);
        }
        if level.is_empty() {
            return Ok(directories);
        }
    }
    Err(too_deep(&root))
}

fn decode(blob: Blob, message: &Bytes) -> Result<Directory> {
    Directory::decode(message).map_err(|source| StoreError::NotADirectory { blob, source })
}
