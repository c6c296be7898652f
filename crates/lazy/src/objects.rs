//! Contents on this node: the engine's objects, what was fetched and not taken over yet, and the rest from the store.
//!
//! Who asks for the same content at the same time shares one fetch. Each reader has a deadline; the fetch has not, so that
//! what takes longer than a reader waits is there for the next: it ends when the store stops sending. A whole content
//! appears under its name verified and complete.

use std::collections::HashMap;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use aether_cas::lazy::Places;
use aether_cas::{Blob, Digest, RemoteStore, Store, StoreError};
use bytes::Bytes;
use futures::future::{BoxFuture, Shared};
use futures::{FutureExt as _, StreamExt as _};
use tempfile::TempPath;
use tokio::sync::Semaphore;

use crate::lock;
use crate::pace::Pace;
use crate::server::Metrics;
use crate::workshop::Workshop;

/// Limits of what is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest that a reader waits for a content, or for the part of a large one that he reads.
    pub deadline: Duration,
    /// Contents of this many bytes and more are served in parts while they arrive.
    pub large: u64,
    /// Contents and parts on their way to readers at one time; the time that one waits for his turn counts too. Large
    /// contents, whose readers get parts meanwhile, have a quarter as many turns of their own.
    pub concurrency: usize,
}

impl Default for Limits {
    /// 30 s, 64 MiB, 32 contents.
    fn default() -> Self {
        Self { deadline: Duration::from_secs(30), large: 64 << 20, concurrency: 32 }
    }
}

/// Why a content cannot be had.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("{0}")]
    Store(Arc<StoreError>),
    #[error("it did not arrive within {0:?}")]
    Late(Duration),
    #[error("cannot {action}: {source}")]
    Disk { action: &'static str, source: Arc<io::Error> },
}

impl Failure {
    fn disk(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Disk { action, source: Arc::new(source) }
    }

    /// Whether the store has it, and it is not what its name says.
    fn is_wrong(&self) -> bool {
        matches!(self, Self::Store(error) if matches!(**error, StoreError::Mismatch { .. } | StoreError::Corrupt { .. }))
    }
}

/// A content that can be read.
#[derive(Clone)]
pub(crate) enum Content {
    /// All of it, verified.
    Whole(Arc<File>),
    /// On its way.
    Arriving(Arc<Arriving>),
}

impl Content {
    pub(crate) async fn read(self, offset: u64, length: u64) -> Result<Bytes, Failure> {
        match self {
            Self::Whole(file) => read_at(file, offset, length).await,
            Self::Arriving(arriving) => arriving.read(offset, length).await,
        }
    }
}

/// What became of the fetch of all that is missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rest {
    /// Contents that were fetched.
    pub fetched: usize,
    /// Contents that could not be had.
    pub failed: usize,
    /// Why the first of them could not be had.
    pub reason: Option<String>,
}

type Flight = Shared<BoxFuture<'static, Result<Arc<File>, Failure>>>;

pub(crate) struct Objects {
    /// The engine's.
    objects: PathBuf,
    fetched: PathBuf,
    workshop: Workshop,
    store: RemoteStore,
    limits: Limits,
    metrics: Metrics,
    turns: Semaphore,
    large_turns: Semaphore,
    flights: Mutex<HashMap<Digest, Flight>>,
    arriving: Mutex<HashMap<Digest, Arc<Arriving>>>,
}

impl Objects {
    pub(crate) fn new(places: &Places, store: RemoteStore, limits: Limits, metrics: Metrics) -> io::Result<Arc<Self>> {
        let fetched = places.fetched_now()?;
        Ok(Arc::new(Self {
            objects: places.objects(),
            workshop: Workshop::new(fetched.clone()),
            fetched,
            store,
            limits,
            metrics,
            turns: Semaphore::new(limits.concurrency.max(1)),
            large_turns: Semaphore::new((limits.concurrency / 4).max(1)),
            flights: Mutex::default(),
            arriving: Mutex::default(),
        }))
    }

    /// Whether a content is served in parts while it arrives.
    pub(crate) fn comes_in_parts(&self, blob: Blob) -> bool {
        blob.size >= self.limits.large
    }

    /// The content, fetched if it is not here. Within the deadline.
    pub(crate) async fn obtain(self: &Arc<Self>, blob: Blob) -> Result<Content, Failure> {
        let objects = self.clone();
        let here = tokio::task::spawn_blocking(move || objects.local(blob)).await;
        if let Ok(Some(file)) = here {
            return Ok(Content::Whole(Arc::new(file)));
        }
        if self.comes_in_parts(blob) {
            return Ok(Content::Arriving(self.arrive(blob)));
        }
        let flight = lock(&self.flights).entry(blob.digest).or_insert_with(|| self.fly(blob)).clone();
        match tokio::time::timeout(self.limits.deadline, flight).await {
            Ok(result) => result.map(Content::Whole),
            Err(_) => Err(Failure::Late(self.limits.deadline)),
        }
    }

    /// The file of a content that is here with the right size.
    fn local(&self, blob: Blob) -> Option<File> {
        let path = blob.digest.object_path();
        // The engine may take a content over between the first look and the second.
        [&self.objects, &self.fetched, &self.objects]
            .iter()
            .filter_map(|folder| File::open(folder.join(&path)).ok())
            .find(|file| file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() == blob.size))
    }

    /// One fetch for all who wait. It goes on if they no longer do.
    fn fly(self: &Arc<Self>, blob: Blob) -> Flight {
        let objects = self.clone();
        let task = tokio::spawn(async move {
            let result = objects.fetch_whole(blob).await;
            lock(&objects.flights).remove(&blob.digest);
            result
        });
        let gone = || Failure::Disk { action: "fetch", source: Arc::new(io::Error::other("the server is ending")) };
        async move { task.await.unwrap_or_else(|_| Err(gone())) }.boxed().shared()
    }

    async fn fetch_whole(&self, blob: Blob) -> Result<Arc<File>, Failure> {
        let _turn = self.turns.acquire().await;
        self.fetch(blob, self.unfinished()?).await
    }

    fn unfinished(&self) -> Result<TempPath, Failure> {
        self.workshop.path().map_err(Failure::disk("make a place for contents; is the pool mounted?"))
    }

    async fn fetch(&self, blob: Blob, unfinished: TempPath) -> Result<Arc<File>, Failure> {
        let result = self.store.fetch_to(blob, &unfinished).await;
        self.metrics.count_fetch(blob, result.as_ref().err());
        result.map_err(|error| Failure::Store(Arc::new(error)))?;
        self.keep(blob, unfinished).map_err(Failure::disk("keep a fetched content"))
    }

    /// Gives a verified content its name.
    fn keep(&self, blob: Blob, unfinished: TempPath) -> io::Result<Arc<File>> {
        let file = File::open(&unfinished)?;
        if file.metadata()?.len() != blob.size {
            return Err(io::Error::other("it has another size than its name says"));
        }
        file.set_permissions(Permissions::from_mode(0o444))?;
        let path = self.fetched.join(blob.digest.object_path());
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        unfinished.persist(&path)?;
        Ok(Arc::new(file))
    }

    /// A large content, which arrives behind its readers.
    fn arrive(self: &Arc<Self>, blob: Blob) -> Arc<Arriving> {
        let mut all = lock(&self.arriving);
        if let Some(arriving) = all.get(&blob.digest) {
            return arriving.clone();
        }
        let unfinished = self.unfinished();
        let path = unfinished.as_ref().ok().map(|path| path.to_path_buf());
        let arriving = Arc::new(Arriving { objects: self.clone(), blob, unfinished: path, outcome: OnceLock::new() });
        all.insert(blob.digest, arriving.clone());
        let (objects, task) = (self.clone(), arriving.clone());
        tokio::spawn(async move {
            let result = match unfinished {
                Ok(unfinished) => {
                    let _turn = objects.large_turns.acquire().await;
                    objects.fetch(blob, unfinished).await
                }
                Err(failure) => Err(failure),
            };
            if let Err(error) = &result {
                tracing::error!(%error, %blob, "a large content did not arrive as a whole");
            }
            let _ = task.outcome.set(result);
            lock(&objects.arriving).remove(&blob.digest);
        });
        arriving
    }

    /// Fetches whole what of `blobs` is not here; for a node that will be without this layer.
    pub(crate) async fn fetch_all(self: &Arc<Self>, blobs: Vec<Blob>, pace: &Pace) -> Rest {
        let mut all = futures::stream::iter(blobs)
            .map(|blob| async move {
                let objects = self.clone();
                match tokio::task::spawn_blocking(move || objects.local(blob).is_some()).await {
                    Ok(true) => None,
                    _ => {
                        pace.pay(blob.size).await;
                        Some((blob, self.fetch_whole(blob).await))
                    }
                }
            })
            .buffer_unordered(self.limits.concurrency.max(1));
        let mut rest = Rest::default();
        while let Some(one) = all.next().await {
            match one {
                None => {}
                Some((_, Ok(_))) => rest.fetched += 1,
                Some((blob, Err(failure))) => {
                    rest.failed += 1;
                    rest.reason.get_or_insert_with(|| format!("content {blob}: {failure}"));
                }
            }
        }
        rest
    }
}

/// A large content while it arrives from its beginning to its end. It is tried once; who opens it after that has failed
/// causes another attempt.
pub(crate) struct Arriving {
    objects: Arc<Objects>,
    blob: Blob,
    /// Where it is written meanwhile.
    unfinished: Option<PathBuf>,
    outcome: OnceLock<Result<Arc<File>, Failure>>,
}

impl Arriving {
    /// A part: from the disk as far as it has come, else from the store. Of a content that has arrived and is not what its
    /// name says nothing more is had.
    async fn read(&self, offset: u64, length: u64) -> Result<Bytes, Failure> {
        let length = length.min(self.blob.size.saturating_sub(offset));
        match self.outcome.get() {
            Some(Ok(file)) => return read_at(file.clone(), offset, length).await,
            Some(Err(failure)) if failure.is_wrong() => return Err(failure.clone()),
            Some(Err(_)) => {}
            None => {
                let file = self.unfinished.as_ref().and_then(|path| File::open(path).ok());
                if let Some(file) = file
                    && file.metadata().is_ok_and(|metadata| metadata.len() >= offset + length)
                {
                    return read_at(Arc::new(file), offset, length).await;
                }
            }
        }
        let objects = &self.objects;
        let part = async {
            let _turn = objects.turns.acquire().await;
            objects.store.read_range(self.blob, offset, length).await
        };
        match tokio::time::timeout(objects.limits.deadline, part).await {
            Ok(Ok(data)) => {
                objects.metrics.count_part(data.len());
                Ok(data)
            }
            Ok(Err(error)) => Err(Failure::Store(Arc::new(error))),
            Err(_) => Err(Failure::Late(objects.limits.deadline)),
        }
    }
}

/// Reads from a local file.
async fn read_at(file: Arc<File>, offset: u64, length: u64) -> Result<Bytes, Failure> {
    let read = move || {
        let mut data = vec![0; usize::try_from(length).unwrap_or(0)];
        let mut filled = 0;
        while filled < data.len() {
            match file.read_at(&mut data[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        data.truncate(filled);
        Ok(Bytes::from(data))
    };
    let result =
        tokio::task::spawn_blocking(read).await.unwrap_or_else(|_| Err(io::Error::other("the server is ending")));
    result.map_err(Failure::disk("read a local content"))
}
