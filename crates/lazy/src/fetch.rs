//! Where contents come from.

use std::path::Path;

use aether_cas::{Blob, RemoteStore, Store, StoreError};
use async_trait::async_trait;
use bytes::Bytes;

/// A place that has contents. Callers set the limits of time.
#[async_trait]
pub trait Fetch: Send + Sync + 'static {
    /// Writes a content into a new file at `path`, from its beginning to its end, and verifies it. After an error nothing
    /// is left there.
    async fn fetch_to(&self, blob: Blob, path: &Path) -> Result<(), StoreError>;

    /// A part of a content, not verified.
    async fn read_range(&self, blob: Blob, offset: u64, length: u64) -> Result<Bytes, StoreError>;
}

#[async_trait]
impl Fetch for RemoteStore {
    async fn fetch_to(&self, blob: Blob, path: &Path) -> Result<(), StoreError> {
        Store::fetch_to(self, blob, path).await
    }

    async fn read_range(&self, blob: Blob, offset: u64, length: u64) -> Result<Bytes, StoreError> {
        RemoteStore::read_range(self, blob, offset, length).await
    }
}
