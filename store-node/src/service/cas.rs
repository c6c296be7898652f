//! ContentAddressableStorage: batches of small blobs, and whole trees of directories.
//!
//! Not offered: the splitting of blobs into chunks.

use std::collections::HashSet;

use aether_cas::{Blob, ContentName, StoreError, sha256::DigestFunction, store::verify};
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
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use super::{
    MAX_BATCH_BYTES, blocking, check_function, check_instance, mismatch, missing, name_again, parse_digest,
    parse_digests, resolve, status, tree::Tree, zstd,
};
use crate::{
    metrics::{Call, StoreMetrics},
    page_token::PageToken,
    tiered::TieredStore,
};

/// Pages of a tree waiting to be sent.
const PAGES: usize = 1;

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
        let function = check_function(request.digest_function)?;
        let names = parse_digests(function, &request.blob_digests)?;
        let blobs = resolve(&self.store, names.clone()).await?;
        let asked: Vec<Blob> = blobs.iter().flatten().copied().collect();
        let absent: HashSet<Blob> = self.store.find_missing(&asked).await.map_err(status)?.into_iter().collect();
        let known = names.iter().zip(&blobs).filter_map(|(name, blob)| Some((*name, (*blob)?)));
        name_again(&self.store, known.filter(|(_, blob)| !absent.contains(blob)).collect()).await?;
        let mut seen = HashSet::new();
        let missing = names
            .into_iter()
            .zip(blobs)
            .filter(|(name, blob)| blob.is_none_or(|blob| absent.contains(&blob)) && seen.insert(*name));
        Ok(FindMissingBlobsResponse { missing_blob_digests: missing.map(|(name, _)| name.into()).collect() })
    }

    async fn update(&self, request: BatchUpdateBlobsRequest) -> Result<BatchUpdateBlobsResponse, Status> {
        check_instance(&request.instance_name)?;
        let function = check_function(request.digest_function)?;
        let announced =
            |digest: &Option<reapi::Digest>| digest.as_ref().map_or(0, |d| d.size_bytes.max(0).unsigned_abs());
        check_batch(request.requests.iter().map(|r| announced(&r.digest).max(r.data.len() as u64)))?;
        self.metrics.received(request.requests.iter().map(|r| r.data.len() as u64).sum());

        // Decompressing and hashing is work for another thread.
        let updates: Vec<(Option<reapi::Digest>, Result<Update, Status>)> = blocking(move || {
            request
                .requests
                .into_iter()
                .map(|request| (request.digest.clone(), parse_update(function, request)))
                .collect()
        })
        .await?;
        let mut outcomes = Vec::with_capacity(updates.len());
        let mut writes = Vec::new();
        let mut names = Vec::new();
        for (digest, update) in updates {
            let outcome = update.map(|update| {
                if let ContentName::Sha256(name) = update.name {
                    names.push((name, update.blob));
                }
                writes.push((update.blob, update.data));
                (update.name, update.blob)
            });
            outcomes.push((digest, outcome));
        }
        let mut refused = HashSet::new();
        let mut written = match self.store.write_batch(writes.clone()).await {
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
        if written.is_ok() && !names.is_empty() {
            let store = self.store.clone();
            written = blocking(move || store.name(&names)).await?;
        }
        let failed = written.err().map(status);
        let responses = outcomes.into_iter().map(|(digest, outcome)| {
            let outcome = outcome.and_then(|(name, blob)| match &failed {
                _ if refused.contains(&blob) => Err(mismatch(&name)),
                Some(failed) => Err(failed.clone()),
                None => Ok(()),
            });
            batch_update_blobs_response::Response { digest, status: Some(rpc_status(outcome)) }
        });
        Ok(BatchUpdateBlobsResponse { responses: responses.collect() })
    }

    async fn read(&self, request: BatchReadBlobsRequest) -> Result<BatchReadBlobsResponse, Status> {
        check_instance(&request.instance_name)?;
        let function = check_function(request.digest_function)?;
        let names = parse_digests(function, &request.digests)?;
        check_batch(names.iter().map(ContentName::size))?;
        let compress = request.acceptable_compressors.contains(&(compressor::Value::Zstd as i32));
        let blobs = resolve(&self.store, names.clone()).await?;
        let present: Vec<Blob> = blobs.iter().flatten().copied().collect();
        self.store.bring(&present).await.map_err(status)?;
        let store = self.store.clone();
        let responses: Vec<_> = blocking(move || {
            let read = |(name, blob): (ContentName, Option<Blob>)| {
                let data = blob.ok_or_else(|| missing(&name)).and_then(|blob| store.read_blob(&blob).map_err(status));
                response(name, data, compress)
            };
            names.into_iter().zip(blobs).map(read).collect()
        })
        .await?;
        self.metrics.sent(responses.iter().map(|r| r.data.len() as u64).sum());
        Ok(BatchReadBlobsResponse { responses })
    }

    async fn tree(&self, request: GetTreeRequest) -> Result<ReceiverStream<Result<GetTreeResponse, Status>>, Status> {
        check_instance(&request.instance_name)?;
        let function = check_function(request.digest_function)?;
        let root = parse_digest(function, request.root_digest.as_ref())?;
        let begin = match request.page_token.as_str() {
            "" => PageToken { root, skip: 0 },
            token => PageToken::parse(token)
                .filter(|token| token.root == root)
                .ok_or_else(|| Status::invalid_argument(format!("page_token {token:?} is not one of this tree")))?,
        };
        let page_size = usize::try_from(request.page_size).ok().filter(|size| *size > 0).unwrap_or(usize::MAX);
        let tree = Tree { store: self.store.clone(), metrics: self.metrics.clone(), function, begin, page_size };
        // Before the stream begins, so that a missing root is the status of the call.
        let (tree, directory) = blocking(move || tree.directory(&root).map(|directory| (tree, directory))).await??;
        let (sender, receiver) = mpsc::channel(PAGES);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = tree.send(directory, &sender) {
                let _ = sender.blocking_send(Err(error));
            }
        });
        Ok(ReceiverStream::new(receiver))
    }
}

/// A blob of a batch. By SHA-256 it is verified, by BLAKE3 it will be when it is written.
struct Update {
    name: ContentName,
    blob: Blob,
    data: Bytes,
}

fn parse_update(function: DigestFunction, request: batch_update_blobs_request::Request) -> Result<Update, Status> {
    let name = parse_digest(function, request.digest.as_ref())?;
    let data = match compressor::Value::try_from(request.compressor) {
        Ok(compressor::Value::Identity) => request.data,
        Ok(compressor::Value::Zstd) => {
            zstd::decompress(&request.data, usize::try_from(name.size()).unwrap_or(usize::MAX)).map_err(|error| {
                Status::invalid_argument(format!("the data sent is not blob {name}: {}", error.message()))
            })?
        }
        _ => return Err(Status::invalid_argument(format!("blob {name} is compressed by other means than zstd"))),
    };
    let blob = match name {
        ContentName::Blake3(blob) => blob,
        ContentName::Sha256(_) if name.matches(&data) => Blob::of(&data),
        ContentName::Sha256(_) => return Err(mismatch(&name)),
    };
    Ok(Update { name, blob, data: data.into() })
}

fn response(name: ContentName, data: Result<Bytes, Status>, compress: bool) -> batch_read_blobs_response::Response {
    let (data, outcome) = match data {
        Ok(data) => (data, Ok(())),
        Err(error) => (Bytes::new(), Err(error)),
    };
    let (data, compressor) = match compress.then(|| zstd::compress(&data)).flatten() {
        Some(compressed) => (compressed, compressor::Value::Zstd),
        None => (data.into(), compressor::Value::Identity),
    };
    let (digest, status) = (Some(name.into()), Some(rpc_status(outcome)));
    batch_read_blobs_response::Response { digest, data, compressor: compressor as i32, status }
}

fn check_batch(sizes: impl Iterator<Item = u64>) -> Result<(), Status> {
    let bytes = sizes.fold(0, u64::saturating_add);
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
