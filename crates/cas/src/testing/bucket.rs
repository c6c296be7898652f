//! A bucket in memory that refuses when it is told to.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use futures::{StreamExt, stream::BoxStream};
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, memory::InMemory, path::Path,
};

/// A bucket in memory.
#[derive(Debug, Default)]
pub struct TestBucket {
    inner: Arc<InMemory>,
    refuse: AtomicBool,
    refuse_lists: AtomicBool,
    /// Requests until the end, plus one; 0 for no end.
    left: AtomicU64,
}

impl TestBucket {
    /// The same bucket as somebody else sees it: what this refuses that does not.
    #[must_use]
    pub fn beside(&self) -> Self {
        Self { inner: self.inner.clone(), ..Self::default() }
    }

    /// After so many requests all are refused, as to a process that has died.
    pub fn end_after(&self, requests: u64) {
        self.left.store(requests + 1, Ordering::Relaxed);
    }

    /// Removes an object, as somebody who has no business to.
    ///
    /// # Errors
    /// When there is none.
    pub async fn remove(&self, key: &str) -> Result<()> {
        self.inner.delete(&Path::from(key)).await
    }

    /// Writes an object.
    ///
    /// # Panics
    /// Never: memory takes it.
    pub async fn put_text(&self, key: &str, text: &str) {
        self.inner.put(&Path::from(key), text.to_owned().into()).await.expect("memory takes it");
    }

    /// Flips a bit of an object.
    ///
    /// # Panics
    /// When there is no such object.
    pub async fn damage(&self, key: &str, at: u64) {
        let key = Path::from(key);
        let object = self.inner.get(&key).await.expect("it is there").bytes().await.expect("memory gives it");
        let mut bytes = object.to_vec();
        bytes[usize::try_from(at).expect("it fits memory")] ^= 1;
        self.inner.put(&key, bytes.into()).await.expect("memory takes it");
    }

    fn count(&self) -> Result<()> {
        let taken = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| (left > 1).then(|| left - 1));
        if taken == Err(1) {
            return Err(Error::Generic { store: "test", source: "dead".into() });
        }
        Ok(())
    }

    /// From now on writes fail, or do not any more.
    pub fn refuse(&self, refuse: bool) {
        self.refuse.store(refuse, Ordering::Relaxed);
    }

    /// From now on listings fail, or do not any more.
    pub fn refuse_lists(&self, refuse: bool) {
        self.refuse_lists.store(refuse, Ordering::Relaxed);
    }

    fn check(&self) -> Result<()> {
        self.count()?;
        Self::allow(&self.refuse)
    }

    fn allow(refuse: &AtomicBool) -> Result<()> {
        if refuse.load(Ordering::Relaxed) {
            return Err(Error::Generic { store: "test", source: "slow down".into() });
        }
        Ok(())
    }
}

impl fmt::Display for TestBucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a bucket in memory")
    }
}

#[async_trait]
impl ObjectStore for TestBucket {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.check()?;
        self.inner.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.check()?;
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.count()?;
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        match self.count() {
            Ok(()) => self.inner.delete_stream(locations),
            Err(error) => futures::stream::iter([Err(error)]).boxed(),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.count().and_then(|()| Self::allow(&self.refuse_lists)) {
            Ok(()) => self.inner.list(prefix),
            Err(error) => futures::stream::iter([Err(error)]).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
