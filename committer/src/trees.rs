//! The directories that a comparison needs, in memory.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use aether_cas::transfer::{BATCH_BYTES, BLOB_OVERHEAD};
use aether_cas::tree::{Directories, Directory, MAX_DEPTH, MemoryDirectories, Name};
use aether_cas::{Blob, Store, StoreError};

/// What a repository is called.
const GIT: &[u8] = b".git";

/// Directories by name, without what git has no place for: its own.
#[derive(Default)]
pub(crate) struct Trees {
    directories: HashMap<Blob, Arc<Directory>>,
    repositories: HashSet<Blob>,
}

/// Two directories of one path.
type Pair = (Option<Blob>, Option<Blob>);

impl Trees {
    /// Reads the directories in which two trees differ, level by level, so that the cost follows the change. What is
    /// called `.git` is not read.
    pub(crate) async fn differing(store: &dyn Store, old: Blob, new: Blob) -> Result<Self, StoreError> {
        let mut trees = Self::default();
        let mut seen = HashSet::new();
        let mut level: Vec<Pair> = vec![(Some(old), Some(new))];
        for _ in 0..=MAX_DEPTH {
            level.retain(|pair| pair.0 != pair.1 && seen.insert(*pair));
            if level.is_empty() {
                return Ok(trees);
            }
            let mut once = HashSet::new();
            let wanted = level.iter().flat_map(|(old, new)| [*old, *new]).flatten();
            let wanted = wanted.filter(|blob| !trees.directories.contains_key(blob) && once.insert(*blob)).collect();
            trees.read(store, wanted).await?;
            level = level.iter().flat_map(|pair| trees.below(*pair)).collect();
        }
        Err(StoreError::Invalid(format!("tree {new} is deeper than {MAX_DEPTH} directories")))
    }

    async fn read(&mut self, store: &dyn Store, blobs: Vec<Blob>) -> Result<(), StoreError> {
        for batch in batches(blobs) {
            for (blob, data) in batch.iter().zip(read_batch(store, &batch).await?) {
                let mut directory =
                    Directory::decode(&data).map_err(|source| StoreError::NotADirectory { blob: *blob, source })?;
                if directory.entries.remove(GIT).is_some() {
                    self.repositories.insert(*blob);
                }
                self.directories.insert(*blob, Arc::new(directory));
            }
        }
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

    /// Whether this directory holds a repository.
    pub(crate) fn is_repository(&self, blob: &Blob) -> bool {
        self.repositories.contains(blob)
    }
}

impl Directories for Trees {
    fn directory(&self, blob: &Blob) -> Result<Arc<Directory>, StoreError> {
        let found = self.directories.get(blob).cloned();
        found.ok_or_else(|| StoreError::NotFound { blob: *blob, store: "the directories that differ".into() })
    }
}

/// Reads all directories of a tree.
pub(crate) async fn whole(store: &dyn Store, root: Blob) -> Result<MemoryDirectories, StoreError> {
    let directories = MemoryDirectories::new();
    let mut bulk: HashMap<Blob, bytes::Bytes> = store.read_tree(root).await?.into_iter().collect();
    let mut seen = HashSet::from([root]);
    let mut level = vec![root];
    for _ in 0..=MAX_DEPTH {
        let mut messages = Vec::new();
        let mut missing = Vec::new();
        for blob in std::mem::take(&mut level) {
            match bulk.remove(&blob) {
                Some(message) => messages.push((blob, message)),
                None => missing.push(blob),
            }
        }
        for batch in batches(missing) {
            let read = read_batch(store, &batch).await?;
            messages.extend(batch.into_iter().zip(read));
        }
        for (blob, message) in messages {
            let directory = Directory::decode(&message).map_err(|source| StoreError::NotADirectory { blob, source })?;
            level.extend(directory.subdirectories().map(|(_, below)| below).filter(|below| seen.insert(*below)));
            directories.insert(directory);
        }
        if level.is_empty() {
            return Ok(directories);
        }
    }
    Err(StoreError::Invalid(format!("tree {root} is deeper than {MAX_DEPTH} directories")))
}

/// Runs of blobs that fit a message; one that is larger stands alone.
pub(crate) fn batches(blobs: Vec<Blob>) -> Vec<Vec<Blob>> {
    let mut batches: Vec<Vec<Blob>> = Vec::new();
    let mut bytes = 0;
    for blob in blobs {
        let cost = blob.size + BLOB_OVERHEAD;
        match batches.last_mut() {
            Some(batch) if bytes + cost <= BATCH_BYTES => batch.push(blob),
            _ => {
                bytes = 0;
                batches.push(vec![blob]);
            }
        }
        bytes += cost;
    }
    batches
}

/// The contents of a batch.
pub(crate) async fn read_batch(store: &dyn Store, batch: &[Blob]) -> Result<Vec<bytes::Bytes>, StoreError> {
    match batch {
        [blob] => Ok(vec![store.read(*blob).await?]),
        _ => store.read_batch(batch).await,
    }
}
