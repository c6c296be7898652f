//! Contents on this node: the engine's objects, what was fetched and not taken over yet, and the rest from the store.
//!
//! Who asks for the same content at the same time shares one fetch. A whole content appears under its name verified and
//! complete.

use std::collections::HashMap;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aether_cas::lazy::Places;
use aether_cas::{Blob, Digest, StoreError};
use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use tokio::sync::Semaphore;

use crate::fetch::Fetch;
use crate::server::Metrics;

/// Limits of what is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest that a reader waits for a content, or for the part of a large one that he reads.
    pub deadline: Duration,
    /// Contents of this many bytes and more are served in parts while they arrive.
    pub large: u64,
    /// Contents on their way at one time; of a reader who waits for his turn the time counts too.
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
}

/// A content that can be read.
#[derive(Clone)]
pub(crate) enum Content {
    /// All of it, verified.
    Whole(Arc<File>),
    /// On its way.
    Arriving(Arc<Arriving>),
}

type Flight = Shared<BoxFuture<'static, Result<Arc<File>, Failure>>>;

pub(crate) struct Objects {
    places: Places,
    fetch: Arc<dyn Fetch>,
    limits: Limits,
    metrics: Metrics,
    turns: Semaphore,
    flights: Mutex<HashMap<Digest, Flight>>,
    arriving: Mutex<HashMap<Digest, Arc<Arriving>>>,
}

impl Objects {
    pub(crate) fn new(places: Places, fetch: Arc<dyn Fetch>, limits: Limits, metrics: Metrics) -> Arc<Self> {
        let turns = Semaphore::new(limits.concurrency.max(1));
        Arc::new(Self { places, fetch, limits, metrics, turns, flights: Mutex::default(), arriving: Mutex::default() })
    }

    /// The content, fetched if it is not here. Within the deadline.
    pub(crate) async fn obtain(self: &Arc<Self>, blob: Blob) -> Result<Content, Failure> {
        let objects = self.clone();
        let here = tokio::task::spawn_blocking(move || objects.local(blob)).await;
        if let Ok(Some(file)) = here {
            return Ok(Content::Whole(Arc::new(file)));
        }
        if blob.size >= self.limits.large {
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
        let fetched = self.places.fetched_now().ok()?;
        // The engine may take a content over between the first look and the second.
        [self.places.objects().join(&path), fetched.join(&path), self.places.objects().join(&path)]
            .iter()
            .filter_map(|path| File::open(path).ok())
            .find(|file| file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() == blob.size))
    }

    /// One fetch for all who wait. It goes on if they no longer do.
    fn fly(self: &Arc<Self>, blob: Blob) -> Flight {
        let objects = self.clone();
        let task = tokio::spawn(async move {
            let limit = objects.limits.deadline;
            let result =
                tokio::time::timeout(limit, objects.fetch_whole(blob)).await.unwrap_or(Err(Failure::Late(limit)));
            lock(&objects.flights).remove(&blob.digest);
            result
        });
        let gone = || Failure::Disk { action: "fetch", source: Arc::new(io::Error::other("the server is ending")) };
        async move { task.await.unwrap_or_else(|_| Err(gone())) }.boxed().shared()
    }

    async fn fetch_whole(&self, blob: Blob) -> Result<Arc<File>, Failure> {
        let _turn = self.turns.acquire().await;
        let unfinished = self.unfinished()?;
        let result = self.fetch.fetch_to(blob, unfinished.path()).await;
        self.metrics.count_fetch(blob, result.as_ref().err());
        result.map_err(|error| Failure::Store(Arc::new(error)))?;
        self.keep(blob, unfinished)
    }

    /// Where a content is written before it has its name.
    fn unfinished(&self) -> Result<Unfinished, Failure> {
        let folder = self.places.fetched_now().map_err(Failure::disk("learn which boot this is"))?;
        // Not its parents: until the engine has mounted the pool, this is no place for contents.
        match fs::create_dir(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Failure::disk("make the folder of fetched contents; is the pool mounted?")(error));
            }
            _ => {}
        }
        Ok(Unfinished(folder.join(format!(".{}", uuid::Uuid::new_v4()))))
    }

    /// Gives a verified content its name.
    fn keep(&self, blob: Blob, unfinished: Unfinished) -> Result<Arc<File>, Failure> {
        let put = || {
            let file = File::open(unfinished.path())?;
            if file.metadata()?.len() != blob.size {
                return Err(io::Error::other("it has another size than its name says"));
            }
            file.set_permissions(Permissions::from_mode(0o444))?;
            let path = self.places.fetched_now()?.join(blob.digest.object_path());
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            fs::rename(unfinished.path(), &path)?;
            Ok(Arc::new(file))
        };
        put().map_err(Failure::disk("keep a fetched content"))
    }

    fn arrive(self: &Arc<Self>, blob: Blob) -> Arc<Arriving> {
        let mut all = lock(&self.arriving);
        if let Some(arriving) = all.get(&blob.digest) {
            return arriving.clone();
        }
        let unfinished = match self.unfinished() {
            Ok(unfinished) => unfinished,
            Err(error) => {
                tracing::error!(%error, %blob, "a large content is only served in parts");
                return Arc::new(Arriving::new(self.clone(), blob, PathBuf::new()));
            }
        };
        let arriving = Arc::new(Arriving::new(self.clone(), blob, unfinished.path().to_owned()));
        all.insert(blob.digest, arriving.clone());
        let (objects, task) = (self.clone(), arriving.clone());
        tokio::spawn(async move {
            let result = objects.fetch.fetch_to(blob, unfinished.path()).await;
            objects.metrics.count_fetch(blob, result.as_ref().err());
            let state = match &result {
                Ok(()) => match objects.keep(blob, unfinished) {
                    Ok(_) => DONE,
                    Err(_) => PARTS_ONLY,
                },
                Err(StoreError::Mismatch { .. } | StoreError::Corrupt { .. }) => WRONG,
                Err(_) => PARTS_ONLY,
            };
            if let Err(error) = &result {
                tracing::error!(%error, %blob, "a large content did not arrive as a whole");
            }
            task.state.store(state, Ordering::Release);
            lock(&objects.arriving).remove(&blob.digest);
        });
        arriving
    }

    /// Fetches whole what of `blobs` is not here; for a node that will be without this layer.
    pub(crate) async fn fetch_all(self: &Arc<Self>, blobs: Vec<Blob>) -> usize {
        use futures::StreamExt as _;
        let fetched = futures::stream::iter(blobs).map(|blob| async move {
            let objects = self.clone();
            match tokio::task::spawn_blocking(move || objects.local(blob).is_some()).await {
                Ok(false) => self.fetch_whole(blob).await.is_ok(),
                _ => false,
            }
        });
        fetched.buffer_unordered(self.limits.concurrency).filter(|done| futures::future::ready(*done)).count().await
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A path that is removed unless it was renamed.
struct Unfinished(PathBuf);

impl Unfinished {
    fn path(&self) -> &std::path::Path {
        &self.0
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

const ON_ITS_WAY: u8 = 0;
const DONE: u8 = 1;
/// It did not arrive; parts may still be had.
const PARTS_ONLY: u8 = 2;
/// It arrived, and is not what its name says.
const WRONG: u8 = 3;

/// A large content while it arrives from its beginning to its end.
pub(crate) struct Arriving {
    objects: Arc<Objects>,
    blob: Blob,
    unfinished: PathBuf,
    state: AtomicU8,
}

impl Arriving {
    fn new(objects: Arc<Objects>, blob: Blob, unfinished: PathBuf) -> Self {
        Self { objects, blob, unfinished, state: AtomicU8::new(ON_ITS_WAY) }
    }

    /// Whether nothing more will come of it: who opens it again gets the whole, or another attempt.
    pub(crate) fn is_over(&self) -> bool {
        self.state.load(Ordering::Acquire) != ON_ITS_WAY
    }

    /// A part: from the disk as far as it has come, else from the store.
    pub(crate) async fn read(self: Arc<Self>, offset: u64, length: u64) -> Result<Bytes, Failure> {
        let length = length.min(self.blob.size.saturating_sub(offset));
        let blob = self.blob;
        match self.state.load(Ordering::Acquire) {
            WRONG => {
                let reason = "what arrived does not match its digest".to_owned();
                return Err(Failure::Store(Arc::new(StoreError::Corrupt {
                    blob,
                    store: "the store".to_owned(),
                    reason,
                })));
            }
            DONE => {
                if let Ok(Content::Whole(file)) = self.objects.obtain(blob).await {
                    return read_at(file, offset, length).await;
                }
            }
            ON_ITS_WAY => {
                if let Some(file) = File::open(&self.unfinished)
                    .ok()
                    .filter(|file| file.metadata().is_ok_and(|metadata| metadata.len() >= offset + length))
                {
                    return read_at(Arc::new(file), offset, length).await;
                }
            }
            _ => {}
        }
        let limit = self.objects.limits.deadline;
        match tokio::time::timeout(limit, self.objects.fetch.read_range(blob, offset, length)).await {
            Ok(Ok(data)) => {
                self.objects.metrics.count_part(data.len());
                Ok(data)
            }
            Ok(Err(error)) => Err(Failure::Store(Arc::new(error))),
            Err(_) => Err(Failure::Late(limit)),
        }
    }
}

/// Reads from a local file.
pub(crate) async fn read_at(file: Arc<File>, offset: u64, length: u64) -> Result<Bytes, Failure> {
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
