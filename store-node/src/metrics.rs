//! What the store node counts.

use aether_cas::local::Statistics;
use aether_runtime::{
    Metrics,
    metrics::{Counter, Gauge, Labelled, Timer, Unit},
};

aether_runtime::label! {
    /// A call of the store's protocol.
    pub enum Call: "call" {
        /// Which blobs are missing.
        FindMissing = "find_missing",
        /// Many small blobs out.
        BatchRead = "batch_read",
        /// Many small blobs in.
        BatchUpdate = "batch_update",
        /// All directories of a tree out.
        GetTree = "get_tree",
        /// One blob out.
        Read = "read",
        /// One blob in.
        Write = "write",
        /// Administration.
        Admin = "admin",
    }
}

aether_runtime::label! {
    /// How a call ended.
    pub enum Outcome: "outcome" {
        /// As asked.
        Ok = "ok",
        /// With an error.
        Failed = "failed",
    }
}

aether_runtime::label! {
    /// Where a blob is kept.
    pub enum Place: "place" {
        /// In the index.
        Inline = "inline",
        /// As a file.
        File = "file",
    }
}

/// The metrics of a store node.
#[derive(Clone, Debug)]
pub struct StoreMetrics {
    calls: Labelled<(Call, Outcome), Counter>,
    times: Labelled<(Call,), Timer>,
    received: Counter,
    sent: Counter,
    blobs: Labelled<(Place,), Gauge>,
    bytes: Labelled<(Place,), Gauge>,
}

impl StoreMetrics {
    /// Adds the store's rows to a table.
    pub fn new(metrics: &Metrics) -> Self {
        Self {
            calls: metrics.counters("aether_store_calls", "Calls answered"),
            times: metrics
                .timers("aether_store_call", "Time from a call to its answer, or to the begin of a streamed one"),
            received: metrics.counter("aether_store_received_bytes", "Bytes of blobs received"),
            sent: metrics.counter("aether_store_sent_bytes", "Bytes of blobs sent"),
            blobs: metrics.gauges("aether_store_blobs", None, "Blobs held"),
            bytes: metrics.gauges("aether_store_held", Some(Unit::Bytes), "Bytes of blobs held, before compression"),
        }
    }

    /// Makes a call and counts it.
    pub async fn observe<T, E>(&self, call: Call, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let begin = std::time::Instant::now();
        let result = work.await;
        let outcome = if result.is_ok() { Outcome::Ok } else { Outcome::Failed };
        self.calls.of((call, outcome)).inc();
        self.times.of((call,)).observe(begin.elapsed().as_secs_f64());
        result
    }

    /// Counts bytes that came in.
    pub fn received(&self, bytes: u64) {
        self.received.inc_by(bytes);
    }

    /// Counts bytes that went out.
    pub fn sent(&self, bytes: u64) {
        self.sent.inc_by(bytes);
    }

    /// Shows what the store holds.
    pub fn hold(&self, statistics: Statistics) {
        let show = |gauge: &Gauge, value: u64| {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        show(self.blobs.of((Place::Inline,)), statistics.inline_blobs);
        show(self.blobs.of((Place::File,)), statistics.file_blobs);
        show(self.bytes.of((Place::Inline,)), statistics.inline_bytes);
        show(self.bytes.of((Place::File,)), statistics.file_bytes);
    }
}
