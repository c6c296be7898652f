//! One store node, or any other REAPI cache with BLAKE3.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use aether_credentials::Connection;
use async_trait::async_trait;
use bazel_remote_apis::{
    build::bazel::remote::execution::v2::{
        self as reapi, capabilities_client::CapabilitiesClient,
        content_addressable_storage_client::ContentAddressableStorageClient, digest_function,
    },
    google::{bytestream::byte_stream_client::ByteStreamClient, rpc},
};
use bytes::Bytes;
use prost::Message;
use tokio::sync::Semaphore;
use tonic::{Code, Status, transport::Endpoint};

use super::RemoteConfig;
use crate::{
    Blob, Store, StoreError,
    store::{Result, verify},
    transfer::{ASK_BLOBS, BATCH_BYTES, BLOB_OVERHEAD},
};

/// Messages may be larger than a batch of blobs: names take room too.
const MAX_MESSAGE: usize = 16 << 20;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A server that answers that it is busy is there: it is tried again for so many times as long as one that is away.
const BUSY: u32 = 6;
const BLAKE3: i32 = digest_function::Value::Blake3 as i32;

/// One node. Clones share its connection.
#[derive(Clone)]
pub(super) struct NodeClient(pub(super) Arc<Inner>);

pub(super) struct Inner {
    name: String,
    pub(super) stall: Duration,
    patience: Duration,
    /// Most bytes of blobs in one message, by us and by the server.
    batch_bytes: AtomicU64,
    calls: Semaphore,
    channel: Connection,
    /// Makes ids of uploads unique: start of this process's store, and a count.
    pub(super) upload_prefix: String,
    pub(super) uploads: AtomicU64,
}

impl NodeClient {
    /// A store that connects when it is first used, and again after every interruption; `at` one of the addresses of its
    /// name. Must be called within a Tokio runtime.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for a bad address.
    pub(super) fn lazy(config: &RemoteConfig, at: Option<SocketAddr>) -> Result<Self> {
        let invalid = |problem: String| {
            StoreError::Invalid(format!(
                "{:?} is not the address of a store: {problem}; expected for example http://aether-store:8980",
                config.uri
            ))
        };
        let endpoint = Endpoint::from_shared(config.uri.clone())
            .map_err(|e| invalid(e.to_string()))?
            .connect_timeout(Duration::from_secs(5))
            .http2_keep_alive_interval(Duration::from_secs(20))
            .keep_alive_timeout(Duration::from_secs(10))
            .initial_connection_window_size(8 << 20)
            .initial_stream_window_size(4 << 20)
            .tcp_nodelay(true);
        if !matches!(endpoint.uri().scheme_str(), Some("http" | "https")) {
            return Err(invalid("it needs http:// or https://".to_owned()));
        }
        let channel = config.credentials.connect_at(&endpoint, at).map_err(|error| invalid(error.to_string()))?;
        let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
        Ok(Self(Arc::new(Inner {
            name: at.map_or_else(|| config.uri.clone(), |address| format!("{} at {address}", config.uri)),
            stall: config.stall,
            patience: config.patience,
            batch_bytes: AtomicU64::new(BATCH_BYTES),
            calls: Semaphore::new(config.concurrency.max(1)),
            channel,
            upload_prefix: format!("{started:x}-{:x}", std::process::id()),
            uploads: AtomicU64::new(0),
        })))
    }

    /// Asks the server what it can do.
    ///
    /// # Errors
    /// As [`super::RemoteStore::connect`].
    pub(super) async fn check(&self) -> Result<()> {
        let answer = self
            .call("ask for its capabilities", || async {
                CapabilitiesClient::new(self.0.channel.clone())
                    .get_capabilities(reapi::GetCapabilitiesRequest::default())
                    .await
            })
            .await?;
        let cache = answer.into_inner().cache_capabilities.unwrap_or_default();
        if !cache.digest_functions.contains(&BLAKE3) {
            return Err(StoreError::Invalid(format!("the store {} does not support BLAKE3 digests", self.0.name)));
        }
        // Zero means that the server sets no limit.
        if let Ok(limit @ 1..) = u64::try_from(cache.max_batch_total_size_bytes) {
            self.0.batch_bytes.store(limit.min(BATCH_BYTES), Ordering::Relaxed);
        }
        Ok(())
    }

    fn cas(&self) -> ContentAddressableStorageClient<Connection> {
        ContentAddressableStorageClient::new(self.0.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }

    pub(super) fn bytestream(&self) -> ByteStreamClient<Connection> {
        ByteStreamClient::new(self.0.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// Makes a call with its bounds; tries again while the server is not there.
    async fn call<T, F>(&self, action: &str, make: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let _permit = self.permit().await?;
        let mut patience = self.patience();
        loop {
            match self.bounded(make()).await {
                Ok(answer) => return Ok(answer),
                Err(status) if patience.wait_after(&status).await => {
                    tracing::debug!(store = %self.0.name, action, %status, "trying again");
                }
                Err(status) => return Err(self.error(action, &status)),
            }
        }
    }

    /// Waits no longer than a stall for `call`; a broken connection becomes UNAVAILABLE.
    pub(super) async fn bounded<T>(&self, call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        match tokio::time::timeout(self.0.stall, call).await {
            Ok(result) => result.map_err(broken_is_unavailable),
            Err(_) => Err(self.stalled()),
        }
    }

    pub(super) fn patience(&self) -> Patience {
        Patience::new(self.0.patience)
    }

    /// The right to a call. It is kept while the call is tried again, so that waiting for it costs no patience.
    pub(super) async fn permit(&self) -> Result<tokio::sync::SemaphorePermit<'_>> {
        self.0.calls.acquire().await.map_err(|_| StoreError::Closed(self.0.name.clone()))
    }

    pub(super) fn stalled(&self) -> Status {
        Status::deadline_exceeded(format!("no answer for {} s", self.0.stall.as_secs()))
    }

    pub(super) fn error(&self, action: &str, status: &Status) -> StoreError {
        StoreError::Remote {
            action: action.to_owned(),
            store: self.0.name.clone(),
            message: format!("{:?}: {}", status.code(), status.message()),
            code: status.code(),
        }
    }

    pub(super) fn not_found(&self, blob: Blob) -> StoreError {
        StoreError::NotFound { blob, store: self.0.name.clone() }
    }

    pub(super) fn corrupt(&self, blob: Blob, reason: &str) -> StoreError {
        StoreError::Corrupt { blob, store: self.0.name.clone(), reason: reason.to_owned() }
    }

    /// The error of one blob of a batch; `None` if it went well.
    fn blob_error(&self, action: &str, blob: Blob, status: Option<&rpc::Status>) -> Option<StoreError> {
        let status = status.filter(|status| status.code != 0)?;
        Some(match Code::from(status.code) {
            Code::NotFound => self.not_found(blob),
            Code::DataLoss => self.corrupt(blob, &status.message),
            code => self.error(&format!("{action} blob {blob}"), &Status::new(code, status.message.clone())),
        })
    }

    fn batch_bytes(&self) -> u64 {
        self.0.batch_bytes.load(Ordering::Relaxed)
    }

    /// Whether a blob goes into a batch rather than a stream.
    fn is_small(&self, blob: &Blob) -> bool {
        blob.size + BLOB_OVERHEAD <= self.batch_bytes()
    }

    /// Splits small blobs so that each part fits a message.
    fn messages<T>(&self, blobs: Vec<T>, blob: impl Fn(&T) -> Blob) -> Vec<Vec<T>> {
        let limit = self.batch_bytes();
        let mut messages: Vec<Vec<T>> = Vec::new();
        let mut bytes = u64::MAX;
        for item in blobs {
            let cost = blob(&item).size + BLOB_OVERHEAD;
            match messages.last_mut() {
                Some(last) if bytes + cost <= limit => {
                    bytes += cost;
                    last.push(item);
                }
                _ => {
                    bytes = cost;
                    messages.push(vec![item]);
                }
            }
        }
        messages
    }

    async fn read_message(&self, blobs: &[Blob], into: &mut HashMap<Blob, Bytes>) -> Result<()> {
        let request = reapi::BatchReadBlobsRequest {
            digests: blobs.iter().map(|blob| (*blob).into()).collect(),
            digest_function: BLAKE3,
            ..Default::default()
        };
        let action = match blobs {
            [blob] => format!("read blob {blob}"),
            _ => format!("read {} blobs", blobs.len()),
        };
        let answer = self
            .call(&action, || {
                let (mut client, request) = (self.cas(), request.clone());
                async move { client.batch_read_blobs(request).await }
            })
            .await?;
        for response in answer.into_inner().responses {
            let Some(Ok(blob)) = response.digest.as_ref().map(Blob::try_from) else {
                continue;
            };
            if let Some(error) = self.blob_error("read", blob, response.status.as_ref()) {
                return Err(error);
            }
            let data = Bytes::from(response.data);
            verify(blob, &data)?;
            into.insert(blob, data);
        }
        Ok(())
    }

    async fn write_message(&self, blobs: Vec<(Blob, Bytes)>) -> Result<()> {
        let action = match &blobs[..] {
            [(blob, _)] => format!("write blob {blob}"),
            _ => format!("write {} blobs", blobs.len()),
        };
        let answer = self
            .call(&action, || {
                let requests = blobs
                    .iter()
                    .map(|(blob, data)| reapi::batch_update_blobs_request::Request {
                        digest: Some((*blob).into()),
                        data: data.to_vec(),
                        ..Default::default()
                    })
                    .collect();
                let request =
                    reapi::BatchUpdateBlobsRequest { requests, digest_function: BLAKE3, ..Default::default() };
                let mut client = self.cas();
                async move { client.batch_update_blobs(request).await }
            })
            .await?;
        let mut unanswered: HashSet<Blob> = blobs.iter().map(|(blob, _)| *blob).collect();
        for response in answer.into_inner().responses {
            let Some(Ok(blob)) = response.digest.as_ref().map(Blob::try_from) else {
                continue;
            };
            if let Some(error) = self.blob_error("write", blob, response.status.as_ref()) {
                return Err(error);
            }
            unanswered.remove(&blob);
        }
        match unanswered.into_iter().next() {
            None => Ok(()),
            Some(blob) => Err(self
                .error(&format!("write blob {blob}"), &Status::internal("the server did not say what became of it"))),
        }
    }

    async fn read_tree_messages(&self, root: Blob) -> Result<Vec<(Blob, Bytes)>, Status> {
        let request =
            reapi::GetTreeRequest { root_digest: Some(root.into()), digest_function: BLAKE3, ..Default::default() };
        let mut client = self.cas();
        let mut stream = self.bounded(client.get_tree(request)).await?.into_inner();
        let mut directories = Vec::new();
        loop {
            let Some(page) = self.bounded(stream.message()).await? else {
                return Ok(directories);
            };
            directories.extend(page.directories.iter().map(|directory| {
                // What a canonical message becomes when it is decoded and encoded is itself; anything
                // else gets another name here and is not asked for by anybody.
                let message = Bytes::from(directory.encode_to_vec());
                (Blob::of(&message), message)
            }));
        }
    }
}

/// Since when a call is tried again, and how long the next pause is.
pub(super) struct Patience {
    /// Since when nobody has answered.
    away: Option<Instant>,
    /// Since when the answer is that the server is busy.
    busy: Option<Instant>,
    pause: Duration,
    limit: Duration,
}

impl Patience {
    pub(super) fn new(limit: Duration) -> Self {
        Self { away: None, busy: None, pause: FIRST_PAUSE, limit }
    }

    /// Pauses, and says whether to try again what nobody did.
    pub(super) async fn wait(&mut self) -> bool {
        let since = *self.away.get_or_insert_with(Instant::now);
        self.pause(since, self.limit).await
    }

    /// Pauses, and says whether to try again what ended so.
    pub(super) async fn wait_after(&mut self, status: &Status) -> bool {
        use std::error::Error;
        match status.code() {
            Code::Unavailable if status.source().is_some() => self.wait().await,
            // The server says so itself; ABORTED while an earlier call still writes the same upload.
            Code::Unavailable | Code::Aborted => {
                self.away = None;
                let since = *self.busy.get_or_insert_with(Instant::now);
                self.pause(since, self.limit * BUSY).await
            }
            _ => false,
        }
    }

    async fn pause(&mut self, since: Instant, limit: Duration) -> bool {
        if since.elapsed() >= limit {
            return false;
        }
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        true
    }
}

/// What a server said has no source; what happened on the way to it has: it is not there, or has gone.
pub(super) fn broken_is_unavailable(status: Status) -> Status {
    use std::error::Error;
    let Some(mut cause) = status.source() else {
        return status;
    };
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    let mut unavailable = Status::unavailable(format!("{}: {cause}", status.message()));
    unavailable.set_source(Arc::new(status));
    unavailable
}

#[async_trait]
impl Store for NodeClient {
    async fn find_missing(&self, blobs: &[Blob]) -> Result<Vec<Blob>> {
        let mut seen = HashSet::new();
        let asked: Vec<Blob> = blobs.iter().copied().filter(|blob| !blob.is_empty() && seen.insert(*blob)).collect();
        let mut missing = HashSet::new();
        for chunk in asked.chunks(ASK_BLOBS) {
            let request = reapi::FindMissingBlobsRequest {
                blob_digests: chunk.iter().map(|blob| (*blob).into()).collect(),
                digest_function: BLAKE3,
                ..Default::default()
            };
            let answer = self
                .call("find missing blobs", || {
                    let (mut client, request) = (self.cas(), request.clone());
                    async move { client.find_missing_blobs(request).await }
                })
                .await?;
            for digest in &answer.into_inner().missing_blob_digests {
                let blob = Blob::try_from(digest)
                    .map_err(|e| self.error("find missing blobs", &Status::internal(e.to_string())))?;
                missing.insert(blob);
            }
        }
        Ok(asked.into_iter().filter(|b| missing.contains(b)).collect())
    }

    async fn read(&self, blob: Blob) -> Result<Bytes> {
        let data = self.read_batch(&[blob]).await?;
        data.into_iter().next().ok_or_else(|| self.not_found(blob))
    }

    async fn read_batch(&self, blobs: &[Blob]) -> Result<Vec<Bytes>> {
        let mut data = HashMap::from([(Blob::EMPTY, Bytes::new())]);
        let mut seen = HashSet::from([Blob::EMPTY]);
        let (small, large): (Vec<Blob>, Vec<Blob>) =
            blobs.iter().copied().filter(|blob| seen.insert(*blob)).partition(|blob| self.is_small(blob));
        for message in self.messages(small, |blob| *blob) {
            self.read_message(&message, &mut data).await?;
        }
        for blob in large {
            data.insert(blob, self.read_stream(blob).await?);
        }
        blobs.iter().map(|blob| data.get(blob).cloned().ok_or_else(|| self.not_found(*blob))).collect()
    }

    async fn fetch_to(&self, blob: Blob, path: &Path) -> Result<()> {
        self.fetch_stream(blob, path).await
    }

    async fn write_batch(&self, blobs: Vec<(Blob, Bytes)>) -> Result<()> {
        let mut small = Vec::new();
        for (blob, data) in blobs {
            if blob.is_empty() && data.is_empty() {
                continue;
            }
            verify(blob, &data)?;
            if self.is_small(&blob) {
                small.push((blob, data));
            } else {
                self.write_stream(blob, data).await?;
            }
        }
        for message in self.messages(small, |(blob, _)| *blob) {
            self.write_message(message).await?;
        }
        Ok(())
    }

    async fn write_file(&self, blob: Blob, path: &Path) -> Result<()> {
        if self.is_small(&blob) {
            let data = tokio::fs::read(path).await.map_err(StoreError::io("read", path))?;
            return self.write_batch(vec![(blob, data.into())]).await;
        }
        self.write_file_stream(blob, path).await
    }

    async fn read_tree(&self, root: Blob) -> Result<Vec<(Blob, Bytes)>> {
        let action = format!("read tree {root}");
        let _permit = self.permit().await?;
        match self.read_tree_messages(root).await {
            Ok(directories) => Ok(directories),
            Err(status) if status.code() == Code::NotFound => Err(self.not_found(root)),
            // GetTree is optional in REAPI; the caller reads directories one by one then.
            Err(status) if status.code() == Code::Unimplemented => Ok(Vec::new()),
            Err(status) => Err(self.error(&action, &status)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn away() -> Status {
        let mut status = Status::unknown("transport error");
        status.set_source(Arc::new(std::io::Error::other("connection refused")));
        broken_is_unavailable(status)
    }

    #[tokio::test]
    async fn who_is_busy_is_tried_longer_than_who_is_away() {
        let limit = Duration::from_millis(200);
        let (away, busy) = (away(), Status::unavailable("as many calls as it takes"));
        assert_eq!(away.code(), Code::Unavailable);
        let mut patience = Patience::new(limit);
        // However long the first try took.
        tokio::time::sleep(2 * limit).await;
        assert!(patience.wait_after(&away).await);
        tokio::time::sleep(limit).await;
        assert!(!patience.wait_after(&away).await);
        assert!(patience.wait_after(&busy).await && patience.wait_after(&busy).await);
        assert!(patience.wait_after(&away).await, "it was there meanwhile");
        tokio::time::sleep(limit * BUSY).await;
        assert!(!patience.wait_after(&busy).await);
        assert!(!Patience::new(limit).wait_after(&Status::not_found("")).await);
        let mut none = Patience::new(Duration::ZERO);
        assert!(!none.wait_after(&busy).await && !none.wait_after(&away).await && !none.wait().await);
    }
}
