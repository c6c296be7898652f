//! The driver's metrics, as a table: name, unit, what it tells.

use aether_runtime::metrics::{Counter, Gauge, Labelled, Timer, Unit};

aether_runtime::label! {
    /// How a call ended.
    pub(crate) enum Outcome: "outcome" {
        /// As asked.
        Ok = "ok",
        /// With an error.
        Failed = "failed",
    }
}

impl<T, E> From<&Result<T, E>> for Outcome {
    fn from(result: &Result<T, E>) -> Self {
        if result.is_ok() { Self::Ok } else { Self::Failed }
    }
}

/// What is counted.
pub(crate) struct Metrics {
    pub publish: Labelled<(Outcome,), Timer>,
    pub frozen: Timer,
    pub digest: Timer,
    pub upload: Timer,
    pub uploaded: Counter,
    pub hydrated_objects: Counter,
    pub hydrated_bytes: Counter,
    pub hydration_failures: Counter,
    pub incomplete: Gauge,
    pub lazy_answers: Gauge,
    pub lease_wait: Timer,
    pub takeovers: Counter,
    pub recovered: Counter,
    pub sessions: Gauge,
    pub published: Gauge,
    pub at_limit: Gauge,
    pub pool_available: Gauge,
    pub pool_read_only: Gauge,
}

impl Metrics {
    /// Adds the metrics to the table of the process.
    pub(crate) fn new(table: &aether_runtime::Metrics) -> Self {
        Self {
            publish: table.timers("aether_driver_publish", "Time of NodePublishVolume, waiting included"),
            frozen: table.timer("aether_driver_frozen", "How long pods stood still for a snapshot"),
            digest: table.timer("aether_driver_digest", "Time from a snapshot to its tree"),
            upload: table.timer("aether_driver_upload", "Time to bring a tree to the store"),
            uploaded: table.counter("aether_driver_uploaded_bytes", "Bytes of contents sent to the store"),
            hydrated_objects: table
                .counter("aether_driver_hydrated_objects", "Contents fetched before a mount or in the background"),
            hydrated_bytes: table.counter("aether_driver_hydrated_bytes", "Their bytes"),
            hydration_failures: table.counter(
                "aether_driver_hydration_failures",
                "Attempts to complete a tree in the background that failed and are made again",
            ),
            incomplete: table.gauge(
                "aether_driver_incomplete_trees",
                None,
                "Trees in use here whose contents are not all here: their sessions depend on the lazy layer",
            ),
            lazy_answers: table.gauge("aether_driver_lazy_answers", None, "1 while the lazy layer answers"),
            lease_wait: table.timer("aether_driver_lease_wait", "How long a publish waited for another node"),
            takeovers: table.counter("aether_driver_takeovers", "Sessions taken over from lost nodes"),
            recovered: table
                .counter("aether_driver_recovered", "Sessions lost with unsaved work, kept as a checkpoint"),
            sessions: table.gauge("aether_driver_sessions", None, "Sessions with an upper on this node"),
            published: table.gauge("aether_driver_published", None, "Mounts in pods"),
            at_limit: table.gauge("aether_driver_sessions_at_limit", None, "Sessions whose writers a limit stops"),
            pool_available: table.gauge(
                "aether_driver_pool_available",
                Some(Unit::Bytes),
                "What can still be written to the pool",
            ),
            pool_read_only: table.gauge("aether_driver_pool_read_only", None, "1 while the pool takes no writes"),
        }
    }
}
