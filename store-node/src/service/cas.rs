//! ContentAddressableStorage: batches of small blobs, and whole trees of directories.
//!
//! Not offered: compressed blobs, and the splitting of blobs into chunks.

use std::collections::{HashSet, VecDeque};

use aether_cas::{Blob, StoreError, store::verify, transfer::BLOB_OVERHEAD, tree::MAX_DIRECTORY_BYTES};
use bazel_remote_apis::{
    build::bazel::remote::execution::v2::{
        self as reapi, BatchReadBlobsRequest, BatchReadBlobsResponse, BatchUpdateBlobsRequest,
        BatchUpdateBlobsResponse, FindMissingBlobsRequest, FindMissingBlobsResponse, GetChunkMappingRequest,
        GetChunkMappingResponse, GetTreeRequest, GetTreeResponse, RegisterChunkMappingRequest,
        RegisterChunkMappingResponse, SpliceBlobRequest, SpliceBlobResponse, SplitBlobRequest, SplitBlobResponse,
        batch_read_blobs_response, batch_update_blobs_request, batch_update_blobs_response, compressor,
        content_addressable_storage_server::ContentAddressableStorage,
    },
    google::rpc,
};
use bytes::Bytes;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use super::{MAX_BATCH_BYTES, blocking, check_function, check_instance, parse_digest, status};
use crate::{
    metrics::{Call, StoreMetrics},
    tiered::TieredStore,
};

/// Pages of a tree waiting to be sent.
const PAGES: usize = 2;
/// Directories of a tree that are brought from the bucket together.
const LEVEL: usize = 4096;

pub(crate) struct CasService {
    store: TieredStore,
    metrics: StoreMetrics,
}

impl CasService {
    pub(crate) fn new(store: TieredStore, metrics: StoreMetrics) -> Self {
        Self { store, metrics }
    }

    async fn find(&self, request: FindMissingBlobsRequest) -> Result<FindMissingBlobsResponse, Status> {
        check_instance(&request.instance_name)?;
        check_function(request.digest_function)?;
        let blobs = request.blob_digests.iter().map(|d| parse_digest(Some(d))).collect::<Result<Vec<_>, _>>()?;
        let missing = self.store.find_missing(&blobs).await.map_err(status)?;
        Ok(FindMissingBlobsResponse { missing_blob_digests: missing.into_iter().map(reapi::Digest::from).collect() })
    }

    async fn update(&self, request: BatchUpdateBlobsRequest) -> Result<BatchUpdateBlobsResponse, Status> {
        check_instance(&request.instance_name)?;
        check_function(request.digest_function)?;
        let bytes = request.requests.iter().map(|r| r.data.len() as u64).sum();
        check_batch(bytes)?;
        self.metrics.received(bytes);

        let mut outcomes = Vec::with_capacity(request.requests.len());
        let mut writes = Vec::new();
        for request in request.requests {
            let digest = request.digest.clone();
            match parse_update(request) {
                Ok((blob, data)) => {
                    outcomes.push((digest, Ok(blob)));
                    writes.push((blob, data));
                }
                Err(error) => outcomes.push((digest, Err(error))),
            }
        }
        let mut refused = HashSet::new();
        let written = match self.store.write_batch(writes.clone()).await {
            Err(StoreError::Mismatch { .. }) => {
                // Rare: find out which, and store the others.
                let (good, bad) = blocking(move || {
                    writes.into_iter().partition::<Vec<_>, _>(|(blob, data)| verify(*blob, data).is_ok())
                })
                .await?;
                refused.extend(bad.into_iter().map(|(blob, _)| blob));
                self.store.write_batch(good).await
            }
            other => other,
        };
        let failed = written.err().map(status);
        let responses = outcomes.into_iter().map(|(digest, outcome)| {
            let outcome = outcome.and_then(|blob| match &failed {
                _ if refused.contains(&blob) => {
                    Err(Status::invalid_argument(format!("the data sent is not blob {blob}")))
                }
                Some(failed) => Err(failed.clone()),
                None => Ok(()),
            });
            batch_update_blobs_response::Response { digest, status: Some(rpc_status(outcome)) }
        });
        Ok(BatchUpdateBlobsResponse { responses: responses.collect() })
    }

    async fn read(&self, request: BatchReadBlobsRequest) -> Result<BatchReadBlobsResponse, Status> {
        check_instance(&request.instance_name)?;
        check_function(request.digest_function)?;
        let blobs = request.digests.iter().map(|d| parse_digest(Some(d))).collect::<Result<Vec<_>, _>>()?;
        check_batch(blobs.iter().fold(0, |sum: u64, blob| sum.saturating_add(blob.size)))?;
        self.store.bring(&blobs).await.map_err(status)?;
        let store = self.store.clone();
        let responses: Vec<_> = blocking(move || {
            blobs
                .into_iter()
                .map(|blob| {
                    let (data, outcome) = match store.read_blob(&blob) {
                        Ok(data) => (data.into(), Ok(())),
                        Err(error) => (Vec::new(), Err(status(error))),
                    };
                    batch_read_blobs_response::Response {
                        digest: Some(blob.into()),
                        data,
                        status: Some(rpc_status(outcome)),
                        ..Default::default()
                    }
                })
                .collect()
        })
        .await?;
        self.metrics.sent(responses.iter().map(|r| r.data.len() as u64).sum());
        Ok(BatchReadBlobsResponse { responses })
    }

    async fn tree(&self, request: GetTreeRequest) -> Result<ReceiverStream<Result<GetTreeResponse, Status>>, Status> {
        check_instance(&request.instance_name)?;
        check_function(request.digest_function)?;
        if !request.page_token.is_empty() {
            return Err(Status::invalid_argument("page_token is not known: the whole tree comes in one stream"));
        }
        let root = parse_digest(request.root_digest.as_ref())?;
        let page = usize::try_from(request.page_size).ok().filter(|size| *size > 0).unwrap_or(usize::MAX);
        let store = self.store.clone();
        // Before the stream begins, so that a missing root is the status of the call.
        let message = blocking(move || directory(&store, &root)).await??;
        let (sender, receiver) = mpsc::channel(PAGES);
        let (store, metrics) = (self.store.clone(), self.metrics.clone());
        tokio::task::spawn_blocking(move || {
            if let Err(error) = send_tree(root, message, &store, page, &sender, &metrics) {
                let _ = sender.blocking_send(Err(error));
            }
        });
        Ok(ReceiverStream::new(receiver))
    }
}

fn parse_update(request: batch_update_blobs_request::Request) -> Result<(Blob, Bytes), Status> {
    let blob = parse_digest(request.digest.as_ref())?;
    if request.compressor != compressor::Value::Identity as i32 {
        return Err(Status::invalid_argument(format!("blob {blob} is compressed, which this store does not support")));
    }
    Ok((blob, Bytes::from(request.data)))
}

fn check_batch(bytes: u64) -> Result<(), Status> {
    if bytes <= MAX_BATCH_BYTES {
        return Ok(());
    }
    Err(Status::invalid_argument(format!(
        "a batch of {bytes} bytes is more than the {MAX_BATCH_BYTES} allowed (see max_batch_total_size_bytes); \
         use smaller batches, and ByteStream for larger blobs"
    )))
}

fn rpc_status(outcome: Result<(), Status>) -> rpc::Status {
    match outcome {
        Ok(()) => rpc::Status { code: Code::Ok as i32, ..Default::default() },
        Err(status) => {
            rpc::Status { code: status.code() as i32, message: status.message().to_owned(), ..Default::default() }
        }
    }
}

/// Reads a directory of any REAPI client, not only of ours.
fn directory(store: &TieredStore, blob: &Blob) -> Result<reapi::Directory, Status> {
    if blob.size > MAX_DIRECTORY_BYTES as u64 {
        return Err(Status::invalid_argument(format!("blob {blob} is too large for a directory")));
    }
    let data = store.read_blob(blob).map_err(status)?;
    reapi::Directory::decode(data)
        .map_err(|error| Status::invalid_argument(format!("blob {blob} is not a directory: {error}")))
}

/// Sends the directories below `root` breadth-first, each once, in pages that fit a message.
///
/// As REAPI allows, what is missing is left out; so are directories that fit no message, which a client reads as blobs.
fn send_tree(
    root: Blob,
    message: reapi::Directory,
    store: &TieredStore,
    page_entries: usize,
    sender: &mpsc::Sender<Result<GetTreeResponse, Status>>,
    metrics: &StoreMetrics,
) -> Result<(), Status> {
    let mut seen = HashSet::from([root]);
    let mut waiting = VecDeque::new();
    let mut page = GetTreeResponse::default();
    let mut page_bytes = 0;
    let mut next = Some((root, message));
    let mut brought: usize = 0;
    while let Some((blob, message)) = next.take() {
        for child in &message.directories {
            let child = parse_digest(child.digest.as_ref())?;
            if seen.insert(child) {
                waiting.push_back(child);
            }
        }
        let cost = blob.size + BLOB_OVERHEAD;
        if cost <= MAX_BATCH_BYTES {
            if page_bytes + cost > MAX_BATCH_BYTES || page.directories.len() >= page_entries {
                metrics.sent(std::mem::take(&mut page_bytes));
                if sender.blocking_send(Ok(std::mem::take(&mut page))).is_err() {
                    return Ok(());
                }
            }
            page_bytes += cost;
            page.directories.push(message);
        }
        while let Some(blob) = waiting.pop_front() {
            if brought == 0 {
                // Whole levels of the tree at a time, where the disk does not have them.
                let level: Vec<Blob> = std::iter::once(blob).chain(waiting.iter().copied()).take(LEVEL).collect();
                store.bring_now(&level).map_err(status)?;
                brought = level.len();
            }
            brought -= 1;
            match directory(store, &blob) {
                Ok(message) => {
                    next = Some((blob, message));
                    break;
                }
                Err(error) if error.code() == Code::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    metrics.sent(page_bytes);
    // The client may have gone, which is no error of ours.
    let _ = sender.blocking_send(Ok(page));
    Ok(())
}

const CHUNKS: &str = "this store does not split blobs into chunks; see split_blob_support in its capabilities";

#[tonic::async_trait]
impl ContentAddressableStorage for CasService {
    async fn find_missing_blobs(
        &self,
        request: Request<FindMissingBlobsRequest>,
    ) -> Result<Response<FindMissingBlobsResponse>, Status> {
        self.metrics.observe(Call::FindMissing, self.find(request.into_inner())).await.map(Response::new)
    }

    async fn batch_update_blobs(
        &self,
        request: Request<BatchUpdateBlobsRequest>,
    ) -> Result<Response<BatchUpdateBlobsResponse>, Status> {
        let response = self.metrics.observe(Call::BatchUpdate, self.update(request.into_inner())).await?;
        self.metrics.hold(self.store.statistics());
        Ok(Response::new(response))
    }

    async fn batch_read_blobs(
        &self,
        request: Request<BatchReadBlobsRequest>,
    ) -> Result<Response<BatchReadBlobsResponse>, Status> {
        self.metrics.observe(Call::BatchRead, self.read(request.into_inner())).await.map(Response::new)
    }

    type GetTreeStream = ReceiverStream<Result<GetTreeResponse, Status>>;

    async fn get_tree(&self, request: Request<GetTreeRequest>) -> Result<Response<Self::GetTreeStream>, Status> {
        self.metrics.observe(Call::GetTree, self.tree(request.into_inner())).await.map(Response::new)
    }

    async fn split_blob(&self, _: Request<SplitBlobRequest>) -> Result<Response<SplitBlobResponse>, Status> {
        Err(Status::unimplemented(CHUNKS))
    }

    type GetChunkMappingStream = ReceiverStream<Result<GetChunkMappingResponse, Status>>;

    async fn get_chunk_mapping(
        &self,
        _: Request<GetChunkMappingRequest>,
    ) -> Result<Response<Self::GetChunkMappingStream>, Status> {
        Err(Status::unimplemented(CHUNKS))
    }

    async fn splice_blob(&self, _: Request<SpliceBlobRequest>) -> Result<Response<SpliceBlobResponse>, Status> {
        Err(Status::unimplemented(CHUNKS))
    }

    async fn register_chunk_mapping(
        &self,
        _: Request<Streaming<RegisterChunkMappingRequest>>,
    ) -> Result<Response<RegisterChunkMappingResponse>, Status> {
        Err(Status::unimplemented(CHUNKS))
    }
}
