//! One place in one bucket: every request has a deadline, is counted, and fails with the name of what it was about.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use object_store::{GetOptions, MultipartUpload, ObjectStore, ObjectStoreExt, PutPayload, path::Path};

use crate::{StoreError, store::Result};

/// Longest time for one request with its repetitions: shorter than a client waits for an answer.
const DEADLINE: Duration = Duration::from_secs(25);

/// A folder of a bucket.
#[derive(Clone)]
pub(super) struct Bucket(Arc<Inner>);

struct Inner {
    store: Arc<dyn ObjectStore>,
    /// How errors name it: `s3://bucket`.
    name: String,
    prefix: String,
    requests: AtomicU64,
    failures: AtomicU64,
}

impl Bucket {
    pub(super) fn new(store: Arc<dyn ObjectStore>, name: String, prefix: &str) -> Self {
        let prefix = prefix.trim_matches('/').to_owned();
        Self(Arc::new(Inner { store, name, prefix, requests: AtomicU64::new(0), failures: AtomicU64::new(0) }))
    }

    /// What tells this place from all others.
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.0.name, self.0.prefix)
    }

    /// Requests made, and those of them that failed in the end.
    pub(super) fn requests(&self) -> (u64, u64) {
        (self.0.requests.load(Ordering::Relaxed), self.0.failures.load(Ordering::Relaxed))
    }

    /// Counts requests that are not made through this type.
    pub(super) fn count(&self, requests: u64) {
        self.0.requests.fetch_add(requests, Ordering::Relaxed);
    }

    pub(super) fn path(&self, key: &str) -> Path {
        if self.0.prefix.is_empty() { Path::from(key) } else { Path::from(format!("{}/{key}", self.0.prefix)) }
    }

    pub(super) async fn put(&self, key: &str, pieces: Vec<Bytes>) -> Result<()> {
        let path = self.path(key);
        let payload: PutPayload = pieces.into_iter().collect();
        self.request("write", key, self.0.store.put(&path, payload)).await.map(|_| ())
    }

    /// Begins an upload in parts. Its parts are the caller's to count and to bound.
    pub(super) async fn put_in_parts(&self, key: &str) -> Result<Box<dyn MultipartUpload>> {
        let path = self.path(key);
        self.request("begin to write", key, self.0.store.put_multipart(&path)).await
    }

    /// A range of an object; `None` when there is no such object.
    pub(super) async fn get(&self, key: &str, range: Range<u64>) -> Result<Option<Bytes>> {
        let path = self.path(key);
        self.request_some("read", key, self.0.store.get_range(&path, range)).await
    }

    /// A whole object, which must not be longer than `limit`; `None` when there is no such object.
    pub(super) async fn get_small(&self, key: &str, limit: u64) -> Result<Option<Bytes>> {
        let path = self.path(key);
        let read = async {
            let options = GetOptions::new().with_range(Some(object_store::GetRange::Bounded(0..limit)));
            self.0.store.get_opts(&path, options).await?.bytes().await
        };
        self.request_some("read", key, read).await
    }

    /// A range of an object in pieces; `None` when there is no such object. Each piece has its own deadline.
    pub(super) async fn stream(
        &self,
        key: &str,
        range: Range<u64>,
    ) -> Result<Option<BoxStream<'static, Result<Bytes>>>> {
        let path = self.path(key);
        let options = GetOptions::new().with_range(Some(object_store::GetRange::Bounded(range)));
        let Some(answer) = self.request_some("read", key, self.0.store.get_opts(&path, options)).await? else {
            return Ok(None);
        };
        let (bucket, key) = (self.clone(), key.to_owned());
        let pieces = futures::stream::unfold(Some(answer.into_stream()), move |pieces| {
            let (bucket, key) = (bucket.clone(), key.clone());
            async move {
                let mut pieces = pieces?;
                let piece = match tokio::time::timeout(DEADLINE, pieces.next()).await {
                    Ok(None) => return None,
                    Ok(Some(Ok(piece))) => return Some((Ok(piece), Some(pieces))),
                    Ok(Some(Err(error))) => bucket.error("read", &key, &error),
                    Err(_) => bucket.late("read", &key),
                };
                Some((Err(piece), None))
            }
        });
        Ok(Some(pieces.boxed()))
    }

    /// Names and sizes below `folder` that sort after `after`, in order.
    pub(super) async fn list(&self, folder: &str, after: Option<&str>) -> Result<Vec<(String, u64)>> {
        let path = self.path(folder);
        self.count(1);
        let mut listed = match after {
            Some(after) => self.0.store.list_with_offset(Some(&path), &self.path(&format!("{folder}/{after}"))),
            None => self.0.store.list(Some(&path)),
        };
        let start = format!("{path}/");
        let mut names = Vec::new();
        loop {
            match tokio::time::timeout(DEADLINE, listed.next()).await {
                Ok(None) => break,
                Ok(Some(Ok(object))) => {
                    if let Some(name) = object.location.as_ref().strip_prefix(&start) {
                        names.push((name.to_owned(), object.size));
                    }
                }
                Ok(Some(Err(error))) => return Err(self.error("list", folder, &error)),
                Err(_) => return Err(self.late("list", folder)),
            }
        }
        // Services do so, but not every one promises it.
        names.sort();
        Ok(names)
    }

    /// Deletes an object; it is no error when there is none.
    pub(super) async fn delete(&self, key: &str) -> Result<()> {
        let path = self.path(key);
        self.request_some("delete", key, self.0.store.delete(&path)).await.map(|_| ())
    }

    async fn request<T>(
        &self,
        action: &'static str,
        key: &str,
        request: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T> {
        self.count(1);
        match tokio::time::timeout(DEADLINE, request).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.error(action, key, &error)),
            Err(_) => Err(self.late(action, key)),
        }
    }

    async fn request_some<T>(
        &self,
        action: &'static str,
        key: &str,
        request: impl Future<Output = object_store::Result<T>>,
    ) -> Result<Option<T>> {
        let request = async {
            match request.await {
                Err(object_store::Error::NotFound { .. }) => Ok(None),
                other => other.map(Some),
            }
        };
        self.request(action, key, request).await
    }

    pub(super) fn error(&self, action: &'static str, key: &str, error: &object_store::Error) -> StoreError {
        use object_store::Error::{
            NotImplemented, NotSupported, PermissionDenied, Unauthenticated, UnknownConfigurationKey,
        };
        self.0.failures.fetch_add(1, Ordering::Relaxed);
        let mut message = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(error) = cause {
            let text = error.to_string();
            // Most of these errors repeat what caused them.
            if !message.contains(&text) {
                message = format!("{message}: {text}");
            }
            cause = error.source();
        }
        let transient = !matches!(
            error,
            NotImplemented { .. }
                | NotSupported { .. }
                | PermissionDenied { .. }
                | Unauthenticated { .. }
                | UnknownConfigurationKey { .. }
        );
        StoreError::Bucket { action, object: self.full_name(key), message, transient }
    }

    pub(super) fn late(&self, action: &'static str, key: &str) -> StoreError {
        self.0.failures.fetch_add(1, Ordering::Relaxed);
        let message = format!("no answer for {} s", DEADLINE.as_secs());
        StoreError::Bucket { action, object: self.full_name(key), message, transient: true }
    }

    fn full_name(&self, key: &str) -> String {
        format!("{}/{}", self.0.name, self.path(key))
    }
}
