//! Checkpoints of sessions that this node holds: taken at once, `Durable` when the store has them. The snapshot's name is
//! the object's uid, so a driver that was killed in between finds it again.

use std::sync::Arc;

use aether_api::conditions::{self, DURABLE, FAILED, READY, Wanted, reason};
use aether_api::session::Durability;
use aether_api::{AetherCheckpoint, AetherSession, names};
use aether_engine::Snapshot;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;
use kube::runtime::events::EventType;
use serde_json::json;

use crate::attach::absent;
use crate::cluster::update_status;
use crate::driver::Driver;
use crate::failure::{Failure, Result};
use crate::moments::{base_root, epoch_of, full_name, stem_of, uid, under_epoch};
use crate::release::local_status;

/// Takes a checkpoint that was asked for, or brings one that was taken to the store.
pub(super) async fn reconcile(checkpoint: Arc<AetherCheckpoint>, driver: Arc<Driver>) -> Result<()> {
    let status = checkpoint.status.clone().unwrap_or_default();
    if checkpoint.metadata.deletion_timestamp.is_some() || conditions::is_true(&status.conditions, FAILED) {
        return Ok(());
    }
    let taken = match status.durability {
        Some(Durability::Durable) => return Ok(()),
        Some(Durability::Local) if status.node.as_deref() == Some(driver.node()) => checkpoint,
        Some(Durability::Local) => return Ok(()),
        None => match take(&checkpoint, &driver).await? {
            Some(taken) => taken,
            None => return Ok(()),
        },
    };
    bring_to_store(taken, &driver).await
}

/// Takes a checkpoint; `None` when that is not for this node to do.
pub(super) async fn take(
    checkpoint: &Arc<AetherCheckpoint>,
    driver: &Arc<Driver>,
) -> Result<Option<Arc<AetherCheckpoint>>> {
    // What a node had unsaved is no moment of the session as it is now: the node that made the object fills it in.
    if recovered(checkpoint) {
        return Ok(None);
    }
    // The moment of a restore, which the engine takes when it has everything that the restore needs.
    if has_origin(checkpoint, names::ORIGIN_SAFETY) {
        return stamp_kept(checkpoint, driver).await;
    }
    let namespace = checkpoint.namespace().unwrap_or_default();
    let Some(session) = driver.cluster.sessions.get(&namespace, &checkpoint.spec.session) else { return Ok(None) };
    let session_uid = uid(&*session);
    let _lock = driver.session_locks.lock(&session_uid).await;
    let Some((session, record)) = driver.holds_now(&session_uid).await? else { return Ok(None) };
    // The automatic ones are filled in by the task that makes them, under the same lock.
    let mut checkpoint = checkpoint.clone();
    if checkpoint.labels().contains_key(names::ORIGIN_LABEL) {
        match driver.cluster.checkpoints.read(&namespace, &checkpoint.name_any()).await? {
            Some(newest) => checkpoint = newest,
            None => return Ok(None),
        }
        if checkpoint.status.as_ref().is_some_and(|status| status.durability.is_some()) {
            return Ok(Some(checkpoint));
        }
    }
    let snapshot = driver.snapshot(&session_uid, &under_epoch(&uid(&*checkpoint), record.epoch)).await?;
    stamp_local(&checkpoint, &session, &snapshot, driver).await.map(Some)
}

/// It keeps what a node had unsaved when it lost its session, which is never the session itself.
fn recovered(checkpoint: &AetherCheckpoint) -> bool {
    has_origin(checkpoint, names::ORIGIN_RECOVERED)
}

fn has_origin(checkpoint: &AetherCheckpoint, origin: &str) -> bool {
    checkpoint.labels().get(names::ORIGIN_LABEL).is_some_and(|of| of == origin)
}

/// Stamps the safety checkpoint of a restore with the snapshot that the engine kept for it on this node, whoever holds the
/// session by now. `None` when there is none, and then no restore has touched anything on its account.
pub(crate) async fn stamp_kept(
    checkpoint: &Arc<AetherCheckpoint>,
    driver: &Driver,
) -> Result<Option<Arc<AetherCheckpoint>>> {
    if checkpoint.status.as_ref().is_some_and(|status| status.durability.is_some()) {
        return Ok(Some(checkpoint.clone()));
    }
    let name = uid(&**checkpoint);
    let kept = driver.engine.snapshots().await?.into_iter().find(|snapshot| {
        !snapshot.temporary && !snapshot.deleting && epoch_of(&snapshot.id).is_some() && stem_of(&snapshot.id) == name
    });
    let Some(snapshot) = kept else { return Ok(None) };
    let namespace = checkpoint.namespace().unwrap_or_default();
    let session = driver.cluster.sessions.find(&namespace, &checkpoint.spec.session).await?;
    let Some(session) = session.filter(|session| uid(&**session) == snapshot.session) else { return Ok(None) };
    stamp_local(checkpoint, &session, &snapshot, driver).await.map(Some)
}

/// Stamps what restores kept of a session, so that it is not lost when the session is let go.
pub(crate) async fn stamp_all_kept(session: &str, driver: &Driver) -> Result<()> {
    for checkpoint in driver.cluster.checkpoints.all() {
        let waits = checkpoint.status.as_ref().is_none_or(|status| status.durability.is_none());
        let of_session = checkpoint.labels().get(names::SESSION_UID_LABEL).is_some_and(|uid| uid == session);
        if waits && of_session && has_origin(&checkpoint, names::ORIGIN_SAFETY) {
            stamp_kept(&checkpoint, driver).await?;
        }
    }
    Ok(())
}

/// Says that a checkpoint is taken.
pub(super) async fn stamp_local(
    checkpoint: &Arc<AetherCheckpoint>,
    session: &AetherSession,
    snapshot: &Snapshot,
    driver: &Driver,
) -> Result<Arc<AetherCheckpoint>> {
    let api = driver.cluster.checkpoints.api(&checkpoint.namespace().unwrap_or_default());
    update_status(&api, checkpoint.clone(), names::DRIVER_MANAGER, |checkpoint| {
        let taken = checkpoint.status.as_ref().is_some_and(|status| status.durability.is_some());
        (!taken).then(|| json!(local_status(driver.node(), session, snapshot, checkpoint)))
    })
    .await
}

/// Brings a checkpoint that was taken here to the store and moves its session's head on.
async fn bring_to_store(checkpoint: Arc<AetherCheckpoint>, driver: &Arc<Driver>) -> Result<()> {
    let status = checkpoint.status.clone().unwrap_or_default();
    let (Some(name), Some(Durability::Local)) = (&status.snapshot, status.durability) else { return Ok(()) };
    if status.node.as_deref() != Some(driver.node()) {
        return Ok(());
    }
    let Some(snapshot) = driver.engine.snapshot_record(name).await.map(Some).or_else(absent)? else {
        return give_up(&checkpoint, driver, format!("snapshot {name} is not on node {} any more", driver.node()))
            .await;
    };
    let digested = driver.make_durable(name).await?;
    // A fork's base may have had no tree yet when the checkpoint was taken.
    let session = driver.cluster.sessions.get(&checkpoint.namespace().unwrap_or_default(), &checkpoint.spec.session);
    let session = session.filter(|session| session.uid() == status.session_uid);
    let base = status
        .base
        .as_ref()
        .and_then(|base| base.root.clone())
        .or_else(|| session.as_ref().and_then(|session| base_root(session)).map(str::to_owned));
    let account = driver.account(base.as_deref(), digested.root).await?;
    let root = digested.root.to_string();
    // Before the checkpoint says that it is durable: nobody comes back for one that does.
    if !recovered(&checkpoint) {
        driver.move_head(&snapshot, digested.root, account).await?;
    }

    let api = driver.cluster.checkpoints.api(&checkpoint.namespace().unwrap_or_default());
    let generation = checkpoint.metadata.generation;
    update_status(&api, checkpoint.clone(), names::DRIVER_MANAGER, |checkpoint| {
        let status = checkpoint.status.as_ref()?;
        (status.durability == Some(Durability::Local)).then(|| {
            let mut all = status.conditions.clone();
            conditions::set(&mut all, Wanted::yes(DURABLE, reason::DONE, "the tree is in the store"), generation);
            json!({
                "root": root,
                "base": status.base.as_ref().map(|_| json!({"root": base})),
                "durability": Durability::Durable,
                "durableTime": Time(Timestamp::now()),
                "node": null,
                "snapshot": null,
                "changedFiles": account.changed_files,
                "ownBytes": account.own_bytes,
                "conditions": all,
            })
        })
    })
    .await?;

    driver.drop_snapshot(name).await;
    Ok(())
}

/// Says that a checkpoint will never be taken, unless it was.
pub(super) async fn withdraw(checkpoint: &Arc<AetherCheckpoint>, driver: &Driver, why: &str) -> Result<()> {
    let api = driver.cluster.checkpoints.api(&checkpoint.namespace().unwrap_or_default());
    update_status(&api, checkpoint.clone(), names::DRIVER_MANAGER, |checkpoint| {
        let status = checkpoint.status.clone().unwrap_or_default();
        status.durability.is_none().then(|| {
            let mut all = status.conditions;
            for wanted in [Wanted::yes(FAILED, reason::NODE_FAILED, why), Wanted::no(READY, reason::NODE_FAILED, why)] {
                conditions::set(&mut all, wanted, checkpoint.metadata.generation);
            }
            json!({"conditions": all})
        })
    })
    .await?;
    Ok(())
}

/// Says that a checkpoint is lost, unless it is durable: the object at hand may be older than our own last write, which
/// is followed by the end of its snapshot.
async fn give_up(checkpoint: &Arc<AetherCheckpoint>, driver: &Driver, message: String) -> Result<()> {
    let api = driver.cluster.checkpoints.api(&checkpoint.namespace().unwrap_or_default());
    let generation = checkpoint.metadata.generation;
    let newest = update_status(&api, checkpoint.clone(), names::DRIVER_MANAGER, |checkpoint| {
        let status = checkpoint.status.as_ref().filter(|status| status.durability == Some(Durability::Local))?;
        let mut all = status.conditions.clone();
        conditions::set(&mut all, Wanted::yes(FAILED, reason::NODE_FAILED, message.clone()), generation);
        conditions::set(&mut all, Wanted::no(READY, reason::NODE_FAILED, message.clone()), generation);
        conditions::set(&mut all, Wanted::no(DURABLE, reason::NODE_FAILED, message.clone()), generation);
        Some(json!({"conditions": all}))
    })
    .await?;
    if newest.status.as_ref().is_some_and(|status| status.durability == Some(Durability::Durable)) {
        return Ok(());
    }
    driver.events.on(&**checkpoint, EventType::Warning, "CheckpointLost", message.clone()).await;
    Err(Failure::NotFound(format!("checkpoint {}: {message}", full_name(&**checkpoint))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_recovered_is_told_by_its_origin() {
        let of = |origin: Option<&str>| {
            let mut checkpoint = AetherCheckpoint::new("c", aether_api::AetherCheckpointSpec::default());
            checkpoint.labels_mut().extend(origin.map(|origin| (names::ORIGIN_LABEL.to_owned(), origin.to_owned())));
            recovered(&checkpoint)
        };
        assert!(of(Some(names::ORIGIN_RECOVERED)));
        assert!(!of(Some(names::ORIGIN_AUTOMATIC)) && !of(Some(names::ORIGIN_SAFETY)) && !of(None));
    }
}
