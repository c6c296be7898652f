//! ByteStream: blobs of any size in pieces, reads from any offset, writes that go on where they broke off.
//!
//! An upload that broke off is kept for [`KEEP`] and until the next restart; a client that asks
//! where to go on and hears NOT_FOUND begins again. Not offered: compressed blobs.

use std::{
    collections::HashMap,
    fs::File,
    os::unix::fs::FileExt,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use aether_cas::{
    Blob,
    digest::BlobHasher,
    local::Ingest,
    remote::resource::{UploadName, parse_read, parse_upload},
};
use bazel_remote_apis::google::bytestream::{
    QueryWriteStatusRequest, QueryWriteStatusResponse, ReadRequest, ReadResponse, WriteRequest, WriteResponse,
    byte_stream_server::ByteStream,
};
use tokio::sync::{OwnedMutexGuard, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{blocking, check_instance, status};
use crate::{
    metrics::{Call, StoreMetrics},
    tiered::TieredStore,
};

const PIECE: u64 = 1 << 20;
/// Pieces waiting to be sent.
const PIECES: usize = 2;
/// How long an upload without a client is kept.
const KEEP: Duration = Duration::from_secs(600);
/// Longest wait for the next piece from a client.
const STALL: Duration = Duration::from_secs(60);

pub(crate) struct ByteStreamService {
    store: TieredStore,
    metrics: StoreMetrics,
    uploads: Uploads,
}

/// Uploads that have begun and not ended, by id and blob.
type Uploads = Mutex<HashMap<(String, Blob), Arc<Upload>>>;

struct Upload {
    /// Held by the call that writes; `None` before the first piece.
    ingest: Arc<tokio::sync::Mutex<Option<Ingest>>>,
    written: AtomicU64,
    touched: Mutex<Instant>,
}

impl Upload {
    fn new() -> Self {
        Self { ingest: Arc::default(), written: AtomicU64::new(0), touched: Mutex::new(Instant::now()) }
    }

    fn touch(&self, written: u64) {
        self.written.store(written, Ordering::Relaxed);
        *self.touched.lock().unwrap_or_else(|e| e.into_inner()) = Instant::now();
    }

    fn is_abandoned(&self) -> bool {
        let touched = *self.touched.lock().unwrap_or_else(|e| e.into_inner());
        touched.elapsed() > KEEP && self.ingest.try_lock().is_ok()
    }
}

impl ByteStreamService {
    pub(crate) fn new(store: TieredStore, metrics: StoreMetrics) -> Self {
        Self { store, metrics, uploads: Uploads::default() }
    }

    async fn read_blob(&self, request: ReadRequest) -> Result<ReceiverStream<Result<ReadResponse, Status>>, Status> {
        let (instance, blob) =
            parse_read(&request.resource_name).map_err(|e| Status::invalid_argument(e.to_string()))?;
        check_instance(&instance)?;
        let offset = u64::try_from(request.read_offset)
            .ok()
            .filter(|offset| *offset <= blob.size)
            .ok_or_else(|| Status::out_of_range(format!("offset {} is not in blob {blob}", request.read_offset)))?;
        let limit = match u64::try_from(request.read_limit) {
            Ok(0) => u64::MAX,
            Ok(limit) => limit,
            Err(_) => return Err(Status::invalid_argument("read_limit is negative")),
        };
        let end = blob.size.min(offset.saturating_add(limit));
        let store = self.store.clone();
        // Before the stream begins, so that a missing blob is the status of the call.
        self.store.bring(&[blob]).await.map_err(status)?;
        let file = blocking(move || match store.open_object(&blob) {
            Ok(Some(file)) => Ok(Bytes::File(file)),
            Ok(None) => store.read_blob(&blob).map(Bytes::Memory),
            Err(error) => Err(error),
        })
        .await?
        .map_err(status)?;
        let (sender, receiver) = mpsc::channel(PIECES);
        let (store, metrics) = (self.store.clone(), self.metrics.clone());
        tokio::task::spawn_blocking(move || {
            if let Err(error) = send(&store, blob, &file, offset..end, &sender, &metrics) {
                let _ = sender.blocking_send(Err(error));
            }
        });
        Ok(ReceiverStream::new(receiver))
    }

    async fn write_blob(&self, mut requests: Streaming<WriteRequest>) -> Result<WriteResponse, Status> {
        let mut request =
            next(&mut requests).await?.ok_or_else(|| Status::invalid_argument("a write needs at least one request"))?;
        let UploadName { instance, id, blob } =
            parse_upload(&request.resource_name).map_err(|e| Status::invalid_argument(e.to_string()))?;
        check_instance(&instance)?;
        let store = self.store.clone();
        if blocking(move || store.contains(&blob)).await?.map_err(status)? {
            // REAPI: no need to send what is here already.
            return Ok(WriteResponse { committed_size: signed(blob.size) });
        }
        let name = request.resource_name.clone();
        let key = (id, blob);
        let upload = self.upload(&key);
        let mut ingest = upload
            .ingest
            .clone()
            .try_lock_owned()
            .map_err(|_| Status::aborted(format!("another call is writing {name}")))?;
        if request.write_offset == 0 {
            // A client that does not ask begins again.
            *ingest = None;
        }
        loop {
            if !request.resource_name.is_empty() && request.resource_name != name {
                return Err(Status::invalid_argument("the resource name changed within one write"));
            }
            let written = ingest.as_ref().map_or(0, Ingest::written);
            // Pieces of a call whose connection broke may still arrive after its client asked where to go on, so a
            // client may be behind. What it sends twice is skipped: the digest decides about the whole anyway.
            let behind = u64::try_from(request.write_offset).ok().and_then(|offset| written.checked_sub(offset));
            let Some(behind) = behind else {
                return Err(Status::invalid_argument(format!(
                    "write_offset is {}, but {written} bytes of {name} have been written",
                    request.write_offset
                )));
            };
            self.metrics.received(request.data.len() as u64);
            let finish = request.finish_write;
            let store = self.store.clone();
            let appended;
            (ingest, appended) = blocking(move || {
                let mut ingest = ingest;
                let result = append(&store, blob, &mut ingest, after(&request.data, behind));
                (ingest, result)
            })
            .await?;
            if let Err(error) = appended {
                self.forget(&key);
                return Err(error);
            }
            upload.touch(ingest.as_ref().map_or(0, Ingest::written));
            if finish {
                self.forget(&key);
                return self.finish(blob, ingest).await;
            }
            match next(&mut requests).await? {
                Some(next) => request = next,
                // The client will go on later.
                None => return Ok(WriteResponse { committed_size: signed(upload.written.load(Ordering::Relaxed)) }),
            }
        }
    }

    async fn finish(&self, blob: Blob, mut ingest: OwnedMutexGuard<Option<Ingest>>) -> Result<WriteResponse, Status> {
        let ingest = ingest.take().ok_or_else(|| Status::internal("the upload was lost"))?;
        self.store.finish(ingest).await.map_err(status)?;
        self.metrics.hold(self.store.statistics());
        Ok(WriteResponse { committed_size: signed(blob.size) })
    }

    async fn query(&self, request: QueryWriteStatusRequest) -> Result<QueryWriteStatusResponse, Status> {
        let UploadName { instance, id, blob } =
            parse_upload(&request.resource_name).map_err(|e| Status::invalid_argument(e.to_string()))?;
        check_instance(&instance)?;
        let store = self.store.clone();
        if blocking(move || store.contains(&blob)).await?.map_err(status)? {
            return Ok(QueryWriteStatusResponse { committed_size: signed(blob.size), complete: true });
        }
        match self.lock().get(&(id, blob)) {
            Some(upload) => Ok(QueryWriteStatusResponse {
                committed_size: signed(upload.written.load(Ordering::Relaxed)),
                complete: false,
            }),
            None => Err(Status::not_found(format!("there is no upload {}", request.resource_name))),
        }
    }

    /// The upload of this name, new or begun; drops those that nobody has come back for.
    fn upload(&self, key: &(String, Blob)) -> Arc<Upload> {
        let mut uploads = self.lock();
        uploads.retain(|other, upload| other == key || !upload.is_abandoned());
        uploads.entry(key.clone()).or_insert_with(|| Arc::new(Upload::new())).clone()
    }

    fn forget(&self, key: &(String, Blob)) {
        self.lock().remove(key);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(String, Blob), Arc<Upload>>> {
        self.uploads.lock().unwrap_or_else(|e| e.into_inner())
    }
}

fn append(store: &TieredStore, blob: Blob, ingest: &mut Option<Ingest>, data: &[u8]) -> Result<(), Status> {
    let ingest = match ingest {
        Some(ingest) => ingest,
        empty => empty.insert(store.begin(blob).map_err(status)?),
    };
    ingest.append(data).map_err(status)
}

/// What is left of `data` without its first `count` bytes.
fn after(data: &[u8], count: u64) -> &[u8] {
    usize::try_from(count).ok().and_then(|count| data.get(count..)).unwrap_or_default()
}

async fn next(requests: &mut Streaming<WriteRequest>) -> Result<Option<WriteRequest>, Status> {
    tokio::time::timeout(STALL, requests.message())
        .await
        .map_err(|_| Status::deadline_exceeded(format!("no piece came for {} s", STALL.as_secs())))?
}

enum Bytes {
    Memory(bytes::Bytes),
    File(File),
}

/// Sends a range of a blob; verifies the whole blob when all of it is sent.
fn send(
    store: &TieredStore,
    blob: Blob,
    bytes: &Bytes,
    range: std::ops::Range<u64>,
    sender: &mpsc::Sender<Result<ReadResponse, Status>>,
    metrics: &StoreMetrics,
) -> Result<(), Status> {
    let whole = range == (0..blob.size);
    let mut hasher = BlobHasher::new();
    let mut at = range.start;
    while at < range.end {
        let length = usize::try_from(PIECE.min(range.end - at)).unwrap_or(0);
        let data = match bytes {
            Bytes::Memory(all) => {
                let at = usize::try_from(at).unwrap_or(usize::MAX);
                all[at..at + length].to_vec()
            }
            Bytes::File(file) => {
                let mut data = vec![0; length];
                if let Err(error) = file.read_exact_at(&mut data, at) {
                    tracing::error!(%blob, %error, "cannot read a blob");
                    // Sets the copy aside if it is too short.
                    store.verify(&blob).map_err(status)?;
                    return Err(Status::internal(format!("cannot read blob {blob}: {error}")));
                }
                data
            }
        };
        if whole {
            hasher.update(&data);
        }
        at += data.len() as u64;
        if whole && at == range.end && hasher.finish() != blob {
            // Before the last piece, so that no client has all of it without hearing.
            store.verify(&blob).map_err(status)?;
            return Err(Status::data_loss(format!("blob {blob} was read wrongly")));
        }
        metrics.sent(data.len() as u64);
        if sender.blocking_send(Ok(ReadResponse { data })).is_err() {
            return Ok(());
        }
    }
    Ok(())
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
