//! Automatic checkpoints: on the interval that a session's spec asks for, while this node holds it, when something has
//! changed since the last. The operator prunes them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aether_api::names;
use aether_api::{AetherSession, session::AutomaticCheckpoints};
use aether_cas::Blob;
use aether_engine::Snapshot;
use aether_runtime::CancellationToken;
use jiff::Timestamp;
use kube::ResourceExt as _;
use tokio::task::JoinSet;

use super::checkpoints::stamp_local;
use crate::driver::Driver;
use crate::failure::{Failure, Result, chain};
use crate::moments::{full_name, under_epoch};
use crate::records::{SessionRecord, Upper};

/// The shortest interval: a snapshot holds pods still.
const SHORTEST: Duration = Duration::from_secs(5);

/// So many sessions are looked at at a time. Their pods are held still for moments only; the workers bound the rest.
const AT_ONCE: usize = 8;

/// Runs until `stop`. Sleeps until the next session is due, or until what is held or asked for has changed.
pub(super) async fn run(driver: Arc<Driver>, stop: CancellationToken) {
    let mut attached = driver.attached.subscribe();
    let mut changes = driver.cluster.sessions.changes();
    // The last look at each session; a session that is new here is due one interval from now.
    let mut looked: HashMap<String, Look> = HashMap::new();
    let mut looking = JoinSet::new();
    loop {
        let now = Instant::now();
        let wanting = wanting(&driver);
        looked.retain(|uid, _| wanting.iter().any(|(record, ..)| &record.uid == uid));
        let mut next = None;
        for (record, session, interval) in wanting {
            let look = looked.entry(record.uid.clone()).or_insert(Look { time: now, under_way: false, root: None });
            if look.under_way {
                continue;
            }
            let due = look.time + interval;
            if due > now {
                next = Some(next.map_or(due, |next: Instant| next.min(due)));
            } else if looking.len() < AT_ONCE {
                look.time = now;
                look.under_way = true;
                let (driver, seen) = (driver.clone(), look.root);
                looking.spawn(async move {
                    let found = checkpoint_if_changed(&driver, &record.uid, seen).await;
                    let root = found.unwrap_or_else(|failure| {
                        tracing::warn!(session = full_name(&*session), error = chain(&failure), "automatic checkpoint");
                        seen
                    });
                    (record.uid, root)
                });
            }
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
            Some(ended) = looking.join_next() => match ended {
                Ok((uid, root)) => if let Some(look) = looked.get_mut(&uid) {
                    look.under_way = false;
                    look.root = root;
                },
                Err(error) => {
                    tracing::error!(%error, "an automatic checkpoint ended unexpectedly");
                    // Nobody knows whose: all are due one interval after their last.
                    looked.values_mut().for_each(|look| look.under_way = false);
                }
            },
            () = stop.cancelled() => break,
        }
    }
    while looking.join_next().await.is_some() {}
}

/// A look at a session.
struct Look {
    time: Instant,
    /// It has begun and not ended.
    under_way: bool,
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

/// Makes a checkpoint of a session, unless it is as it was when it was `seen`. Returns what it is now. The session is locked
/// while the moment is taken and while the checkpoint is made of it, and is free between the two.
pub(crate) async fn checkpoint_if_changed(driver: &Arc<Driver>, uid: &str, seen: Option<Blob>) -> Result<Option<Blob>> {
    let (snapshot, record, _used) = {
        let _lock = driver.session_locks.lock(uid).await;
        let Some((_, record)) = driver.holds_now(uid).await? else { return Ok(seen) };
        let name = under_epoch(&format!("automatic-{}", uuid::Uuid::new_v4()), record.epoch);
        let used = driver.moments.using(&name);
        (driver.snapshot(uid, &name).await?, record, used)
    };
    let digested = {
        let _permit = driver.workers.acquire().await.map_err(|_| Failure::Lost("worker pool"))?;
        driver.engine.digest(&snapshot.id).await
    };
    let root = match digested {
        Ok(digested) => digested.root,
        Err(error) => {
            driver.drop_snapshot(&snapshot.id).await;
            return Err(error.into());
        }
    };
    let unchanged = seen == Some(root) || seen.is_none() && record.last_root == Some(root.to_string());
    let made = !unchanged && make(driver, &snapshot, record.epoch).await?;
    // After a failure it stays: when only the answer was lost, it is the checkpoint. If it is not, the housekeeping finds it.
    if !made {
        driver.drop_snapshot(&snapshot.id).await;
    }
    Ok(Some(root))
}

/// Makes the checkpoint of a moment, unless the session was let go since. `false` when nothing needs the moment.
async fn make(driver: &Arc<Driver>, moment: &Snapshot, epoch: i64) -> Result<bool> {
    let _lock = driver.session_locks.lock(&moment.session).await;
    let Some((session, record)) = driver.holds_now(&moment.session).await? else { return Ok(false) };
    if record.epoch != epoch {
        return Ok(false);
    }
    let object = format!("{}-auto-{}", session.name_any(), Timestamp::now().strftime("%Y%m%d%H%M%S"));
    let message = "automatic".to_owned();
    let checkpoint = driver.make_checkpoint(&session, &object, names::ORIGIN_AUTOMATIC, message, None).await?;
    let stamped = stamp_local(&Arc::new(checkpoint), &session, moment, driver).await?;
    Ok(stamped.status.as_ref().and_then(|status| status.snapshot.as_ref()) == Some(&moment.id))
}
