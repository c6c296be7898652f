//! What a node does for its store without being asked: collection and scrub, each in its time and at its pace.

mod metrics;
mod options;

use std::{
    ops::ControlFlow,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aether_cas::{
    StoreError,
    collect::{Pace, Progress, Watch},
    store::Result,
};
use aether_runtime::{CancellationToken, tasks};

use crate::tiered::TieredStore;

pub use metrics::UpkeepMetrics;
pub use options::UpkeepArgs;

/// The lease of a node that was not told another.
pub const LEASE: Duration = Duration::from_secs(24 * 3600);

/// The first collection after a start does not wait for longer, so that restarts do not put it off for ever.
const FIRST: Duration = Duration::from_secs(5 * 60);
/// Between two looks whose turn it is.
const LEAST_REST: Duration = Duration::from_secs(1);
/// How long after the disk failed to try again.
const RETRY: Duration = Duration::from_secs(60);
/// Lost blobs that are counted.
const LOST: usize = 10_000;

/// When and how fast to do something.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// From one begin to the next.
    pub interval: Duration,
    /// How fast.
    pub pace: Pace,
}

/// Collects `store` over and over until the token is cancelled; a bucket whenever it is this node's turn.
///
/// # Errors
/// None: a collection that fails is tried again.
pub async fn collections(
    store: TieredStore,
    schedule: Schedule,
    metrics: UpkeepMetrics,
    token: CancellationToken,
) -> anyhow::Result<()> {
    let mut pause = schedule.interval.min(FIRST);
    while passed(pause, &token).await {
        if let Some(durable) = store.durable() {
            match durable.take_turn("collection", schedule.interval).await {
                Ok(None) => {}
                Ok(Some(rest)) => {
                    pause = rest.clamp(LEAST_REST, schedule.interval);
                    continue;
                }
                Err(error) => {
                    tracing::warn!(%error, "whether it is time to collect is not known; trying again");
                    pause = schedule.interval.min(RETRY);
                    continue;
                }
            }
        }
        let (store, metrics, stop) = (store.clone(), metrics.clone(), token.clone());
        let collected = tasks::blocking("collection", move || {
            let mut watch = |_: &Progress| until(&stop);
            Ok(collect(&store, schedule.pace, &metrics, &mut watch)?)
        });
        pause = match collected.await {
            Ok(progress) => {
                tracing::info!(
                    deleted = progress.deleted.blobs,
                    bytes = progress.deleted.bytes,
                    condemned = progress.condemned.blobs,
                    examined = progress.examined.blobs,
                    "collected the store"
                );
                schedule.interval
            }
            Err(_) if token.is_cancelled() => break,
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "a collection failed; it is tried again");
                schedule.interval.min(RETRY)
            }
        };
    }
    Ok(())
}

/// Collects once, and counts what it did.
pub(crate) fn collect(store: &TieredStore, pace: Pace, metrics: &UpkeepMetrics, watch: Watch<'_>) -> Result<Progress> {
    let mut before = Progress::default();
    let result = store.collect(pace, &mut |progress| {
        metrics.collected(&before, progress);
        before.clone_from(progress);
        watch(progress)
    });
    match &result {
        Ok(progress) => metrics.ended(Ok(progress)),
        // Nobody's fault: it was asked to end, or another one runs.
        Err(StoreError::Closed(_) | StoreError::Busy(_)) => {}
        Err(_) => metrics.ended(Err(())),
    }
    result
}

/// Scrubs the disk of `store`, and the bucket behind it whenever it is this node's turn, over and over until the token is
/// cancelled; the places are kept over restarts.
///
/// # Errors
/// None: a scrub that fails is tried again.
pub async fn scrubs(
    store: TieredStore,
    schedule: Schedule,
    metrics: UpkeepMetrics,
    token: CancellationToken,
) -> anyhow::Result<()> {
    let disk = passes(&token, || {
        let (store, metrics, stop) = (store.clone(), metrics.clone(), token.clone());
        tasks::blocking("scrub", move || scrub_disk(&store, schedule, &metrics, &stop))
    });
    let bucket = passes(&token, || scrub_bucket(store.clone(), schedule, metrics.clone(), token.clone()));
    if store.durable().is_some() {
        tokio::join!(disk, bucket);
    } else {
        disk.await;
    }
    Ok(())
}

/// Makes one pass after the other; each says how long to wait after it.
async fn passes<F: Future<Output = anyhow::Result<Duration>>>(token: &CancellationToken, mut pass: impl FnMut() -> F) {
    let mut pause = Duration::ZERO;
    while passed(pause, token).await {
        pause = match pass().await {
            Ok(rest) => rest.max(Duration::from_secs(1)),
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "a scrub failed; it is tried again");
                RETRY
            }
        };
    }
}

fn scrub_disk(
    store: &TieredStore,
    schedule: Schedule,
    metrics: &UpkeepMetrics,
    stop: &CancellationToken,
) -> anyhow::Result<Duration> {
    let mut before = store.disk().scrub_state()?;
    // A pass that has ended is long enough ago, or there is time left.
    if !before.is_running() {
        let rest = rest(before.began_at, schedule.interval);
        if !rest.is_zero() {
            return Ok(rest);
        }
        before = Default::default();
    }
    let done = store.scrub_disk(schedule.pace, &mut |state| {
        metrics.scrubbed(&before, state);
        before = *state;
        until(stop)
    })?;
    metrics.scrubbed(&before, &done);
    // Of a cache nothing is lost with its copy.
    if store.durable().is_none() {
        metrics.lost(store.damages(LOST)?.len());
    }
    if !done.is_running() {
        tracing::info!(blobs = done.blobs, bytes = done.bytes, damaged = done.damaged, "scrubbed the disk");
    }
    Ok(rest(done.began_at, schedule.interval))
}

async fn scrub_bucket(
    store: TieredStore,
    schedule: Schedule,
    metrics: UpkeepMetrics,
    stop: CancellationToken,
) -> anyhow::Result<Duration> {
    let Some(durable) = store.durable().cloned() else { return Ok(schedule.interval) };
    let state = durable.clone();
    let mut before = tasks::blocking("scrub state", move || Ok(state.scrub_state()?)).await?;
    if !before.is_running() {
        if let Some(rest) = durable.take_turn("scrub", schedule.interval).await? {
            return Ok(rest);
        }
        before = Default::default();
    }
    tasks::blocking("scrub of the bucket", move || {
        let done = store.scrub_bucket(schedule.pace, &mut |now| {
            metrics.scrubbed(&before.state, &now.state);
            before.clone_from(now);
            until(&stop)
        })?;
        let done = done.unwrap_or_default();
        metrics.scrubbed(&before.state, &done.state);
        metrics.lost(store.damages(LOST)?.len());
        if !done.is_running() {
            let state = done.state;
            tracing::info!(blobs = state.blobs, bytes = state.bytes, damaged = state.damaged, "scrubbed the bucket");
        }
        Ok(rest(done.state.began_at, schedule.interval))
    })
    .await
}

/// What is left of an interval that began then, in milliseconds since 1970.
fn rest(began_at: u64, interval: Duration) -> Duration {
    let due = (UNIX_EPOCH + Duration::from_millis(began_at)).checked_add(interval).unwrap_or(UNIX_EPOCH);
    // A clock that was set back does not make it wait for longer than the interval.
    due.duration_since(SystemTime::now()).unwrap_or_default().min(interval)
}

fn until(stop: &CancellationToken) -> ControlFlow<()> {
    if stop.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

/// Waits; `false` when the token was cancelled meanwhile.
async fn passed(pause: Duration, token: &CancellationToken) -> bool {
    tokio::select! {
        () = token.cancelled() => false,
        () = tokio::time::sleep(pause) => !token.is_cancelled(),
    }
}

#[cfg(test)]
mod tests {
    use aether_cas::{LocalConfig, LocalStore};
    use aether_runtime::Metrics;

    use super::*;

    #[test]
    fn a_collection_that_fails_is_counted_and_one_that_another_keeps_out_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let config =
            LocalConfig { objects: folder.path().join("objects"), index: folder.path().join("index"), inline_limit: 0 };
        let table = Metrics::new();
        let metrics = UpkeepMetrics::new(&table);
        let failed = |count: &str| {
            let row = format!("aether_store_collections_total{{outcome=\"failed\"}} {count}\n");
            table.render().contains(&row)
        };
        let pace = Pace::new(None);
        let go_on = &mut |_: &Progress| ControlFlow::Continue(());
        let store = LocalStore::open(config.clone()).unwrap().into();
        assert!(matches!(collect(&store, pace, &metrics, go_on), Err(StoreError::Invalid(_))));
        assert!(failed("1"), "{}", table.render());
        drop(store);

        let store = LocalStore::open_collected(config, LEASE).unwrap().into();
        collect(&store, pace, &metrics, &mut |_| {
            let another = collect(&store, pace, &metrics, &mut |_| ControlFlow::Continue(()));
            assert!(matches!(another, Err(StoreError::Busy(_))));
            ControlFlow::Continue(())
        })
        .unwrap();
        assert!(failed("1"), "{}", table.render());
    }
}
