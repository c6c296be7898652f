//! What the store node counts.

use std::time::Duration;

use aether_runtime::{
    CancellationToken, Metrics,
    metrics::{Counter, Gauge, Labelled, Timer, Unit},
};

use crate::{
    tiered::{Statistics, TieredStore},
    upkeep::UpkeepMetrics,
};

/// How often it is shown what the store holds.
const PAUSE: Duration = Duration::from_secs(2);

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

aether_runtime::label! {
    /// What became of requests to the bucket.
    pub enum Asked: "outcome" {
        /// All that were made.
        Made = "made",
        /// Those that failed after all repetitions.
        Failed = "failed",
    }
}

/// The metrics of a store node.
#[derive(Clone, Debug)]
pub struct StoreMetrics {
    /// Of collection and scrub.
    pub upkeep: UpkeepMetrics,
    calls: Labelled<(Call, Outcome), Counter>,
    times: Labelled<(Call,), Timer>,
    received: Counter,
    sent: Counter,
    blobs: Labelled<(Place,), Gauge>,
    bytes: Labelled<(Place,), Gauge>,
    bucket: Bucket,
}

/// Of the durable tier; all zero where there is none.
#[derive(Clone, Debug)]
struct Bucket {
    packs: Gauge,
    unreadable: Gauge,
    bytes: Gauge,
    pending_blobs: Gauge,
    pending_bytes: Gauge,
    compared: Gauge,
    requests: Labelled<(Asked,), Gauge>,
}

impl StoreMetrics {
    /// Adds the store's rows to a table.
    pub fn new(metrics: &Metrics) -> Self {
        Self {
            upkeep: UpkeepMetrics::new(metrics),
            calls: metrics.counters("aether_store_calls", "Calls answered"),
            times: metrics
                .timers("aether_store_call", "Time from a call to its answer, or to the begin of a streamed one"),
            received: metrics.counter("aether_store_received_bytes", "Bytes of blobs received"),
            sent: metrics.counter("aether_store_sent_bytes", "Bytes of blobs sent"),
            blobs: metrics.gauges("aether_store_blobs", None, "Blobs held"),
            bytes: metrics.gauges("aether_store_held", Some(Unit::Bytes), "Bytes of blobs held, before compression"),
            bucket: Bucket {
                packs: metrics.gauge("aether_store_durable_packs", None, "Packs in the bucket"),
                unreadable: metrics.gauge("aether_store_durable_unreadable_packs", None, "Packs that cannot be read"),
                bytes: metrics.gauge(
                    "aether_store_durable",
                    Some(Unit::Bytes),
                    "Bytes of blobs in the bucket, as they are stored",
                ),
                pending_blobs: metrics.gauge(
                    "aether_store_pending_blobs",
                    None,
                    "Blobs on the disk that are on their way to the bucket",
                ),
                pending_bytes: metrics.gauge("aether_store_pending", Some(Unit::Bytes), "Their bytes"),
                compared: metrics.gauge(
                    "aether_store_compared",
                    None,
                    "Whether all that the disk held at the start was compared with the bucket",
                ),
                requests: metrics.gauges("aether_store_durable_requests", None, "Requests to the bucket"),
            },
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
        let disk = statistics.disk;
        show(self.blobs.of((Place::Inline,)), disk.inline_blobs);
        show(self.blobs.of((Place::File,)), disk.file_blobs);
        show(self.bytes.of((Place::Inline,)), disk.inline_bytes);
        show(self.bytes.of((Place::File,)), disk.file_bytes);
        let Some(durable) = statistics.durable else { return };
        show(&self.bucket.packs, durable.bucket.packs);
        show(&self.bucket.unreadable, durable.bucket.unreadable_packs);
        show(&self.bucket.bytes, durable.bucket.stored_bytes);
        show(&self.bucket.pending_blobs, durable.pending_blobs);
        show(&self.bucket.pending_bytes, durable.pending_bytes);
        show(&self.bucket.compared, u64::from(durable.compared));
        show(self.bucket.requests.of((Asked::Made,)), durable.bucket.requests);
        show(self.bucket.requests.of((Asked::Failed,)), durable.bucket.failed_requests);
    }
}

/// Shows what `store` holds, from time to time.
///
/// # Errors
/// None.
pub async fn follow(store: TieredStore, metrics: StoreMetrics, token: CancellationToken) -> anyhow::Result<()> {
    loop {
        metrics.hold(store.statistics());
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            () = tokio::time::sleep(PAUSE) => {}
        }
    }
}
