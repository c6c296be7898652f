//! Moves trees between stores: only what is missing, in large batches, several in flight.
//!
//! [`upload_tree`] stores contents first, then directories from the leaves up, the root last. So a
//! directory that a store has is complete there, and an upload never looks below one that it finds.
//! For the same reason an upload that was cut off is resumed by doing it again. Where contents have to be looked for
//! first, [`upload_found`] sends them meanwhile.
//!
//! Memory: some [`IN_FLIGHT`] batches of [`BATCH_BYTES`], and the directories of the tree that are missing.

mod directories;
mod fetch;
mod upload;

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use bytes::Bytes;

pub use directories::{Differing, Extent, read_directories};
pub use fetch::{fetch_directories, fetch_listed, fetch_objects};
pub use upload::{upload_found, upload_tree};

use crate::{
    Blob, Store, StoreError,
    store::Result,
    tree::{Directories, Directory, MemoryDirectories},
};

/// Bytes of blobs sent in one message: gRPC's usual limit is 4 MiB, and names need room too.
pub const BATCH_BYTES: u64 = 7 << 19;
/// What a blob takes in a message beside its bytes: digest, sizes, tags.
pub const BLOB_OVERHEAD: u64 = 128;
/// Blobs asked about in one message.
pub const ASK_BLOBS: usize = 16 * 1024;
/// Batches on their way at one time.
pub const IN_FLIGHT: usize = 6;

/// Where to find the bytes of a blob without waiting for a network.
pub enum Object {
    /// In memory.
    Bytes(Bytes),
    /// In a file, from its first to its last byte.
    File(PathBuf),
}

/// A place that has contents of files.
pub trait Objects: Send + Sync {
    /// Where the contents of `blob` are.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] or what the place itself meets.
    fn object(&self, blob: &Blob) -> Result<Object>;
}

/// A place that has whole trees.
pub trait Source: Directories + Objects + 'static {}

impl<T: Directories + Objects + 'static> Source for T {}

/// How far a transfer has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Contents of files that were moved.
    pub files: u64,
    /// Contents of files that are to be moved.
    pub files_total: u64,
    /// Their bytes that were moved.
    pub bytes: u64,
    /// Their bytes that are to be moved.
    pub bytes_total: u64,
}

/// Hears of progress after every batch. It must not block.
pub type OnProgress<'a> = &'a (dyn Fn(Progress) + Send + Sync);

/// What a transfer moved; what was there already does not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transferred {
    /// Contents of files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Directory messages.
    pub directories: u64,
}

/// A tree whose directories are in memory and whose contents are files anywhere, for example a
/// folder that was scanned. The files must not change before they are moved; if they do, the
/// transfer fails, because their digests no longer agree.
#[derive(Debug, Default)]
pub struct FileSource {
    /// The directories.
    pub directories: MemoryDirectories,
    /// A file for every content.
    pub files: HashMap<Blob, PathBuf>,
}

impl Directories for FileSource {
    fn directory(&self, blob: &Blob) -> Result<Arc<Directory>> {
        self.directories.directory(blob)
    }
}

impl Objects for FileSource {
    fn object(&self, blob: &Blob) -> Result<Object> {
        if blob.is_empty() {
            return Ok(Object::Bytes(Bytes::new()));
        }
        self.files
            .get(blob)
            .map(|path| Object::File(path.clone()))
            .ok_or_else(|| StoreError::NotFound { blob: *blob, store: "the scanned files".to_owned() })
    }
}

/// Splits blobs into batches that fit a message, and those that are too large for one.
fn pack(blobs: impl IntoIterator<Item = Blob>) -> (Vec<Vec<Blob>>, Vec<Blob>) {
    let mut batches = Vec::new();
    let mut large = Vec::new();
    let mut batch = Vec::new();
    let mut bytes = 0;
    for blob in blobs {
        let cost = blob.size + BLOB_OVERHEAD;
        if cost > BATCH_BYTES {
            large.push(blob);
            continue;
        }
        if bytes + cost > BATCH_BYTES {
            batches.push(std::mem::take(&mut batch));
            bytes = 0;
        }
        bytes += cost;
        batch.push(blob);
    }
    if !batch.is_empty() {
        batches.push(batch);
    }
    (batches, large)
}

/// Runs of blobs for one message each, in their order; one that is too large for a message stands alone.
pub fn batches(blobs: impl IntoIterator<Item = Blob>) -> Vec<Vec<Blob>> {
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
///
/// # Errors
/// Those of the store.
pub async fn read_batch(batch: Vec<Blob>, from: &dyn Store) -> Result<Vec<(Blob, Bytes)>> {
    let data = match batch[..] {
        [blob] => vec![from.read(blob).await?],
        _ => from.read_batch(&batch).await?,
    };
    Ok(batch.into_iter().zip(data).collect())
}

/// Runs work that blocks on a thread that may.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(StoreError::Closed("the local side".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_fit_a_message_and_lose_nothing() {
        let sizes = [0, 1, 100, BATCH_BYTES, BATCH_BYTES - BLOB_OVERHEAD, 1 << 20];
        let blobs: Vec<Blob> = (0..5000u64)
            .map(|n| Blob { digest: crate::Digest::of(&n.to_le_bytes()), size: sizes[n as usize % sizes.len()] })
            .collect();
        let runs = batches(blobs.clone());
        let cost = |batch: &[Blob]| batch.iter().map(|b| b.size + BLOB_OVERHEAD).sum::<u64>();
        assert!(runs.iter().all(|run| run.len() == 1 || cost(run) <= BATCH_BYTES));
        assert_eq!(runs.concat(), blobs);
        let (batches, large) = pack(blobs.clone());
        for batch in &batches {
            assert!(!batch.is_empty() && cost(batch) <= BATCH_BYTES, "{}", cost(batch));
        }
        assert!(large.iter().all(|b| b.size == BATCH_BYTES));
        let mut all: Vec<Blob> = batches.into_iter().flatten().chain(large).collect();
        all.sort();
        let mut expected = blobs;
        expected.sort();
        assert_eq!(all, expected);
    }
}
