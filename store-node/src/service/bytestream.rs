//! ByteStream: contents of any size in pieces, plain or as zstd, reads from any offset, writes that go on where they
//! broke off.
//!
//! An upload that broke off is kept for [`KEEP`] and until the next restart; a client that asks
//! where to go on and hears NOT_FOUND begins again.

use std::{convert::Infallible, fs::File, ops::Range, os::unix::fs::FileExt, sync::Arc, time::Duration};

use aether_cas::{
    Blob, ContentName,
    digest::BlobHasher,
    remote::resource::{Form, ReadName, ResourceError, UploadName, parse_read, parse_upload},
};
use bazel_remote_apis::google::bytestream::{
    QueryWriteStatusRequest, QueryWriteStatusResponse, ReadRequest, ReadResponse, WriteRequest, WriteResponse,
    byte_stream_server::ByteStream,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Instant,
};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use super::{
    blocking, check_instance, missing, name_again, resolve, status,
    uploads::{KEEP, Receiving, Uploads, Writing},
    zstd::{Compressor, Decompressor},
};
use crate::{
    limits::{DECOMPRESSORS, WINDOW_LOG},
    metrics::{Call, StoreMetrics},
    tiered::TieredStore,
};

const PIECE: u64 = 128 << 10;
/// Pieces waiting to be sent.
const PIECES: usize = 1;
/// Longest wait for the next [`PROGRESS`] bytes from a client, or for the end.
const STALL: Duration = Duration::from_secs(60);
const PROGRESS: usize = 1 << 20;
/// Longest wait for a decompressor: whoever waits has a place.
const DECOMPRESSOR_WAIT: Duration = Duration::from_secs(1);
/// What stands for the size of a compressed upload that was not needed.
const NOT_NEEDED: i64 = -1;

pub(crate) struct ByteStreamService {
    store: TieredStore,
    metrics: StoreMetrics,
    uploads: Arc<Uploads>,
    decompressors: Arc<Semaphore>,
}

impl ByteStreamService {
    pub(crate) fn new(store: TieredStore, metrics: StoreMetrics) -> Self {
        Self { store, metrics, uploads: Arc::default(), decompressors: Arc::new(Semaphore::new(DECOMPRESSORS)) }
    }

    /// Collects abandoned uploads for ever.
    pub(crate) fn collect(&self) -> impl Future<Output = Infallible> + use<> {
        let uploads = self.uploads.clone();
        async move {
            let mut ticks = tokio::time::interval(KEEP / 10);
            loop {
                ticks.tick().await;
                uploads.collect();
            }
        }
    }

    async fn read_blob(&self, request: ReadRequest) -> Result<ReceiverStream<Result<ReadResponse, Status>>, Status> {
        let ReadName { instance, form, content } = parse_read(&request.resource_name).map_err(bad_name)?;
        check_instance(&instance)?;
        let offset = u64::try_from(request.read_offset)
            .ok()
            .filter(|offset| *offset <= content.size())
            .ok_or_else(|| Status::out_of_range(format!("offset {} is not in blob {content}", request.read_offset)))?;
        let limit = match (u64::try_from(request.read_limit), form) {
            (Ok(0), _) => u64::MAX,
            (Ok(limit), Form::Plain) => limit,
            (Ok(_), Form::Zstd) => {
                return Err(Status::invalid_argument("compressed blobs are read without read_limit"));
            }
            (Err(_), _) => return Err(Status::invalid_argument("read_limit is negative")),
        };
        let blob = self.resolve(content).await?.ok_or_else(|| missing(&content))?;
        let range = offset..blob.size.min(offset.saturating_add(limit));
        // Before the stream begins, so that a missing blob is the status of the call.
        self.store.bring(&[blob]).await.map_err(status)?;
        let store = self.store.clone();
        let bytes = blocking(move || match store.open_object(&blob) {
            Ok(Some(file)) => Ok(Bytes::File(file)),
            Ok(None) => store.read_blob(&blob).map(Bytes::Memory),
            Err(error) => Err(error),
        })
        .await?
        .map_err(status)?;
        let (sender, receiver) = mpsc::channel(PIECES);
        let sending = Sending { store: self.store.clone(), metrics: self.metrics.clone(), blob, bytes, sender };
        tokio::task::spawn_blocking(move || {
            if let Err(error) = sending.send(range, form) {
                let _ = sending.sender.blocking_send(Err(error));
            }
        });
        Ok(ReceiverStream::new(receiver))
    }

    async fn resolve(&self, content: ContentName) -> Result<Option<Blob>, Status> {
        Ok(resolve(&self.store, vec![content]).await?.pop().flatten())
    }

    /// The blob of a content that is here.
    async fn present(&self, content: ContentName) -> Result<Option<Blob>, Status> {
        let Some(blob) = self.resolve(content).await? else { return Ok(None) };
        let store = self.store.clone();
        let is_there = blocking(move || store.contains(&blob)).await?.map_err(status)?;
        if is_there {
            name_again(&self.store, vec![(content, blob)]).await?;
        }
        Ok(is_there.then_some(blob))
    }

    async fn write_blob(&self, mut requests: Streaming<WriteRequest>) -> Result<WriteResponse, Status> {
        let mut pace = Pace::default();
        let first = pace.next(&mut requests).await?;
        let first = first.ok_or_else(|| Status::invalid_argument("a write needs at least one request"))?;
        let UploadName { instance, id, form, content } = parse_upload(&first.resource_name).map_err(bad_name)?;
        check_instance(&instance)?;
        // REAPI: no need to send what is here already.
        let not_needed = WriteResponse {
            committed_size: match form {
                Form::Plain => signed(content.size()),
                Form::Zstd => NOT_NEEDED,
            },
        };
        if self.present(content).await?.is_some() {
            return Ok(not_needed);
        }
        let name = first.resource_name.clone();
        let key = (id, content);
        let upload = self.uploads.get_or_begin(&key);
        let mut writing = upload.lock().ok_or_else(|| Status::aborted(format!("another call is writing {name}")))?;
        if first.write_offset == 0 {
            // A client that does not ask begins again.
            *writing = None;
        }
        let written = writing.as_ref().map_or(0, Receiving::written);
        // Pieces of a call whose connection broke may still arrive after its client asked where to go on, so a
        // client may be behind. What it sends twice is skipped: the digest decides about the whole anyway.
        let behind = u64::try_from(first.write_offset).ok().and_then(|offset| written.checked_sub(offset));
        let skip = behind.ok_or_else(|| {
            Status::invalid_argument(format!(
                "write_offset is {}, but {written} bytes of {name} have been written",
                first.write_offset
            ))
        })?;
        let mut pieces = Pieces { skip, decompressor: self.decompressor(form).await? };

        // Compressed or not, offsets count what was sent in this call.
        let mut offset = first.write_offset;
        let mut request = first;
        loop {
            if !request.resource_name.is_empty() && request.resource_name != name {
                return Err(Status::invalid_argument("the resource name changed within one write"));
            }
            if request.write_offset != offset {
                let found = request.write_offset;
                return Err(Status::invalid_argument(format!("write_offset is {found} where {offset} follows")));
            }
            offset = offset.saturating_add(signed(request.data.len() as u64));
            self.metrics.received(request.data.len() as u64);
            let finish = request.finish_write;
            let store = self.store.clone();
            let taken;
            (writing, pieces, taken) = blocking(move || {
                let result = pieces.take(&store, content, &mut writing, &request.data);
                (writing, pieces, result)
            })
            .await?;
            if let Err(error) = taken.and_then(|()| if finish { pieces.check_end() } else { Ok(()) }) {
                self.uploads.forget(&key);
                return Err(error);
            }
            upload.touch(writing.as_ref().map_or(0, Receiving::written));
            if finish {
                self.uploads.forget(&key);
                let receiving = writing.take().ok_or_else(|| Status::internal("the upload was lost"))?;
                receiving.finish(&self.store).await?;
                self.metrics.hold(self.store.statistics());
                // For plain bytes the same as the size.
                return Ok(WriteResponse { committed_size: offset });
            }
            match pace.next(&mut requests).await? {
                Some(next) if next.data.is_empty() && !next.finish_write => {
                    return Err(Status::invalid_argument("a piece is empty, and not the end of the write"));
                }
                Some(next) => request = next,
                // The client will go on later.
                None => return Ok(WriteResponse { committed_size: signed(upload.written()) }),
            }
            if self.present(content).await?.is_some() {
                // Somebody else was quicker.
                self.uploads.forget(&key);
                return Ok(not_needed);
            }
        }
    }

    /// What takes the pieces of this form apart, and the right to the memory for it.
    async fn decompressor(&self, form: Form) -> Result<Option<(Decompressor, OwnedSemaphorePermit)>, Status> {
        if form == Form::Plain {
            return Ok(None);
        }
        let permit = tokio::time::timeout(DECOMPRESSOR_WAIT, self.decompressors.clone().acquire_owned()).await;
        let Ok(Ok(permit)) = permit else {
            let busy = format!("the store takes {DECOMPRESSORS} compressed uploads at one time; try again");
            return Err(Status::unavailable(busy));
        };
        Ok(Some((Decompressor::new(WINDOW_LOG)?, permit)))
    }

    async fn query(&self, request: QueryWriteStatusRequest) -> Result<QueryWriteStatusResponse, Status> {
        let UploadName { instance, id, content, .. } = parse_upload(&request.resource_name).map_err(bad_name)?;
        check_instance(&instance)?;
        if self.present(content).await?.is_some() {
            return Ok(QueryWriteStatusResponse { committed_size: signed(content.size()), complete: true });
        }
        match self.uploads.get(&(id, content)) {
            Some(upload) => Ok(QueryWriteStatusResponse { committed_size: signed(upload.written()), complete: false }),
            None => Err(Status::not_found(format!("there is no upload {}", request.resource_name))),
        }
    }
}

/// From what a client sends to what it means.
struct Pieces {
    /// Bytes still to come that have been written already.
    skip: u64,
    decompressor: Option<(Decompressor, OwnedSemaphorePermit)>,
}

impl Pieces {
    fn take(
        &mut self,
        store: &TieredStore,
        content: ContentName,
        writing: &mut Writing,
        data: &[u8],
    ) -> Result<(), Status> {
        let receiving = match &mut **writing {
            Some(receiving) => receiving,
            empty => empty.insert(Receiving::begin(store, content).map_err(status)?),
        };
        let skip = &mut self.skip;
        let mut append = |data: &[u8]| {
            let known = usize::try_from(*skip).unwrap_or(usize::MAX).min(data.len());
            *skip -= known as u64;
            receiving.append(&data[known..]).map_err(|error| {
                let error = status(error);
                Status::new(error.code(), format!("blob {content}: {}", error.message()))
            })
        };
        match &mut self.decompressor {
            Some((decompressor, _)) => decompressor.feed(data, append),
            None => append(data),
        }
    }

    fn check_end(&self) -> Result<(), Status> {
        match &self.decompressor {
            Some((decompressor, _)) if !decompressor.is_done() => {
                Err(Status::invalid_argument("the write ends in the middle of a zstd frame"))
            }
            _ => Ok(()),
        }
    }
}

fn bad_name(error: ResourceError) -> Status {
    Status::invalid_argument(error.to_string())
}

/// How long a client may still be waited for, and what it has brought since that was reckoned. Our own work costs it nothing.
struct Pace {
    wait: Duration,
    bytes: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self { wait: STALL, bytes: 0 }
    }
}

impl Pace {
    async fn next(
        &mut self,
        requests: &mut (impl Stream<Item = Result<WriteRequest, Status>> + Unpin),
    ) -> Result<Option<WriteRequest>, Status> {
        let begin = Instant::now();
        let request = tokio::time::timeout(self.wait, requests.next()).await.map_err(|_| {
            let (bytes, seconds) = (self.bytes, STALL.as_secs());
            Status::deadline_exceeded(format!("{bytes} bytes came in {seconds} s, fewer than the {PROGRESS} demanded"))
        })?;
        self.wait = self.wait.saturating_sub(begin.elapsed());
        self.bytes += request.as_ref().and_then(|request| request.as_ref().ok()).map_or(0, |piece| piece.data.len());
        if self.bytes >= PROGRESS {
            *self = Self::default();
        }
        request.transpose()
    }
}

enum Bytes {
    Memory(bytes::Bytes),
    File(File),
}

/// A blob on its way to a client.
struct Sending {
    store: TieredStore,
    metrics: StoreMetrics,
    blob: Blob,
    bytes: Bytes,
    sender: mpsc::Sender<Result<ReadResponse, Status>>,
}

impl Sending {
    /// Sends a range of the blob; verifies the whole blob when all of it is sent.
    fn send(&self, range: Range<u64>, form: Form) -> Result<(), Status> {
        let blob = self.blob;
        let whole = range == (0..blob.size);
        let mut hasher = BlobHasher::new();
        let mut compressor = match form {
            Form::Plain => None,
            Form::Zstd => Some(Compressor::new()?),
        };
        let mut at = range.start;
        while at < range.end {
            let data = self.read(at, usize::try_from(PIECE.min(range.end - at)).unwrap_or(0))?;
            if whole {
                hasher.update(&data);
            }
            at += data.len() as u64;
            if whole && at == range.end && hasher.finish() != blob {
                // Before the last piece, so that no client has all of it without hearing.
                self.store.verify(&blob).map_err(status)?;
                return Err(Status::data_loss(format!("blob {blob} was read wrongly")));
            }
            let data = match &mut compressor {
                None => data,
                Some(compressor) => compressor.feed(&data)?,
            };
            if !self.hand_out(data) {
                return Ok(());
            }
        }
        if let Some(compressor) = compressor {
            self.hand_out(compressor.finish()?);
        }
        Ok(())
    }

    fn read(&self, at: u64, length: usize) -> Result<Vec<u8>, Status> {
        match &self.bytes {
            Bytes::Memory(all) => {
                let at = usize::try_from(at).unwrap_or(usize::MAX);
                Ok(all[at..at + length].to_vec())
            }
            Bytes::File(file) => {
                let mut data = vec![0; length];
                file.read_exact_at(&mut data, at).map(|()| data).or_else(|error| {
                    tracing::error!(blob = %self.blob, %error, "cannot read a blob");
                    // Sets the copy aside if it is too short.
                    self.store.verify(&self.blob).map_err(status)?;
                    Err(Status::internal(format!("cannot read blob {}: {error}", self.blob)))
                })
            }
        }
    }

    /// Whether the client still listens.
    fn hand_out(&self, data: Vec<u8>) -> bool {
        if data.is_empty() {
            return true;
        }
        self.metrics.sent(data.len() as u64);
        self.sender.blocking_send(Ok(ReadResponse { data })).is_ok()
    }
}

fn signed(size: u64) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

#[tonic::async_trait]
impl ByteStream for ByteStreamService {
    type ReadStream = ReceiverStream<Result<ReadResponse, Status>>;

    async fn read(&self, request: Request<ReadRequest>) -> Result<Response<Self::ReadStream>, Status> {
        self.metrics.observe(Call::Read, self.read_blob(request.into_inner())).await.map(Response::new)
    }

    async fn write(&self, request: Request<Streaming<WriteRequest>>) -> Result<Response<WriteResponse>, Status> {
        self.metrics.observe(Call::Write, self.write_blob(request.into_inner())).await.map(Response::new)
    }

    async fn query_write_status(
        &self,
        request: Request<QueryWriteStatusRequest>,
    ) -> Result<Response<QueryWriteStatusResponse>, Status> {
        self.query(request.into_inner()).await.map(Response::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pieces of `size` bytes, one every `seconds`.
    fn pieces(size: usize, seconds: u64) -> impl Stream<Item = Result<WriteRequest, Status>> + Unpin {
        let piece = move || Ok(WriteRequest { data: vec![0; size], ..Default::default() });
        let ticks = tokio_stream::wrappers::IntervalStream::new(tokio::time::interval(Duration::from_secs(seconds)));
        ticks.map(move |_| piece())
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_must_get_on() {
        let (mut slow, mut pace) = (pieces(1000, 7), Pace::default());
        let begin = Instant::now();
        let error = loop {
            if let Err(error) = pace.next(&mut slow).await {
                break error;
            }
        };
        assert_eq!((error.code(), begin.elapsed()), (tonic::Code::DeadlineExceeded, STALL));
        let (mut fast, mut pace) = (pieces(PROGRESS / 2, 25), Pace::default());
        for _ in 0..20 {
            pace.next(&mut fast).await.unwrap();
        }
    }
}
