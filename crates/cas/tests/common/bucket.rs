//! A node over a bucket, as far as this crate makes one.
#![allow(dead_code, reason = "each test program uses its part")]

use std::{ops::ControlFlow, path::Path, sync::Arc, time::Instant};

use aether_cas::{
    Blob, Store, StoreError,
    collect::{Pace, Progress},
    durable::{Durable, Span, Terms, collect::BucketCollector, format::MAX_SHARED_BLOB},
    store::Result,
    testing::bucket::TestBucket,
};
use async_trait::async_trait;
use bytes::Bytes;
use futures::TryStreamExt;
use tempfile::TempDir;

/// A node: what it knows of the bucket goes with its folder.
pub(crate) struct Client {
    pub(crate) durable: Durable,
    folder: TempDir,
}

impl Client {
    pub(crate) async fn open(terms: Terms, bucket: TestBucket) -> Result<Self> {
        let folder = tempfile::tempdir().unwrap();
        let name = "s3://test".to_owned();
        let durable = Durable::open(Arc::new(bucket), name, "here", &folder.path().join("index"), terms).await?;
        durable.rebuild().await?;
        Ok(Self { durable, folder })
    }

    /// Collects once; `watch` hears of it.
    pub(crate) async fn collect(
        self: &Arc<Self>,
        waste: u64,
        mut watch: impl FnMut(&Progress) -> ControlFlow<()> + Send + 'static,
    ) -> Result<Progress> {
        let client = self.clone();
        let collecting = tokio::task::spawn_blocking(move || {
            let here = tokio::runtime::Handle::current();
            let get = |blob: &Blob| here.block_on(client.get(*blob));
            let scratch = client.folder.path().join("marks");
            BucketCollector::new(&client.durable, &get, &scratch, waste).collect(Pace::new(None), &mut watch)
        });
        collecting.await.unwrap()
    }

    /// The contents of a blob, verified.
    pub(crate) async fn get(&self, blob: Blob) -> Result<Bytes> {
        read(&self.durable, blob).await
    }
}

async fn read(durable: &Durable, blob: Blob) -> Result<Bytes> {
    let asked = Instant::now();
    let mut refreshed = false;
    loop {
        match durable.places(&blob)?.pop() {
            Some(place) if blob.size <= MAX_SHARED_BLOB => {
                let span = Span { pack: place.pack, entries: vec![place.entry] };
                if let Some((_, data)) = durable.read_span(span).await?.pop() {
                    return Ok(data);
                }
            }
            Some(place) => {
                if let Some(pieces) = durable.read_pieces(place).await? {
                    let pieces: Vec<Bytes> = pieces.try_collect().await?;
                    assert!(blob.matches(&pieces.concat()), "{blob}");
                    return Ok(pieces.concat().into());
                }
            }
            None if !refreshed => {
                durable.refresh(asked).await?;
                refreshed = true;
            }
            None => return Err(StoreError::NotFound { blob, store: durable.name() }),
        }
    }
}

#[async_trait]
impl Store for Client {
    async fn find_missing(&self, blobs: &[Blob]) -> Result<Vec<Blob>> {
        // What another node has is stored once more: two copies are what a collection has to cope with.
        self.durable.find_missing(blobs).await
    }

    async fn read(&self, blob: Blob) -> Result<Bytes> {
        self.get(blob).await
    }

    async fn read_batch(&self, _: &[Blob]) -> Result<Vec<Bytes>> {
        unreachable!("nobody asks")
    }

    async fn fetch_to(&self, _: Blob, _: &Path) -> Result<()> {
        unreachable!("nobody asks")
    }

    async fn write_batch(&self, blobs: Vec<(Blob, Bytes)>) -> Result<()> {
        let (large, small): (Vec<_>, Vec<_>) = blobs.into_iter().partition(|(blob, _)| blob.size > MAX_SHARED_BLOB);
        self.durable.put(small).await?;
        for (blob, data) in large {
            let path = self.folder.path().join(format!("{}-{:?}", blob.digest, Instant::now()));
            std::fs::write(&path, &data).unwrap();
            self.durable.put_file(blob, &path).await?;
            std::fs::remove_file(&path).unwrap();
        }
        Ok(())
    }

    async fn write_file(&self, blob: Blob, path: &Path) -> Result<()> {
        self.durable.put_file(blob, path).await
    }
}
