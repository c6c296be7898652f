//! A store that counts what is written to it.

use std::path::Path;
use std::sync::Mutex;

use aether_cas::store::Result;
use aether_cas::{Blob, MemoryStore, Store};
use async_trait::async_trait;
use bytes::Bytes;

#[derive(Default)]
pub(crate) struct Counting {
    pub(crate) store: MemoryStore,
    written: Mutex<Vec<Blob>>,
}

impl Counting {
    /// What was written since it was asked last.
    pub(crate) fn take_written(&self) -> Vec<Blob> {
        std::mem::take(&mut self.written.lock().unwrap())
    }
}

#[async_trait]
impl Store for Counting {
    async fn find_missing(&self, blobs: &[Blob]) -> Result<Vec<Blob>> {
        self.store.find_missing(blobs).await
    }

    async fn read(&self, blob: Blob) -> Result<Bytes> {
        self.store.read(blob).await
    }

    async fn read_batch(&self, blobs: &[Blob]) -> Result<Vec<Bytes>> {
        self.store.read_batch(blobs).await
    }

    async fn fetch_to(&self, blob: Blob, path: &Path) -> Result<()> {
        self.store.fetch_to(blob, path).await
    }

    async fn write_batch(&self, blobs: Vec<(Blob, Bytes)>) -> Result<()> {
        self.written.lock().unwrap().extend(blobs.iter().map(|(blob, _)| *blob));
        self.store.write_batch(blobs).await
    }

    async fn write_file(&self, blob: Blob, path: &Path) -> Result<()> {
        self.written.lock().unwrap().push(blob);
        self.store.write_file(blob, path).await
    }
}
