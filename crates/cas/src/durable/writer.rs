//! Into the bucket: small blobs of many callers share packs, large ones are sent in parts. Directories and what is none do
//! not share packs.
//!
//! A pack is sent when it is [`PACK_BYTES`] long, or when its first blob has waited for [`LINGER`]. While
//! [`UPLOADS`] packs are on their way, the next one goes on filling. Callers wait once [`MEMORY`] bytes are
//! underway, so that memory is bounded however slow the bucket is.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures::future::try_join_all;
use tokio::{
    io::AsyncReadExt,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
};

use super::{
    bucket::Bucket,
    format::{
        Compression, Entry, HEADER_BYTES, MAX_ENTRIES, MAX_SHARED_BLOB, encode_footer, encode_header, encode_pack,
        encode_trailer, may_be_directory, may_begin_directory,
    },
    index::Index,
    name::{Namer, PackName},
    pack_key,
};
use crate::{
    Blob, StoreError,
    digest::BlobHasher,
    store::{Result, verify},
};

/// A pack is sent when it has so many bytes, before compression.
const PACK_BYTES: u64 = 8 << 20;
/// How long the first blob of a pack waits for others.
const LINGER: Duration = Duration::from_millis(15);
/// Packs on their way at one time.
const UPLOADS: usize = 4;
/// Bytes of blobs that wait, or are on their way.
const MEMORY: u32 = 64 << 20;
/// Large blobs on their way at one time; each takes some parts of memory.
const LARGE_UPLOADS: usize = 2;
const PART_BYTES: u64 = 8 << 20;
const PARTS_AT_ONCE: usize = 3;
/// S3 allows 10,000 parts.
const MAX_PARTS: u64 = 9_000;
/// Longest time for one object, shorter than the margin of those who list what is new.
pub(super) const UPLOAD_DEADLINE: Duration = Duration::from_secs(600);

struct Request {
    blobs: Vec<(Blob, Bytes)>,
    bytes: u64,
    /// Given back when the pack is stored.
    _memory: OwnedSemaphorePermit,
    done: oneshot::Sender<Result<()>>,
}

pub(super) struct Writer {
    shared: Arc<Shared>,
    queue: mpsc::UnboundedSender<Request>,
    memory: Arc<Semaphore>,
    large: Semaphore,
}

struct Shared {
    bucket: Bucket,
    index: Arc<Index>,
    namer: Namer,
}

impl Writer {
    /// Must be called within a Tokio runtime. Ends when it is dropped, and what it was given is stored.
    pub(super) fn start(bucket: Bucket, index: Arc<Index>) -> Self {
        let shared = Arc::new(Shared { bucket, index, namer: Namer::new() });
        // Bounded by the memory that each request holds.
        let (queue, requests) = mpsc::unbounded_channel();
        tokio::spawn(run(shared.clone(), requests));
        Self { shared, queue, memory: Arc::new(Semaphore::new(MEMORY as usize)), large: Semaphore::new(LARGE_UPLOADS) }
    }

    pub(super) fn name(&self) -> PackName {
        self.shared.namer.name()
    }

    /// Stores blobs of up to [`MAX_SHARED_BLOB`] bytes; returns when they are in the bucket.
    pub(super) async fn put(&self, blobs: Vec<(Blob, Bytes)>) -> Result<()> {
        let mut waiting = Vec::new();
        let mut part = Vec::new();
        let mut bytes = 0;
        for (blob, data) in blobs {
            if blob.is_empty() {
                continue;
            }
            if blob.size > MAX_SHARED_BLOB || data.len() as u64 != blob.size {
                return Err(StoreError::Invalid(format!("{} bytes cannot be packed as blob {blob}", data.len())));
            }
            if bytes + blob.size > MAX_SHARED_BLOB || part.len() == MAX_ENTRIES / 4 {
                waiting.push(self.submit(std::mem::take(&mut part), bytes).await?);
                bytes = 0;
            }
            bytes += blob.size;
            part.push((blob, data));
        }
        if !part.is_empty() {
            waiting.push(self.submit(part, bytes).await?);
        }
        for stored in waiting {
            stored.await.unwrap_or_else(|_| Err(self.closed()))?;
        }
        Ok(())
    }

    async fn submit(&self, blobs: Vec<(Blob, Bytes)>, bytes: u64) -> Result<oneshot::Receiver<Result<()>>> {
        let permits = u32::try_from(bytes).unwrap_or(MEMORY).min(MEMORY);
        let memory = self.memory.clone().acquire_many_owned(permits).await.map_err(|_| self.closed())?;
        let (done, stored) = oneshot::channel();
        let request = Request { blobs, bytes, _memory: memory, done };
        self.queue.send(request).map_err(|_| self.closed())?;
        Ok(stored)
    }

    /// Stores the blob that the file at `path` holds, as a pack of its own. The file is read once and verified.
    pub(super) async fn put_file(&self, blob: Blob, path: &Path) -> Result<()> {
        let _permit = self.large.acquire().await.map_err(|_| self.closed())?;
        let name = self.name();
        let key = pack_key(name);
        let shared = &self.shared;
        let mut upload = shared.bucket.put_in_parts(&key).await?;
        match tokio::time::timeout(UPLOAD_DEADLINE, shared.send_parts(&key, blob, path, &mut upload)).await {
            Ok(Ok(entry)) => shared.index.add_pack(name, &[entry]),
            failed => {
                // Best effort: the bucket's own rule for unfinished uploads removes what this leaves.
                let _ = tokio::time::timeout(Duration::from_secs(5), upload.abort()).await;
                match failed {
                    Ok(Err(error)) => Err(error),
                    _ => Err(shared.bucket.late("write", &key)),
                }
            }
        }
    }

    fn closed(&self) -> StoreError {
        StoreError::Closed(self.shared.bucket.name())
    }
}

async fn run(shared: Arc<Shared>, mut requests: mpsc::UnboundedReceiver<Request>) {
    let uploads = Arc::new(Semaphore::new(UPLOADS));
    let mut left_over = None;
    loop {
        let first = match left_over.take() {
            Some(request) => request,
            None => match requests.recv().await {
                Some(request) => request,
                None => return,
            },
        };
        let mut bytes = first.bytes;
        let mut count = first.blobs.len();
        let mut group = vec![first];
        let linger = tokio::time::sleep(LINGER);
        tokio::pin!(linger);
        let mut lingered = false;
        let mut open = true;
        let permit = loop {
            let full = bytes >= PACK_BYTES || left_over.is_some();
            tokio::select! {
                biased;
                () = &mut linger, if !lingered && !full => lingered = true,
                next = requests.recv(), if open && !full => match next {
                    Some(next) if count + next.blobs.len() > MAX_ENTRIES => left_over = Some(next),
                    Some(next) => {
                        bytes += next.bytes;
                        count += next.blobs.len();
                        group.push(next);
                    }
                    None => open = false,
                },
                permit = uploads.clone().acquire_owned(), if lingered || full || !open => break permit,
            }
        };
        let Ok(permit) = permit else { return };
        let shared = shared.clone();
        tokio::spawn(async move {
            shared.store(group).await;
            drop(permit);
        });
    }
}

impl Shared {
    /// Stores a group as one pack, or two if there are directories in it, and tells each caller.
    async fn store(self: Arc<Self>, group: Vec<Request>) {
        let encoded = tokio::task::spawn_blocking(move || {
            let (mut directories, mut others, mut waiting) = (Vec::new(), Vec::new(), Vec::new());
            for request in group {
                // Nothing gets into the bucket that is not what it is said to be.
                match request.blobs.iter().try_for_each(|(blob, data)| verify(*blob, data)) {
                    Ok(()) => {
                        for (blob, data) in request.blobs {
                            if may_be_directory(&data) { &mut directories } else { &mut others }.push((blob, data));
                        }
                        waiting.push((request.done, request._memory));
                    }
                    Err(error) => {
                        let _ = request.done.send(Err(error));
                    }
                }
            }
            ([encode_pack(&directories, true), encode_pack(&others, false)], waiting)
        })
        .await;
        // A panic in there drops the requests: their callers hear that.
        let Ok((packs, waiting)) = encoded else { return };
        let packs = packs.into_iter().filter(|(_, entries)| !entries.is_empty());
        let stored = packs.map(|(pieces, entries)| self.store_pack(self.namer.name(), pieces, entries));
        let result = try_join_all(stored).await;
        for (done, _memory) in waiting {
            let _ = done.send(match &result {
                Ok(_) => Ok(()),
                Err(error) => Err(repeat(error)),
            });
        }
    }

    async fn store_pack(&self, name: PackName, pieces: Vec<Bytes>, entries: Vec<Entry>) -> Result<()> {
        self.bucket.put(&pack_key(name), pieces).await?;
        let index = self.index.clone();
        crate::transfer::blocking(move || index.add_pack(name, &entries)).await
    }

    async fn send_parts(
        &self,
        key: &str,
        blob: Blob,
        path: &Path,
        upload: &mut Box<dyn object_store::MultipartUpload>,
    ) -> Result<Entry> {
        let failed = |error: object_store::Error| self.bucket.error("write", key, &error);
        let mut file = tokio::fs::File::open(path).await.map_err(StoreError::io("open", path))?;
        let part_bytes = usize::try_from(PART_BYTES.max(blob.size / MAX_PARTS + 1)).unwrap_or(usize::MAX);
        let mut hasher = BlobHasher::new();
        let mut parts = tokio::task::JoinSet::new();
        let mut buffer = BytesMut::with_capacity(part_bytes + 1);
        buffer.extend_from_slice(&encode_header());
        let mut ended = false;
        let mut directory = None;
        while !ended {
            while buffer.len() < part_bytes && !ended {
                let before = buffer.len();
                let more = (&mut file).take((part_bytes - before) as u64).read_buf(&mut buffer).await;
                ended = more.map_err(StoreError::io("read", path))? == 0;
                hasher.update(&buffer[before..]);
                directory.get_or_insert_with(|| may_begin_directory(blob.size, buffer.get(before)));
                if hasher.size() > blob.size {
                    break;
                }
            }
            if hasher.size() > blob.size || ended && hasher.finish() != blob {
                return Err(StoreError::Mismatch { blob, found: hasher.finish() });
            }
            let (compression, directory) = (Compression::None, directory.unwrap_or(false));
            let entry = Entry { blob, offset: HEADER_BYTES, stored: blob.size, compression, directory };
            if ended {
                let footer = encode_footer(&[entry]);
                let trailer = encode_trailer(&footer);
                buffer.extend_from_slice(&footer);
                buffer.extend_from_slice(&trailer);
            }
            while parts.len() >= PARTS_AT_ONCE {
                joined(parts.join_next().await).map_err(failed)?;
            }
            self.bucket.count(1);
            parts.spawn(upload.put_part(buffer.split().freeze().into()));
            if ended {
                while let Some(part) = parts.join_next().await {
                    joined(Some(part)).map_err(failed)?;
                }
                self.bucket.count(1);
                upload.complete().await.map_err(failed)?;
                return Ok(entry);
            }
            buffer.reserve(part_bytes + 1);
        }
        Err(StoreError::Closed(self.bucket.name()))
    }
}

fn joined(part: Option<Result<object_store::Result<()>, tokio::task::JoinError>>) -> object_store::Result<()> {
    match part {
        None => Ok(()),
        Some(Ok(result)) => result,
        Some(Err(source)) => Err(object_store::Error::JoinError { source }),
    }
}

/// The same error for another who waited for the same.
pub(super) fn repeat(error: &StoreError) -> StoreError {
    match error {
        StoreError::Bucket { action, object, message, transient } => {
            StoreError::Bucket { action, object: object.clone(), message: message.clone(), transient: *transient }
        }
        other => StoreError::Invalid(other.to_string()),
    }
}
