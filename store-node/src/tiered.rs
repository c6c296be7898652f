//! What the services work on: the node's disk, and behind it the durable tier where there is one.
//!
//! Without a durable tier this is the [`LocalStore`] and nothing else. As there, methods that are not
//! `async` block the thread; they must be called on a thread of a runtime that may block.

use aether_cas::{
    Blob, LocalStore, Store,
    local::{FsckReport, Ingest, Root, Statistics},
    store::Result,
};
use std::fs::File;

/// The store behind the services of a node. Clones share it.
#[derive(Clone, Debug)]
pub struct TieredStore {
    disk: LocalStore,
}

impl From<LocalStore> for TieredStore {
    fn from(disk: LocalStore) -> Self {
        Self { disk }
    }
}

impl TieredStore {
    /// The node's disk alone: what is here need not be all there is.
    pub fn disk(&self) -> &LocalStore {
        &self.disk
    }

    /// Which of `blobs` are not as durable as this store promises, each once, in the order asked.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn find_missing(&self, blobs: &[Blob]) -> Result<Vec<Blob>> {
        self.disk.find_missing(blobs).await
    }

    /// Whether the blob is as durable as this store promises.
    ///
    /// # Errors
    /// Those of the store.
    pub fn contains(&self, blob: &Blob) -> Result<bool> {
        self.disk.contains(blob)
    }

    /// Brings to the disk what of `blobs` only the durable tier has, in few requests. Call it before many reads.
    /// What is nowhere is left out: the read says so.
    ///
    /// # Errors
    /// Those of the durable tier.
    pub async fn bring(&self, _blobs: &[Blob]) -> Result<()> {
        Ok(())
    }

    /// The contents of a blob, verified.
    ///
    /// # Errors
    /// As [`LocalStore::read_blob`].
    pub fn read_blob(&self, blob: &Blob) -> Result<bytes::Bytes> {
        self.disk.read_blob(blob)
    }

    /// Opens a blob's file without verifying it; `None` for a blob that is kept inline, or is not there.
    ///
    /// # Errors
    /// Those of opening the file.
    pub fn open_object(&self, blob: &Blob) -> Result<Option<File>> {
        self.disk.open_object(blob)
    }

    /// Reads the copy on the disk to its end and drops it if it is damaged.
    ///
    /// # Errors
    /// As [`LocalStore::verify`].
    pub fn verify(&self, blob: &Blob) -> Result<()> {
        self.disk.verify(blob)
    }

    /// Stores many blobs, durable together when this returns.
    ///
    /// # Errors
    /// As [`Store::write_batch`].
    pub async fn write_batch(&self, blobs: Vec<(Blob, bytes::Bytes)>) -> Result<()> {
        self.disk.write_batch(blobs).await
    }

    /// Begins to store a blob in pieces; end it with [`TieredStore::finish`].
    ///
    /// # Errors
    /// Those of creating a file.
    pub fn begin(&self, blob: Blob) -> Result<Ingest> {
        self.disk.begin(blob)
    }

    /// Verifies a blob that came in pieces and makes it durable; returns when it is.
    ///
    /// # Errors
    /// As [`Ingest::finish`].
    pub async fn finish(&self, ingest: Ingest) -> Result<()> {
        ingest.finish().await
    }

    /// Pins `tree`; replaces what the same owner, kind and name had pinned.
    ///
    /// # Errors
    /// As [`LocalStore::pin`].
    pub fn pin(&self, owner_uid: &str, kind: &str, name: &str, tree: Blob) -> Result<()> {
        self.disk.pin(owner_uid, kind, name, tree)
    }

    /// Forgets roots. Returns how many there were.
    ///
    /// # Errors
    /// As [`LocalStore::unpin`].
    pub fn unpin(&self, owner_uid: &str, kind: Option<&str>, name: Option<&str>) -> Result<usize> {
        self.disk.unpin(owner_uid, kind, name)
    }

    /// The roots of an owner and kind, where given, in order of owner, kind and name.
    ///
    /// # Errors
    /// As [`LocalStore::roots`].
    pub fn roots(&self, owner_uid: Option<&str>, kind: Option<&str>) -> Result<Vec<Root>> {
        self.disk.roots(owner_uid, kind)
    }

    /// What the disk holds.
    pub fn statistics(&self) -> Statistics {
        self.disk.statistics()
    }

    /// Checks the disk and the roots.
    ///
    /// # Errors
    /// As [`LocalStore::fsck`].
    pub fn fsck(&self, repair: bool) -> Result<FsckReport> {
        self.disk.fsck(repair)
    }
}
