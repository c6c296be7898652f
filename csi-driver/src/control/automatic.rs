//! Automatic checkpoints: on the interval that a session's spec asks for, while this node holds it, when something has
//! changed since the last. The operator prunes them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aether_api::names;
use aether_api::{AetherSession, session::AutomaticCheckpoints};
use aether_cas::Blob;
use aether_runtime::CancellationToken;
use jiff::Timestamp;
use kube::ResourceExt as _;

use super::checkpoints::stamp_local;
use crate::driver::Driver;
use crate::failure::{Result, chain};
use crate::moments::{full_name, under_epoch};
use crate::records::{SessionRecord, Upper};

/// The shortest interval: a snapshot holds pods still.
const SHORTEST: Duration = Duration::from_secs(5);

/// Runs until `stop`. Sleeps until the next session is due, or until what is held or asked for has changed.
pub(super) async fn run(driver: Arc<Driver>, stop: CancellationToken) {
    let mut attached = driver.attached.subscribe();
    let mut changes = driver.cluster.sessions.changes();
    // The last look at each session; a session that is new here is due one interval from now.
    let mut looked: HashMap<String, Look> = HashMap::new();
    loop {
        let now = Instant::now();
        let wanting = wanting(&driver);
        looked.retain(|uid, _| wanting.iter().any(|(record, ..)| &record.uid == uid));
        let mut next = None;
        for (record, session, interval) in wanting {
            let look = looked.entry(record.uid.clone()).or_insert(Look { time: now, root: None });
            let due = look.time + interval;
            if due <= now {
                look.time = now;
                if let Err(failure) = checkpoint_if_changed(&driver, &record, &mut look.root).await {
                    tracing::warn!(session = full_name(&*session), error = chain(&failure), "automatic checkpoint");
                }
            }
            let due = if due <= now { now + interval } else { due };
            next = Some(next.map_or(due, |next: Instant| next.min(due)));
        }
        let sleep = async {
            match next {
                Some(next) => tokio::time::sleep_until(next.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = sleep => {}
            _ = attached.changed() => {}
            _ = changes.changed() => {}
            () = stop.cancelled() => return,
        }
    }
}

/// A look at a session.
struct Look {
    time: Instant,
    /// What it found, which may be on its way to the store still.
    root: Option<Blob>,
}

fn wanting(driver: &Driver) -> Vec<(SessionRecord, Arc<AetherSession>, Duration)> {
    driver
        .sessions
        .select(|record| record.upper == Upper::Dirty)
        .into_iter()
        .filter_map(|record| {
            let session = driver.cluster.sessions.get(&record.namespace, &record.name)?;
            let same = session.uid().as_deref() == Some(&record.uid) && session.metadata.deletion_timestamp.is_none();
            let interval = session.spec.checkpoints.as_ref().map(interval)?;
            same.then_some((record, session, interval))
        })
        .collect()
}

fn interval(checkpoints: &AutomaticCheckpoints) -> Duration {
    Duration::from(checkpoints.interval).max(SHORTEST)
}

async fn checkpoint_if_changed(driver: &Arc<Driver>, record: &SessionRecord, seen: &mut Option<Blob>) -> Result<()> {
    let _lock = driver.session_locks.lock(&record.uid).await;
    let Some((session, record)) = driver.holds_now(&record.uid).await? else { return Ok(()) };
    let name = under_epoch(&format!("automatic-{}", uuid::Uuid::new_v4()), record.epoch);
    let snapshot = driver.snapshot(&record.uid, &name).await?;
    let made = async {
        let digested = driver.engine.digest(&name).await?;
        if *seen == Some(digested.root) || seen.is_none() && record.last_root == Some(digested.root.to_string()) {
            return Ok(false);
        }
        let object = format!("{}-auto-{}", session.name_any(), Timestamp::now().strftime("%Y%m%d%H%M%S"));
        let message = "automatic".to_owned();
        let checkpoint = driver.make_checkpoint(&session, &object, names::ORIGIN_AUTOMATIC, message, None).await?;
        let stamped = stamp_local(&Arc::new(checkpoint), &session, &snapshot, driver).await?;
        *seen = Some(digested.root);
        Ok(stamped.status.as_ref().and_then(|status| status.snapshot.as_ref()) == Some(&name))
    }
    .await;
    if !matches!(made, Ok(true)) {
        driver.drop_snapshot(&name).await;
    }
    made.map(|_: bool| ())
}
