//! Uploads that have begun and not ended: kept for clients that come back, and collected when none does.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use aether_cas::{Blob, ContentName, Sha256Blob, StoreError, local::Ingest, sha256::Sha256Hasher};
use tokio::{sync::OwnedMutexGuard, time::Instant};
use tonic::Status;

use super::{blocking, mismatch, status};
use crate::tiered::TieredStore;

/// How long an upload without a client is kept.
pub(crate) const KEEP: Duration = Duration::from_secs(600);
/// Uploads without a client that are kept; a file of temporary contents each, or some KiB.
const KEPT: usize = 256;

/// Uploads by id and content. An upload may go on in another form.
#[derive(Default)]
pub(crate) struct Uploads(Mutex<HashMap<Key, Arc<Upload>>>);

pub(crate) type Key = (String, ContentName);

/// The bytes of an upload, held by the call that writes; `None` before the first piece.
pub(crate) type Writing = OwnedMutexGuard<Option<Receiving>>;

pub(crate) struct Upload {
    receiving: Arc<tokio::sync::Mutex<Option<Receiving>>>,
    written: AtomicU64,
    touched: Mutex<Instant>,
}

impl Upload {
    fn new() -> Self {
        Self { receiving: Arc::default(), written: AtomicU64::new(0), touched: Mutex::new(Instant::now()) }
    }

    /// The right to write; `None` while another call has it.
    pub(crate) fn lock(&self) -> Option<Writing> {
        self.receiving.clone().try_lock_owned().ok()
    }

    pub(crate) fn touch(&self, written: u64) {
        self.written.store(written, Ordering::Relaxed);
        *self.touched.lock().unwrap_or_else(|e| e.into_inner()) = Instant::now();
    }

    pub(crate) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    fn touched(&self) -> Instant {
        *self.touched.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn has_client(&self) -> bool {
        self.receiving.try_lock().is_err()
    }
}

impl Uploads {
    pub(crate) fn get(&self, key: &Key) -> Option<Arc<Upload>> {
        self.map().get(key).cloned()
    }

    /// The upload of this name, new or begun.
    pub(crate) fn get_or_begin(&self, key: &Key) -> Arc<Upload> {
        let mut uploads = self.map();
        if uploads.len() >= KEPT && !uploads.contains_key(key) {
            let idle = uploads.iter().filter(|(_, upload)| !upload.has_client());
            let oldest = idle.min_by_key(|(_, upload)| upload.touched()).map(|(key, _)| key.clone());
            oldest.map(|key| uploads.remove(&key));
        }
        uploads.entry(key.clone()).or_insert_with(|| Arc::new(Upload::new())).clone()
    }

    pub(crate) fn forget(&self, key: &Key) {
        self.map().remove(key);
    }

    /// Drops, with what they have written, the uploads that nobody has come back for.
    pub(crate) fn collect(&self) {
        self.map().retain(|_, upload| upload.has_client() || upload.touched().elapsed() < KEEP);
    }

    fn map(&self) -> MutexGuard<'_, HashMap<Key, Arc<Upload>>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A content that comes in pieces.
pub(crate) struct Receiving {
    ingest: Ingest,
    /// For a content that its client calls so.
    sha256: Option<(Sha256Blob, Sha256Hasher)>,
}

impl Receiving {
    pub(crate) fn begin(store: &TieredStore, content: ContentName) -> Result<Self, StoreError> {
        Ok(match content {
            ContentName::Blake3(blob) => Self { ingest: store.begin(blob)?, sha256: None },
            ContentName::Sha256(name) => {
                Self { ingest: store.begin_unnamed(name.size)?, sha256: Some((name, Sha256Hasher::default())) }
            }
        })
    }

    pub(crate) fn written(&self) -> u64 {
        self.ingest.written()
    }

    pub(crate) fn append(&mut self, data: &[u8]) -> Result<(), StoreError> {
        self.ingest.append(data)?;
        if let Some((_, hasher)) = &mut self.sha256 {
            hasher.update(data);
        }
        Ok(())
    }

    /// Verifies the whole and makes it durable; returns when it is.
    pub(crate) async fn finish(self, store: &TieredStore) -> Result<(), Status> {
        let Some((name, hasher)) = self.sha256 else {
            return store.finish(self.ingest).await.map_err(status);
        };
        if hasher.finish() != name {
            return Err(mismatch(&ContentName::Sha256(name)));
        }
        let blob: Blob = self.ingest.blob();
        store.finish(self.ingest).await.map_err(status)?;
        let store = store.clone();
        blocking(move || store.name(&[(name, blob)])).await?.map_err(status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_cas::{LocalConfig, LocalStore, testing::blob};

    fn store() -> (tempfile::TempDir, TieredStore) {
        let folder = tempfile::tempdir().unwrap();
        let (objects, index) = (folder.path().join("objects"), folder.path().join("index"));
        let store = LocalStore::open(LocalConfig { objects, index, inline_limit: 0 }).unwrap();
        (folder, store.into())
    }

    fn temporary_files(folder: &tempfile::TempDir) -> usize {
        std::fs::read_dir(folder.path().join("objects/.tmp")).unwrap().count()
    }

    /// Begins an upload as a call does, and returns its right to write.
    fn begin(uploads: &Uploads, store: &TieredStore, n: u64) -> (Key, Writing) {
        let (blob, data) = blob(n, 1000);
        let key = (format!("id-{n}"), ContentName::Blake3(blob));
        let upload = uploads.get_or_begin(&key);
        let mut writing = upload.lock().unwrap();
        let receiving = writing.insert(Receiving::begin(store, key.1).unwrap());
        receiving.append(&data[..500]).unwrap();
        upload.touch(500);
        (key, writing)
    }

    #[tokio::test(start_paused = true)]
    async fn abandoned_uploads_are_collected() {
        let (folder, store) = store();
        let uploads = Uploads::default();
        let (left, writing) = begin(&uploads, &store, 1);
        drop(writing);
        let (held, writing) = begin(&uploads, &store, 2);
        assert_eq!(temporary_files(&folder), 2);
        tokio::time::advance(KEEP - Duration::from_secs(1)).await;
        uploads.collect();
        assert_eq!(uploads.get(&left).unwrap().written(), 500);
        tokio::time::advance(Duration::from_secs(2)).await;
        uploads.collect();
        assert!(uploads.get(&left).is_none() && uploads.get(&held).is_some(), "only what nobody writes");
        assert_eq!(temporary_files(&folder), 1);
        drop(writing);
        uploads.collect();
        assert_eq!(temporary_files(&folder), 0);
    }

    #[tokio::test]
    async fn only_so_many_are_kept() {
        let (folder, store) = store();
        let uploads = Uploads::default();
        let (held, _writing) = begin(&uploads, &store, 0);
        let keys: Vec<Key> = (1..=KEPT as u64 + 10).map(|n| begin(&uploads, &store, n).0).collect();
        assert_eq!(temporary_files(&folder), KEPT);
        assert!(uploads.get(&held).is_some(), "older, and in use");
        assert!(uploads.get(&keys[10]).is_none() && uploads.get(&keys[11]).is_some(), "the oldest went");
    }
}
