//! A store in memory: for tests, and the model that the other stores are compared with.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
    sync::{Arc, RwLock},
};

use async_trait::async_trait;
use bytes::Bytes;

use crate::{
    Blob, Store, StoreError,
    store::{Result, verify},
    transfer::{Object, Objects},
    tree::{Directories, Directory},
};

/// Blobs held in memory. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore(Arc<RwLock<HashMap<Blob, Bytes>>>);

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of blobs.
    pub fn len(&self) -> usize {
        self.map().len()
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds contents without waiting and returns their name.
    pub fn put(&self, data: impl Into<Bytes>) -> Blob {
        let data = data.into();
        let blob = Blob::of(&data);
        self.map_mut().insert(blob, data);
        blob
    }

    /// Adds a directory without waiting and returns its name.
    pub fn put_directory(&self, directory: &Directory) -> Blob {
        self.put(directory.encode())
    }

    /// Forgets a blob; says whether it was there.
    pub fn remove(&self, blob: &Blob) -> bool {
        self.map_mut().remove(blob).is_some()
    }

    fn get(&self, blob: &Blob) -> Result<Bytes> {
        if blob.is_empty() {
            return Ok(Bytes::new());
        }
        self.map().get(blob).cloned().ok_or_else(|| StoreError::NotFound { blob: *blob, store: "memory".to_owned() })
    }

    fn map(&self) -> std::sync::RwLockReadGuard<'_, HashMap<Blob, Bytes>> {
        self.0.read().unwrap_or_else(|e| e.into_inner())
    }

    fn map_mut(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<Blob, Bytes>> {
        self.0.write().unwrap_or_else(|e| e.into_inner())
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn find_missing(&self, blobs: &[Blob]) -> Result<Vec<Blob>> {
        let map = self.map();
        let mut seen = HashSet::new();
        Ok(blobs
            .iter()
            .copied()
            .filter(|blob| !blob.is_empty() && !map.contains_key(blob) && seen.insert(*blob))
            .collect())
    }

    async fn read(&self, blob: Blob) -> Result<Bytes> {
        self.get(&blob)
    }

    async fn read_batch(&self, blobs: &[Blob]) -> Result<Vec<Bytes>> {
        blobs.iter().map(|blob| self.get(blob)).collect()
    }

    async fn fetch_to(&self, blob: Blob, path: &Path) -> Result<()> {
        let data = self.get(&blob)?;
        let mut file = tokio::fs::File::create_new(path).await.map_err(StoreError::io("create", path))?;
        let written = async {
            tokio::io::AsyncWriteExt::write_all(&mut file, &data).await?;
            tokio::io::AsyncWriteExt::flush(&mut file).await
        }
        .await;
        if let Err(e) = written {
            let _ = tokio::fs::remove_file(path).await;
            return Err(StoreError::io("write", path)(e));
        }
        Ok(())
    }

    async fn write_batch(&self, blobs: Vec<(Blob, Bytes)>) -> Result<()> {
        for (blob, data) in blobs {
            verify(blob, &data)?;
            self.map_mut().insert(blob, data);
        }
        Ok(())
    }

    async fn write_file(&self, blob: Blob, path: &Path) -> Result<()> {
        let data = tokio::fs::read(path).await.map_err(StoreError::io("read", path))?;
        self.write_batch(vec![(blob, data.into())]).await
    }
}

impl Directories for MemoryStore {
    fn directory(&self, blob: &Blob) -> Result<Arc<Directory>> {
        let data = self.get(blob)?;
        let directory = Directory::decode(&data).map_err(|source| StoreError::NotADirectory { blob: *blob, source })?;
        Ok(Arc::new(directory))
    }

    fn directory_bytes(&self, blob: &Blob) -> Result<Bytes> {
        self.get(blob)
    }
}

impl Objects for MemoryStore {
    fn object(&self, blob: &Blob) -> Result<Object> {
        self.get(blob).map(Object::Bytes)
    }
}
