//! What every store can do, and how it fails.

use std::{
    io,
    path::{Path, PathBuf},
};

use async_trait::async_trait;
use bytes::Bytes;

use crate::{Blob, tree::TreeError};

/// Result of store operations.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// Why a store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store does not have the blob.
    #[error("blob {blob} is not in {store}")]
    NotFound {
        /// What was asked for.
        blob: Blob,
        /// Which store: "memory", a folder or an address.
        store: String,
    },
    /// The store's own copy does not match its digest. The copy is dropped: the blob counts as missing from now on.
    #[error("the copy of blob {blob} in {store} is damaged: {reason}")]
    Corrupt {
        /// What was asked for.
        blob: Blob,
        /// Which store.
        store: String,
        /// What was found instead.
        reason: String,
    },
    /// Data handed in or received does not match the blob it was said to be.
    #[error("data said to be blob {blob} is {found}")]
    Mismatch {
        /// What it should have been.
        blob: Blob,
        /// What it is.
        found: Blob,
    },
    /// A blob that should be a directory message is not one.
    #[error("blob {blob} is not a directory of a tree")]
    NotADirectory {
        /// The blob.
        blob: Blob,
        /// What is wrong with it.
        #[source]
        source: TreeError,
    },
    /// The operating system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The index (RocksDB) refused.
    #[error("cannot {action} in the index {}", path.display())]
    Index {
        /// What was tried.
        action: &'static str,
        /// The folder of the index.
        path: PathBuf,
        /// Why not.
        #[source]
        source: rocksdb::Error,
    },
    /// The index was written by another version.
    #[error(
        "the store {} has format {found:?}, this program knows format {known:?} only: use the program that wrote it, or start with an empty folder",
        path.display()
    )]
    UnknownFormat {
        /// The folder of the index.
        path: PathBuf,
        /// What the index says.
        found: String,
        /// What this program reads and writes.
        known: &'static str,
    },
    /// A remote store answered with an error, or not at all.
    #[error("cannot {action} at {store}: {message}")]
    Remote {
        /// What was tried, and with which blob.
        action: String,
        /// The address.
        store: String,
        /// What the store said.
        message: String,
        /// gRPC's status code.
        code: tonic::Code,
    },
    /// The bucket of the durable tier refused, or did not answer.
    #[error("cannot {action} {object}: {message}")]
    Bucket {
        /// What was tried.
        action: &'static str,
        /// Bucket and key.
        object: String,
        /// What the service said.
        message: String,
        /// Whether it may succeed later.
        transient: bool,
    },
    /// An address or option is not usable.
    #[error("{0}")]
    Invalid(String),
    /// The same is being done already, and must not be done twice at a time.
    #[error("{0}")]
    Busy(String),
    /// The store is shutting down.
    #[error("the store {0} is closed")]
    Closed(String),
}

impl StoreError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// Whether the blob is simply not there (or was damaged and is not there any more).
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::NotFound { .. } | Self::Corrupt { .. })
    }

    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Remote { code, .. } => matches!(
                code,
                tonic::Code::Unavailable
                    | tonic::Code::DeadlineExceeded
                    | tonic::Code::ResourceExhausted
                    | tonic::Code::Aborted
                    | tonic::Code::Cancelled
            ),
            Self::Bucket { transient, .. } => *transient,
            _ => false,
        }
    }
}

/// A place that holds blobs.
///
/// Everything handed in is verified before it is stored, and everything handed out is verified
/// before it is returned. A write returns when the blob is as durable as the store promises.
/// Writing a blob that is there already does nothing. The empty blob is always there.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Which of `blobs` the store does not have, each once, in the order asked.
    async fn find_missing(&self, blobs: &[Blob]) -> Result<Vec<Blob>>;

    /// The contents of one blob of any size, in memory.
    async fn read(&self, blob: Blob) -> Result<Bytes>;

    /// The contents of many blobs, in the order asked. The caller bounds the sum of their sizes.
    ///
    /// # Errors
    /// The first blob that cannot be had fails the call.
    async fn read_batch(&self, blobs: &[Blob]) -> Result<Vec<Bytes>>;

    /// Writes the contents of `blob` into a new file at `path` (which must not exist), in pieces, verified.
    /// The file is not synced. On an error nothing is left at `path`.
    async fn fetch_to(&self, blob: Blob, path: &Path) -> Result<()>;

    /// Stores one blob.
    async fn write(&self, blob: Blob, data: Bytes) -> Result<()> {
        self.write_batch(vec![(blob, data)]).await
    }

    /// Stores many blobs, made durable together. After an error any part of them may be stored.
    async fn write_batch(&self, blobs: Vec<(Blob, Bytes)>) -> Result<()>;

    /// Stores the contents of the file at `path`, read in pieces. The file is left as it is.
    async fn write_file(&self, blob: Blob, path: &Path) -> Result<()>;

    /// The encoded directories of the tree `root`, each once: those the store can send in bulk.
    ///
    /// An answer may be incomplete (a message limit, a directory that is missing): whoever calls
    /// it follows the tree from the root and reads what it did not get. The default sends nothing.
    async fn read_tree(&self, root: Blob) -> Result<Vec<(Blob, Bytes)>> {
        let _ = root;
        Ok(Vec::new())
    }
}

/// Checks `data` against the blob it is said to be.
///
/// # Errors
/// [`StoreError::Mismatch`].
pub fn verify(blob: Blob, data: &[u8]) -> Result<()> {
    let found = Blob::of(data);
    if found == blob { Ok(()) } else { Err(StoreError::Mismatch { blob, found }) }
}
