//! Restores of sessions that this node holds: a safety checkpoint first, then the tree difference through the mount with
//! the pods held still. A restore that a kill interrupted in the middle begins again at the difference that is left; one that
//! was done is remembered in the session's record before anybody is told, and is never done again.

use std::sync::Arc;

use aether_api::conditions::{self, COMPLETE, FAILED, Wanted, reason};
use aether_api::session::Durability;
use aether_api::{AetherCheckpoint, AetherRestore, AetherRestoreStatus, AetherSession, names};
use aether_cas::Blob;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;
use kube::runtime::events::EventType;
use serde_json::json;

use super::checkpoints;
use crate::cluster::update_status;
use crate::driver::{Driver, parse_root};
use crate::failure::{Failure, Result, chain};
use crate::moments::{full_name, uid};
use crate::records::{Applied, Upper};

/// How many restores of a session are remembered: more than can be on their way to an answer at once.
const REMEMBERED: usize = 16;

/// Does a restore that is for this node to do.
pub(crate) async fn reconcile(restore: Arc<AetherRestore>, driver: Arc<Driver>) -> Result<()> {
    if restore.finished() || restore.metadata.deletion_timestamp.is_some() {
        return Ok(());
    }
    let namespace = restore.namespace().unwrap_or_default();
    let Some(session) = driver.cluster.sessions.get(&namespace, &restore.spec.session) else { return Ok(()) };
    let Some(record) = driver.sessions.get(&uid(&*session)) else { return Ok(()) };
    if let Some(applied) = record.applied.iter().find(|applied| applied.restore == uid(&*restore)) {
        return finish(&restore, &driver, Ok(applied.clone())).await;
    }
    if record.upper != Upper::Dirty || restored_before(&restore, &driver, &record.uid).await? {
        return Ok(());
    }
    let Some(checkpoint) = driver.cluster.checkpoints.find(&namespace, &restore.spec.checkpoint).await? else {
        let message = format!("checkpoint {} does not exist", restore.spec.checkpoint);
        return finish(&restore, &driver, Err((reason::CHECKPOINT_NOT_FOUND, message))).await;
    };
    let Some(target) = checkpoint.status.as_ref().and_then(|status| status.root.as_deref()) else {
        if checkpoint.status.as_ref().is_some_and(|status| conditions::is_true(&status.conditions, FAILED)) {
            let message = format!("checkpoint {} failed and has no tree", restore.spec.checkpoint);
            return finish(&restore, &driver, Err((reason::CHECKPOINT_NOT_READY, message))).await;
        }
        // `wake` brings it back here when the checkpoint has its tree.
        return Ok(());
    };
    let target = match parse_root(target, &format!("checkpoint {}", restore.spec.checkpoint)) {
        Ok(target) => target,
        Err(failure) => return finish(&restore, &driver, Err((reason::INVALID, chain(&failure)))).await,
    };

    let plain = format!("{}-safety", restore.name_any());
    let safety = match driver.cluster.checkpoints.find(&namespace, &plain).await? {
        Some(other) if !serves(&other, &restore, &session) => {
            format!("{plain}-{}-{}", uid(&*restore).split('-').next().unwrap_or_default(), record.epoch)
        }
        _ => plain,
    };
    let restore = begin(&restore, &driver, &safety, target).await?;
    match work(&session, &driver, &restore, &safety, target).await {
        Ok(Some(applied)) => finish(&restore, &driver, Ok(applied)).await,
        // Let go in the meantime: the operator restores a session that nobody holds, and says so.
        Ok(None) => Ok(()),
        Err(failure @ Failure::Kubernetes { .. }) => Err(failure),
        Err(failure) => {
            let message = format!("{}; checkpoint {safety} is the way back", chain(&failure));
            finish(&restore, &driver, Err((reason::NODE_FAILED, message))).await
        }
    }
}

/// Whether the operator has done a restore before this node took the session, and has not come to say so yet: that is left
/// to it. Decided on the session as this node holds it, which is not older than the move.
async fn restored_before(restore: &AetherRestore, driver: &Driver, uid: &str) -> Result<bool> {
    let _lock = driver.session_locks.lock(uid).await;
    Ok(driver.holds_now(uid).await?.is_some_and(|(session, _)| restore.has_moved(&session)))
}

/// A checkpoint has changed: restores that wait for its tree go on.
pub(super) async fn wake(checkpoint: Arc<AetherCheckpoint>, driver: Arc<Driver>) -> Result<()> {
    for restore in driver.cluster.restores.all() {
        if !restore.finished()
            && restore.namespace() == checkpoint.namespace()
            && restore.spec.checkpoint == checkpoint.name_any()
        {
            driver.cluster.restores.poke(restore.as_ref());
        }
    }
    Ok(())
}

/// Whether a checkpoint is the way back from this restore: made for it, and not taken before this node had the session,
/// or what was written since would be missing. The operator's, for a restore that began while nobody held the session, names
/// the session only.
fn serves(checkpoint: &AetherCheckpoint, restore: &AetherRestore, session: &AetherSession) -> bool {
    let of_session = checkpoint.labels().get(names::SESSION_UID_LABEL) == session.uid().as_ref();
    let made_for_it = match checkpoint.annotations().get(names::RESTORE_UID_ANNOTATION) {
        Some(uid) => restore.uid().as_ref() == Some(uid),
        None => {
            checkpoint.labels().get(names::ORIGIN_LABEL).is_some_and(|origin| origin == names::ORIGIN_SAFETY)
                && checkpoint.creation_timestamp().map(|time| time.0) >= restore.creation_timestamp().map(|time| time.0)
        }
    };
    let status = checkpoint.status.as_ref();
    let attached = session.status.as_ref().and_then(|status| status.attachment.as_ref()?.since.as_ref());
    let recent = status.is_none_or(|status| status.durability.is_none())
        || status
            .and_then(|status| status.local_time.as_ref())
            .zip(attached)
            .is_some_and(|(taken, since)| taken.0 > since.0);
    of_session && made_for_it && recent
}

async fn begin(
    restore: &Arc<AetherRestore>,
    driver: &Driver,
    safety: &str,
    target: Blob,
) -> Result<Arc<AetherRestore>> {
    let api = driver.cluster.restores.api(&restore.namespace().unwrap_or_default());
    update_status(&api, restore.clone(), names::DRIVER_MANAGER, |restore| {
        let begun = restore.status.as_ref().is_some_and(|status| {
            status.node.as_deref() == Some(driver.node()) && status.safety_checkpoint.as_deref() == Some(safety)
        });
        (!begun).then(|| {
            json!(AetherRestoreStatus {
                phase: Some("Running".into()),
                safety_checkpoint: Some(safety.to_owned()),
                root: Some(target.to_string()),
                node: Some(driver.node().to_owned()),
                started: Some(Time(Timestamp::now())),
                ..AetherRestoreStatus::default()
            })
        })
    })
    .await
}

async fn work(
    session: &Arc<AetherSession>,
    driver: &Arc<Driver>,
    restore: &AetherRestore,
    safety: &str,
    target: Blob,
) -> Result<Option<Applied>> {
    let message = format!("before restore {} to checkpoint {}", restore.name_any(), restore.spec.checkpoint);
    let made = driver.make_checkpoint(session, safety, names::ORIGIN_SAFETY, message, Some(&uid(restore))).await?;
    if !serves(&made, restore, session) {
        return Err(Failure::Denied(format!(
            "checkpoint {safety} is there already and is of something else, so nothing was changed: rename it"
        )));
    }
    let taken = |checkpoint: &AetherCheckpoint| {
        checkpoint
            .status
            .as_ref()
            .and_then(|status| status.durability)
            .is_some_and(|durability| matches!(durability, Durability::Local | Durability::Durable))
    };
    if !taken(&made) && checkpoints::take(&Arc::new(made), driver).await?.is_none_or(|checkpoint| !taken(&checkpoint)) {
        return Ok(None);
    }

    let uid = uid(&**session);
    let _lock = driver.session_locks.lock(&uid).await;
    let Some((held, mut record)) = driver.holds_now(&uid).await? else { return Ok(None) };
    // Let go, restored by the operator and taken again since the beginning.
    if restore.has_moved(&held) {
        return Ok(None);
    }
    let writers = driver.writers(&uid).await?;
    if !writers.doubts.is_empty() {
        return Err(Failure::NotYet(format!(
            "every writer must be held still, but {}: delete the session's pods and restore it unmounted",
            writers.doubts.join("; ")
        )));
    }
    driver.mount_session(&uid, session).await?;
    let report = driver.engine.restore_in_place(&uid, target, &writers.cgroups, &*driver.remote).await?;
    tracing::info!(restore = full_name(restore), bytes = report.bytes, "restored");
    let applied = Applied {
        restore: crate::moments::uid(restore),
        changed: report.changed,
        removed: report.removed,
        frozen_micros: report.frozen_micros,
    };
    // Pods write again from here on: what says that it was done must outlive this process.
    let forgotten = (record.applied.len() + 1).saturating_sub(REMEMBERED);
    record.applied.drain(..forgotten);
    record.applied.push(applied.clone());
    driver.sessions.put(record).await?;
    Ok(Some(applied))
}

async fn finish(
    restore: &Arc<AetherRestore>,
    driver: &Driver,
    result: std::result::Result<Applied, (&str, String)>,
) -> Result<()> {
    let api = driver.cluster.restores.api(&restore.namespace().unwrap_or_default());
    let generation = restore.metadata.generation;
    let (phase, wanted, changed) = match &result {
        Ok(report) => {
            let frozen_ms = report.frozen_micros / 1000;
            tracing::info!(
                restore = full_name(&**restore),
                changed = report.changed,
                removed = report.removed,
                frozen_ms,
                "restore succeeded"
            );
            let message = format!(
                "{} paths written, {} removed, pods held still for {frozen_ms} ms",
                report.changed, report.removed
            );
            let changed = i64::try_from(report.changed + report.removed).ok();
            ("Succeeded", Wanted::yes(COMPLETE, reason::DONE, message), changed)
        }
        Err((why, message)) => {
            driver.events.on(&**restore, EventType::Warning, "RestoreFailed", message.clone()).await;
            ("Failed", Wanted::yes(FAILED, *why, message.clone()), None)
        }
    };
    update_status(&api, restore.clone(), names::DRIVER_MANAGER, |restore| {
        if restore.finished() {
            return None;
        }
        let mut all = restore.status.as_ref().map(|status| status.conditions.clone()).unwrap_or_default();
        conditions::set(&mut all, wanted.clone(), generation);
        Some(json!({
            "phase": phase,
            "finished": Time(Timestamp::now()),
            "changedPaths": changed,
            "conditions": all,
        }))
    })
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Time {
        Time(Timestamp::from_second(1_700_000_000 + second).unwrap())
    }

    fn object<T: serde::de::DeserializeOwned>(
        kind: &str,
        metadata: serde_json::Value,
        spec: serde_json::Value,
        status: serde_json::Value,
    ) -> T {
        let api = format!("{}/{}", names::GROUP, names::VERSION);
        serde_json::from_value(
            json!({"apiVersion": api, "kind": kind, "metadata": metadata, "spec": spec, "status": status}),
        )
        .unwrap()
    }

    #[test]
    fn the_way_back_is_of_this_restore_and_of_what_is_there_now() {
        let restore: AetherRestore = object(
            "AetherRestore",
            json!({"name": "back", "uid": "r-2", "creationTimestamp": at(10)}),
            json!({"session": "fix", "checkpoint": "good"}),
            json!({}),
        );
        let session: AetherSession = object(
            "AetherSession",
            json!({"name": "fix", "uid": "s-1"}),
            json!({"source": {"name": "linux"}}),
            json!({"attachment": {"node": "a", "epoch": 3, "since": at(20)}}),
        );
        let safety = |restore: Option<&str>, uid: &str, created: i64, taken: Option<i64>| -> AetherCheckpoint {
            let annotations: serde_json::Map<_, _> =
                restore.map(|uid| (names::RESTORE_UID_ANNOTATION.to_owned(), json!(uid))).into_iter().collect();
            object(
                "AetherCheckpoint",
                json!({
                    "name": "back-safety",
                    "creationTimestamp": at(created),
                    "annotations": annotations,
                    "labels": {names::ORIGIN_LABEL: names::ORIGIN_SAFETY, names::SESSION_UID_LABEL: uid},
                }),
                json!({"session": "fix"}),
                taken.map_or(json!({}), |taken| json!({"durability": "Durable", "localTime": at(taken)})),
            )
        };
        for (name, checkpoint, expected) in [
            ("just made", safety(Some("r-2"), "s-1", 21, None), true),
            ("taken before a kill", safety(Some("r-2"), "s-1", 21, Some(22)), true),
            ("taken by an earlier holder", safety(Some("r-2"), "s-1", 11, Some(12)), false),
            ("of an earlier restore of this name", safety(Some("r-1"), "s-1", 5, Some(6)), false),
            ("of an earlier restore, while it was held here", safety(Some("r-1"), "s-1", 21, Some(22)), false),
            ("the operator's, not taken yet", safety(None, "s-1", 11, None), true),
            ("the operator's, before this node wrote", safety(None, "s-1", 11, Some(12)), false),
            ("the operator's, for an earlier restore", safety(None, "s-1", 9, None), false),
            ("of another session", safety(Some("r-2"), "s-0", 21, None), false),
        ] {
            assert_eq!(serves(&checkpoint, &restore, &session), expected, "{name}");
        }
    }
}
