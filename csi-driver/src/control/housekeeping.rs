//! Puts away what nothing speaks of any more: sessions of deleted objects, snapshots that no checkpoint or fork needs,
//! views of mounts that are gone. Runs at the start, when sessions are deleted, and once a minute.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use aether_api::session::Durability;
use aether_runtime::CancellationToken;
use jiff::{SignedDuration, Timestamp};

use crate::attach::absent;
use crate::driver::{Driver, is_written};
use crate::failure::{Failure, Result, chain};
use crate::moments::{stem_of, taken_at, uid};
use crate::records::{SessionRecord, Upper};

/// How often to look, beside the changes that bring it here at once.
const PERIOD: Duration = Duration::from_secs(60);
/// The shortest time between two looks.
const PAUSE: Duration = Duration::from_secs(1);
/// A snapshot younger than this may belong to work under way.
const YOUNG: SignedDuration = SignedDuration::from_mins(10);
/// How long the snapshot of a fork that is in the store already stays, for a mount that is faster than from the store.
const UNMOUNTED_FORK: SignedDuration = SignedDuration::from_hours(1);

/// Runs until `stop`.
pub(super) async fn run(driver: Arc<Driver>, stop: CancellationToken) {
    driver.resume_inline();
    if let Err(failure) = drop_unrecorded(&driver).await {
        tracing::warn!(error = chain(&failure), "what a kill left");
    }
    let mut changes = driver.cluster.sessions.changes();
    let mut attached = driver.attached.subscribe();
    loop {
        tidy(&driver).await;
        // One deletion seldom comes alone.
        let pause = tokio::time::Instant::now() + PAUSE;
        let next = tokio::time::sleep(PERIOD);
        tokio::pin!(next);
        // Deletions are seen by what is missing, since a watch that was cut off does not tell of them.
        loop {
            tokio::select! {
                () = &mut next => break,
                () = stop.cancelled() => return,
                _ = changes.changed() => {}
                _ = attached.changed() => {}
            }
            if driver.sessions.any(|record| forsaken(&driver, record)) {
                tokio::time::sleep_until(pause).await;
                break;
            }
        }
    }
}

/// Nobody uses the session here, and the cache does not have it.
fn forsaken(driver: &Driver, record: &SessionRecord) -> bool {
    let cached = driver.cluster.sessions.get(&record.namespace, &record.name);
    cached.is_none_or(|session| uid(&*session) != record.uid) && driver.mounts_of(&record.uid).is_empty()
}

/// One part that fails keeps none of the others from its work.
pub(crate) async fn tidy(driver: &Arc<Driver>) {
    let tell = |part: &str, failed: Result<()>| {
        if let Err(failure) = failed {
            tracing::warn!(part, error = chain(&failure), "housekeeping");
        }
    };
    tell("mounts", driver.tidy_publishes().await);
    drop_deleted(driver).await;
    tell("snapshots", drop_snapshots(driver, YOUNG).await);
    // Checkpoints add contents whatever the limit is; what they need no more goes here.
    tell("contents", driver.engine.make_room(0, &*driver.remote).await.map(drop).map_err(Into::into));
}

/// Sessions whose object is gone. The API server is asked, since the cache may be behind.
async fn drop_deleted(driver: &Arc<Driver>) {
    for record in driver.sessions.select(|record| forsaken(driver, record)) {
        let dropped = async {
            let listed = driver.cluster.sessions.find_listed(&record.namespace, &record.name).await?;
            if listed.is_none_or(|session| uid(&session) != record.uid) {
                driver.discard(&record.uid).await?;
            }
            Ok::<_, Failure>(())
        };
        // Something may hold on to one of them; the next look comes to it again.
        if let Err(failure) = dropped.await {
            let session = format!("{}/{}", record.namespace, record.name);
            tracing::warn!(session, uid = record.uid, error = chain(&failure), "a deleted session stays for now");
        }
    }
}

/// What the engine has and no record speaks of: views whose mount is gone, sessions of an attach that was killed before
/// it mounted them. What was written is never among them, and is kept if a record was lost. Looked for at the start only,
/// because it walks every upper.
pub(crate) async fn drop_unrecorded(driver: &Arc<Driver>) -> Result<()> {
    for session in driver.engine.sessions().await? {
        let written = is_written(&session.session);
        let id = session.session.id;
        let spoken_of = |id: &str| {
            driver.sessions.get(id).is_some()
                || driver
                    .publishes
                    .any(|publish| publish.view.as_deref() == Some(id) || publish.uid.as_deref() == Some(id))
        };
        let _lock = driver.session_locks.lock(&id).await;
        if spoken_of(&id) || !session.targets.is_empty() {
            continue;
        }
        if written {
            tracing::error!(session = id, "it was written here, and its record is lost: kept as it is");
        } else {
            tracing::info!(session = id, "nothing speaks of it any more");
            driver.engine.unmount_session(&id).await.or_else(absent)?;
            driver.engine.delete_session(&id).await.or_else(absent)?;
        }
    }
    Ok(())
}

/// Snapshots older than `young` that nothing speaks of.
pub(crate) async fn drop_snapshots(driver: &Arc<Driver>, young: SignedDuration) -> Result<()> {
    let now = Timestamp::now();
    let mut needed = HashSet::new();
    for checkpoint in driver.cluster.checkpoints.all() {
        let status = checkpoint.status.clone().unwrap_or_default();
        if status.durability != Some(Durability::Durable) {
            needed.insert(uid(&*checkpoint));
            needed.extend(status.snapshot);
        }
    }
    for fork in driver.cluster.sessions.all() {
        let Some(status) = &fork.status else { continue };
        let Some(forked) = &status.forked_from else { continue };
        let mounted = status.attachment.as_ref().is_some_and(|attachment| attachment.epoch > 0);
        let recent = now.duration_since(forked.time.0) < UNMOUNTED_FORK;
        if !forked.durable || (!mounted && recent) {
            needed.extend(forked.snapshot.clone());
        }
    }
    for record in driver.sessions.all() {
        if let Upper::Fenced { snapshot, .. } = record.upper {
            needed.insert(snapshot);
        }
    }
    for snapshot in driver.engine.snapshots().await? {
        // A checkpoint that is not stamped yet names its snapshot by its own uid, without the epoch.
        let unneeded = !needed.contains(&snapshot.id) && !needed.contains(stem_of(&snapshot.id));
        // Those that are temporary are the engine's own, of work under way.
        let in_use = snapshot.temporary || driver.moments.is_used(&snapshot.id);
        if unneeded && !in_use && now.duration_since(taken_at(&snapshot)) > young {
            tracing::info!(snapshot = snapshot.id, "nothing needs it any more");
            driver.drop_snapshot(&snapshot.id).await;
        }
    }
    Ok(())
}
