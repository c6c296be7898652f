//! What is counted: how requests for changes end, what is sent, and what is under way.

use aether_runtime::label;
use aether_runtime::metrics::{Counter, Gauge, Labelled};
use http::StatusCode;

use crate::fast_import::Error;
use crate::status::ApiError;

label! {
    /// How a request for the changes of a checkpoint or commit ended.
    pub enum Outcome: "outcome" {
        /// Everything was handed to the network.
        Sent = "sent",
        /// Whoever asked may not have it.
        Denied = "denied",
        /// There is no such object, or it cannot be compared, or the change is too large.
        Refused = "refused",
        /// The store or the API server did not answer as it should.
        Failed = "failed",
        /// The reader went away before the end.
        Gone = "gone",
        /// The reader took nothing for too long.
        Stalled = "stalled",
    }
}

impl Outcome {
    /// Of a request that got an error for an answer.
    pub fn of_answer(error: &ApiError) -> Self {
        match error.code() {
            StatusCode::FORBIDDEN => Self::Denied,
            code if code.is_client_error() => Self::Refused,
            _ => Self::Failed,
        }
    }

    /// Of a request whose answer was begun.
    pub fn of_stream(written: &Result<(), Error>) -> Self {
        match written {
            Ok(()) => Self::Sent,
            Err(Error::Gone) => Self::Gone,
            Err(Error::Stalled { .. }) => Self::Stalled,
            Err(Error::Store(_) | Error::Spool(_)) => Self::Failed,
        }
    }
}

/// The metrics of this program.
#[derive(Clone)]
pub struct Metrics {
    /// Requests that have ended.
    pub requests: Labelled<(Outcome,), Counter>,
    /// Bytes of streams that went to the network.
    pub sent: Counter,
    /// Diffs that are compared or sent now.
    pub streams: Gauge,
}

impl Metrics {
    /// Adds the metrics to the table of the process.
    pub fn new(table: &aether_runtime::Metrics) -> Self {
        Self {
            requests: table.counters(
                "aether_review_requests",
                "Requests for the changes of a checkpoint or commit that have ended",
            ),
            sent: table.counter("aether_review_sent_bytes", "Bytes of fast-import streams that went to the network"),
            streams: table.gauge("aether_review_streams", None, "Diffs that are compared or sent now"),
        }
    }

    /// Counts one diff as under way for as long as the result lives.
    pub fn under_way(&self) -> UnderWay {
        self.streams.inc();
        UnderWay(self.streams.clone())
    }
}

/// One diff that is under way.
pub struct UnderWay(Gauge);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.dec();
    }
}
