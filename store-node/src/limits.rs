//! How many calls are in hand at one time, and so how much memory all clients together can make the node use.
//!
//! Every call has a place of its kind from before its message is read until its answer has gone, so a client that reads
//! slowly, or not at all, costs a place and what a place may hold, and keeps only others of that kind waiting. Whoever
//! gets no place in [`PATIENCE`] is told UNAVAILABLE, on which clients try again. Whoever has one must send its message in
//! [`ARRIVAL`]; a stream of messages must go on (see `service::bytestream`). A client that is dead or stopped loses its
//! places with its connection, when it does not answer pings.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Sleep,
};
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
/// Bytes of batches: some more, so that who sends too large a one hears of it from us.
pub(crate) const CALL_MESSAGE_BYTES: usize = 5 << 20;
/// Bytes of messages for which no place is taken: a question without contents, and one for administration.
pub(crate) const QUESTION_MESSAGE_BYTES: usize = 4 << 10;
pub(crate) const ADMIN_MESSAGE_BYTES: usize = 64 << 10;
/// What HTTP/2 takes in of a connection before anybody reads it, in all and of one stream.
pub(crate) const CONNECTION_WINDOW: u32 = 2 << 20;
pub(crate) const STREAM_WINDOW: u32 = 1 << 20;
/// Calls of one connection, with a place or without.
pub(crate) const STREAMS: u32 = 64;

/// Most memory that all calls with a place take together. Beside it there are for each connection [`CONNECTION_WINDOW`] and
/// [`STREAMS`] messages of [`ADMIN_MESSAGE_BYTES`], and what the store itself needs.
pub const MEMORY_BYTES: usize = CALLS * CALL_BYTES
    + TREES * TREE_BYTES
    + READS * READ_BYTES
    + WRITES * WRITE_BYTES
    + DECOMPRESSORS * ((1 << WINDOW_LOG) + (1 << 20));

/// Longest wait for a place.
const PATIENCE: Duration = Duration::from_secs(15);
/// Longest time until the message of a call that has a place is here.
const ARRIVAL: Duration = Duration::from_secs(60);

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

    /// The places for calls of a method; `None` for those whose messages are small.
    fn of(&self, path: &str) -> Option<(&'static str, &Arc<Semaphore>)> {
        match path {
            "/google.bytestream.ByteStream/Read" => Some(("reads", &self.reads)),
            "/google.bytestream.ByteStream/Write" => Some(("writes", &self.writes)),
            "/build.bazel.remote.execution.v2.ContentAddressableStorage/GetTree" => Some(("trees", &self.trees)),
            "/google.bytestream.ByteStream/QueryWriteStatus" => Some(("calls", &self.calls)),
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
            // Writes are many messages, and looked after where they are read.
            let request = if kind == "writes" { request } else { request.map(|body| Body::new(Arriving::new(body))) };
            let answer = inner.call(request).await?;
            Ok(answer.map(|body| Body::new(Placed { body, _place: place })))
        })
    }
}

/// A message that must be here in [`ARRIVAL`].
struct Arriving {
    body: Body,
    late: Pin<Box<Sleep>>,
}

impl Arriving {
    fn new(body: Body) -> Self {
        Self { body, late: Box::pin(tokio::time::sleep(ARRIVAL)) }
    }
}

impl http_body::Body for Arriving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            return Poll::Ready(frame);
        }
        self.late.as_mut().poll(context).map(|()| {
            let problem = format!("the message was not here after {} s", ARRIVAL.as_secs());
            Some(Err(Status::deadline_exceeded(problem)))
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
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

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use http_body::Body as _;

    use super::*;

    /// A body of which one byte comes now and then, for ever.
    struct Trickle(tokio::time::Interval);

    impl http_body::Body for Trickle {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            self.0.poll_tick(context).map(|_| Some(Ok(Frame::data(Bytes::from_static(b"x")))))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_only_trickles_is_not_waited_for() {
        let trickle = Trickle(tokio::time::interval(Duration::from_secs(7)));
        let begin = tokio::time::Instant::now();
        let mut message = Arriving::new(Body::new(trickle));
        let error = loop {
            if let Err(error) = poll_fn(|context| Pin::new(&mut message).poll_frame(context)).await.unwrap() {
                break error;
            }
        };
        assert_eq!((error.code(), begin.elapsed().as_secs()), (tonic::Code::DeadlineExceeded, ARRIVAL.as_secs()));
        let mut whole = Arriving::new(Body::empty());
        tokio::time::advance(2 * ARRIVAL).await;
        assert!(poll_fn(|context| Pin::new(&mut whole).poll_frame(context)).await.is_none(), "it was here in time");
    }
}
