//! [`Store`] and [`Objects`] for [`LocalStore`]: the blocking work goes to threads that may block.

use std::path::Path;

use async_trait::async_trait;
use bytes::Bytes;

use super::{LocalStore, files::copy_to_new};
use crate::{
    Blob, Store, StoreError,
    store::Result,
    transfer::{Object, Objects},
};

impl LocalStore {
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&LocalStore) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let store = self.clone();
        match tokio::task::spawn_blocking(move || work(&store)).await {
            Ok(result) => result,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(self.closed()),
        }
    }

    fn copy_blob_to(&self, blob: Blob, path: &Path) -> Result<()> {
        if let Some(file) = self.open_object(&blob)? {
            let from = self.object_path(&blob.digest);
            if copy_to_new(file, &from, path)? == blob {
                return Ok(());
            }
            std::fs::remove_file(path).map_err(StoreError::io("remove", path))?;
            self.verify(&blob)?;
        }
        // Inline or missing: the plain way knows what to do and say.
        let data = self.read_blob(&blob)?;
        copy_to_new(&data[..], Path::new("memory"), path).map(|_| ())
    }
}

#[async_trait]
impl Store for LocalStore {
    async fn find_missing(&self, blobs: &[Blob]) -> Result<Vec<Blob>> {
        let blobs = blobs.to_vec();
        self.blocking(move |store| store.missing(&blobs)).await
    }

    async fn read(&self, blob: Blob) -> Result<Bytes> {
        self.blocking(move |store| store.read_blob(&blob)).await
    }

    async fn read_batch(&self, blobs: &[Blob]) -> Result<Vec<Bytes>> {
        let blobs = blobs.to_vec();
        self.blocking(move |store| blobs.iter().map(|blob| store.read_blob(blob)).collect()).await
    }

    async fn fetch_to(&self, blob: Blob, path: &Path) -> Result<()> {
        let path = path.to_owned();
        self.blocking(move |store| store.copy_blob_to(blob, &path)).await
    }

    async fn write_batch(&self, blobs: Vec<(Blob, Bytes)>) -> Result<()> {
        let committed = self.blocking(move |store| store.submit_batch(blobs)).await?;
        committed.await.unwrap_or_else(|_| Err(self.closed()))
    }

    async fn write_file(&self, blob: Blob, path: &Path) -> Result<()> {
        let path = path.to_owned();
        self.blocking(move |store| store.put_file(blob, &path)).await
    }
}

impl Objects for LocalStore {
    fn object(&self, blob: &Blob) -> Result<Object> {
        match self.shared.entry(blob)? {
            Some(entry) if entry.file => Ok(Object::File(self.object_path(&blob.digest))),
            _ => self.read_blob(blob).map(Object::Bytes),
        }
    }
}
