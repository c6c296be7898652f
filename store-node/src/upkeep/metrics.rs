//! What collection and scrub count.

use aether_cas::{collect::Progress, local::ScrubState};
use aether_runtime::{
    Metrics,
    metrics::{Counter, Gauge, Labelled},
};

use crate::metrics::Outcome;

/// The metrics of the upkeep of one store.
#[derive(Clone, Debug)]
pub struct UpkeepMetrics {
    collections: Labelled<(Outcome,), Counter>,
    deleted_blobs: Counter,
    deleted_bytes: Counter,
    condemned: Gauge,
    incomplete: Gauge,
    scrubbed_blobs: Counter,
    scrubbed_bytes: Counter,
    damaged: Counter,
    lost: Gauge,
}

impl UpkeepMetrics {
    /// Adds the rows to a table.
    pub fn new(metrics: &Metrics) -> Self {
        Self {
            collections: metrics.counters("aether_store_collections", "Collections that ended"),
            deleted_blobs: metrics.counter("aether_store_deleted_blobs", "Blobs deleted by collections"),
            deleted_bytes: metrics.counter("aether_store_deleted_bytes", "Their bytes, before compression"),
            condemned: metrics.gauge(
                "aether_store_condemned_blobs",
                None,
                "Blobs that the last collection found nothing to keep",
            ),
            incomplete: metrics.gauge(
                "aether_store_incomplete_roots",
                None,
                "Roots that miss a directory, so that nothing is collected",
            ),
            scrubbed_blobs: metrics.counter("aether_store_scrubbed_blobs", "Copies read by the scrub"),
            scrubbed_bytes: metrics.counter("aether_store_scrubbed_bytes", "Their bytes"),
            damaged: metrics.counter("aether_store_damaged_blobs", "Copies that the scrub found damaged"),
            lost: metrics.gauge(
                "aether_store_lost_blobs",
                None,
                "Blobs whose last copy was damaged and that have not been stored again",
            ),
        }
    }

    /// What a collection did since `before`.
    pub(super) fn collected(&self, before: &Progress, now: &Progress) {
        self.deleted_blobs.inc_by(now.deleted.blobs - before.deleted.blobs);
        self.deleted_bytes.inc_by(now.deleted.bytes - before.deleted.bytes);
    }

    /// How a collection ended.
    pub(super) fn ended(&self, result: Result<&Progress, ()>) {
        match result {
            Ok(progress) => {
                self.collections.of((Outcome::Ok,)).inc();
                self.condemned.set(i64::try_from(progress.condemned.blobs).unwrap_or(i64::MAX));
                self.incomplete.set(i64::try_from(progress.incomplete.len()).unwrap_or(i64::MAX));
            }
            Err(()) => {
                self.collections.of((Outcome::Failed,)).inc();
            }
        }
    }

    /// What the scrub read since `before`.
    pub(super) fn scrubbed(&self, before: &ScrubState, now: &ScrubState) {
        self.scrubbed_blobs.inc_by(now.blobs - before.blobs);
        self.scrubbed_bytes.inc_by(now.bytes - before.bytes);
        self.damaged.inc_by(now.damaged - before.damaged);
    }

    /// How many blobs are lost.
    pub(super) fn lost(&self, blobs: usize) {
        self.lost.set(i64::try_from(blobs).unwrap_or(i64::MAX));
    }
}
