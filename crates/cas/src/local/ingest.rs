//! A blob that arrives in pieces.

use bytes::Bytes;
use tokio::sync::oneshot;

use super::{LocalStore, Writes, files::TemporaryFile};
use crate::{Blob, Digest, StoreError, digest::BlobHasher, store::Result};

/// A blob being written. Nothing of it is visible before [`Ingest::finish`]; dropping it forgets it.
pub struct Ingest {
    store: LocalStore,
    size: u64,
    /// Not known yet for a blob that its client calls by another digest function.
    digest: Option<Digest>,
    hasher: BlobHasher,
    sink: Sink,
}

enum Sink {
    Memory(Vec<u8>),
    File(TemporaryFile),
}

impl Ingest {
    pub(super) fn new(store: LocalStore, size: u64, digest: Option<Digest>) -> Result<Self> {
        let sink = if size <= store.shared.inline_limit {
            Sink::Memory(Vec::new())
        } else {
            Sink::File(store.shared.files.create_temporary()?)
        };
        Ok(Self { store, size, digest, hasher: BlobHasher::new(), sink })
    }

    /// What it is to become; of a blob that was begun unnamed, what the bytes taken so far are.
    pub fn blob(&self) -> Blob {
        self.digest.map_or_else(|| self.hasher.finish(), |digest| Blob { digest, size: self.size })
    }

    /// Bytes taken so far.
    pub fn written(&self) -> u64 {
        self.hasher.size()
    }

    /// Takes the next piece.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] when the blob gets longer than its size, and those of the disk.
    pub fn append(&mut self, data: &[u8]) -> Result<()> {
        let length = self.written() + data.len() as u64;
        if length > self.size {
            let size = self.size;
            return Err(StoreError::Invalid(format!("{length} bytes or more were sent of {size}")));
        }
        match &mut self.sink {
            Sink::Memory(bytes) => bytes.extend_from_slice(data),
            Sink::File(file) => file.write(data)?,
        }
        self.hasher.update(data);
        Ok(())
    }

    /// Verifies the whole and makes it durable; returns when it is.
    ///
    /// # Errors
    /// [`StoreError::Mismatch`] and those of the disk. In each case the blob is forgotten.
    pub async fn finish(self) -> Result<()> {
        let store = self.store.clone();
        let committed: oneshot::Receiver<_> = self.submit()?;
        committed.await.unwrap_or_else(|_| Err(store.closed()))
    }

    fn submit(self) -> Result<oneshot::Receiver<Result<()>>> {
        let found = self.hasher.finish();
        let blob = Blob { digest: self.digest.unwrap_or(found.digest), size: self.size };
        if found != blob {
            return Err(StoreError::Mismatch { blob, found });
        }
        let mut writes = Writes::default();
        match self.sink {
            // The empty blob is there without being stored.
            Sink::Memory(bytes) if bytes.is_empty() => {}
            Sink::Memory(bytes) => writes.inline.push((blob, Bytes::from(bytes))),
            Sink::File(file) if blob.is_empty() => drop(file),
            Sink::File(file) => writes.files.push((blob, file.into_path())),
        }
        Ok(self.store.committer.submit(writes))
    }
}
