//! Decoded directories that were read lately, so that walks over one tree decode it once.
//!
//! Two generations: when the young one is full, it becomes the old one and the old one goes.
//! What is used moves to the young one. No more than two times [`GENERATION_ENTRIES`] entries of
//! directories are kept: some tens of MiB.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
};

use crate::{Blob, tree::Directory};

/// Directory entries in one generation; an entry takes some 200 bytes.
const GENERATION_ENTRIES: usize = 64 * 1024;

#[derive(Default)]
pub(super) struct DirectoryCache(Mutex<Generations>);

#[derive(Default)]
struct Generations {
    young: HashMap<Blob, Arc<Directory>>,
    young_entries: usize,
    old: HashMap<Blob, Arc<Directory>>,
}

impl DirectoryCache {
    pub(super) fn get(&self, blob: &Blob) -> Option<Arc<Directory>> {
        let mut generations = self.lock();
        if let Some(directory) = generations.young.get(blob) {
            return Some(directory.clone());
        }
        let directory = generations.old.remove(blob)?;
        generations.put(*blob, directory.clone());
        Some(directory)
    }

    pub(super) fn put(&self, blob: Blob, directory: Arc<Directory>) {
        self.lock().put(blob, directory);
    }

    pub(super) fn clear(&self) {
        *self.lock() = Generations::default();
    }

    fn lock(&self) -> MutexGuard<'_, Generations> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Generations {
    fn put(&mut self, blob: Blob, directory: Arc<Directory>) {
        let entries = directory.entries.len() + 1;
        if self.young_entries + entries > GENERATION_ENTRIES {
            self.old = std::mem::take(&mut self.young);
            self.young_entries = 0;
        }
        self.young_entries += entries;
        self.young.insert(blob, directory);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Attributes;

    #[test]
    fn keeps_what_is_used_and_forgets_the_rest() {
        let cache = DirectoryCache::default();
        let directory =
            |mode| Arc::new(Directory { attributes: Attributes { mode, ..Default::default() }, ..Default::default() });
        let blob = |n: usize| Blob::of(&n.to_le_bytes());
        cache.put(blob(0), directory(1));
        for n in 1..GENERATION_ENTRIES * 3 {
            cache.put(blob(n), directory(2));
            assert!(cache.get(&blob(0)).is_some(), "used all the time");
        }
        assert!(cache.get(&blob(1)).is_none());
        let generations = cache.lock();
        assert!(generations.young.len() + generations.old.len() <= 2 * GENERATION_ENTRIES);
    }
}
