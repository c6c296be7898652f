//! How many calls are in hand at one time, and so how much memory all clients together can make the node use.
//!
//! Every call has a place of its kind from before its message is read until its answer has gone, so a client that reads
//! slowly, or not at all, costs a place and what a place may hold, and keeps only others of that kind waiting. Whoever
//! gets no place in [`PATIENCE`] is told UNAVAILABLE, on which clients try again. A client that is dead or stopped loses
//! its places with its connection, when it does not answer pings.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Status, body::Body};
use tower::{Layer, Service};

/// Places for calls of one message each way.
const CALLS: usize = 10;
/// A message as it came, taken apart and decompressed, or an answer made and written.
const CALL_BYTES: usize = 3 * CALL_MESSAGE_BYTES;
/// Places for whole trees.
const TREES: usize = 4;
/// Three pages, which are larger in memory than as messages.
const TREE_BYTES: usize = 12 << 20;
/// Places for reads of streams.
pub const READS: usize = 64;
/// Four pieces, what HTTP/2 keeps for a stream, and what a compressor needs.
pub const READ_BYTES: usize = 2 << 20;
/// Places for writes of streams.
pub const WRITES: usize = 16;
/// A message as it came and taken apart, and a blob that goes into the index.
pub const WRITE_BYTES: usize = 2 * PIECE_MESSAGE_BYTES + (1 << 20);
/// Writes among them that are compressed.
pub const DECOMPRESSORS: usize = 4;
/// Frames of zstd that need a larger window are refused; this is the window that every decoder is asked to have.
pub const WINDOW_LOG: u32 = 23;
/// The same for a blob of a batch, which is not larger.
pub(crate) const BATCH_WINDOW_LOG: u32 = 22;

/// Bytes of a message that is taken from a stream: gRPC's usual limit.
pub(crate) const PIECE_MESSAGE_BYTES: usize = 4 << 20;
/// Bytes of other messages: some more, so that who sends too large a batch hears of it from us.
pub(crate) const CALL_MESSAGE_BYTES: usize = 5 << 20;
/// What HTTP/2 takes in of a connection before anybody reads it, in all and of one stream.
pub(crate) const CONNECTION_WINDOW: u32 = 2 << 20;
pub(crate) const STREAM_WINDOW: u32 = 1 << 20;
/// Calls of one connection.
pub(crate) const STREAMS: u32 = 64;

/// Most memory that all calls together take, beside [`CONNECTION_WINDOW`] for each connection and what the store itself
/// needs.
pub const MEMORY_BYTES: usize = CALLS * CALL_BYTES
    + TREES * TREE_BYTES
    + READS * READ_BYTES
    + WRITES * WRITE_BYTES
    + DECOMPRESSORS * ((1 << WINDOW_LOG) + (1 << 20));

/// Longest wait for a place.
const PATIENCE: Duration = Duration::from_secs(15);

/// The places of a node.
#[derive(Clone)]
pub(crate) struct Places {
    calls: Arc<Semaphore>,
    trees: Arc<Semaphore>,
    reads: Arc<Semaphore>,
    writes: Arc<Semaphore>,
}

impl Places {
    pub(crate) fn new() -> Self {
        let places = |count| Arc::new(Semaphore::new(count));
        Self { calls: places(CALLS), trees: places(TREES), reads: places(READS), writes: places(WRITES) }
    }

    /// The places for calls of a method; `None` for those that cost next to nothing, and for administration.
    fn of(&self, path: &str) -> Option<(&'static str, &Arc<Semaphore>)> {
        match path {
            "/google.bytestream.ByteStream/Read" => Some(("reads", &self.reads)),
            "/google.bytestream.ByteStream/Write" => Some(("writes", &self.writes)),
            "/build.bazel.remote.execution.v2.ContentAddressableStorage/GetTree" => Some(("trees", &self.trees)),
            path if path.starts_with("/build.bazel.remote.execution.v2.ContentAddressableStorage/") => {
                Some(("calls", &self.calls))
            }
            _ => None,
        }
    }
}

impl<S> Layer<S> for Places {
    type Service = Admission<S>;

    fn layer(&self, inner: S) -> Admission<S> {
        Admission { inner, places: self.clone() }
    }
}

/// Calls that have found a place.
#[derive(Clone)]
pub(crate) struct Admission<S> {
    inner: S,
    places: Places,
}

impl<S> Service<http::Request<Body>> for Admission<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let Some((kind, places)) = self.places.of(request.uri().path()) else {
            return Box::pin(self.inner.call(request));
        };
        let places = places.clone();
        // The one that was found ready, not its copy.
        let other = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, other);
        Box::pin(async move {
            let Ok(Ok(place)) = tokio::time::timeout(PATIENCE, places.acquire_owned()).await else {
                let busy = format!("the store has as many {kind} in hand as it takes; try again");
                return Ok(Status::unavailable(busy).into_http());
            };
            let answer = inner.call(request).await?;
            Ok(answer.map(|body| Body::new(Placed { body, _place: place })))
        })
    }
}

/// An answer, and its call's place until it has gone.
struct Placed {
    body: Body,
    _place: OwnedSemaphorePermit,
}

impl http_body::Body for Placed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
