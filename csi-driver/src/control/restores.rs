//! Restores of sessions that this node holds: a safety checkpoint first, then the tree difference through the mount with
//! the pods held still. A restore that a kill interrupted begins again at the difference that is left.

use std::sync::Arc;

use aether_api::conditions::{self, COMPLETE, FAILED, Wanted, reason};
use aether_api::session::Durability;
use aether_api::{AetherCheckpoint, AetherRestore, AetherRestoreStatus, AetherSession, names};
use aether_cas::Blob;
use aether_engine::RestoreReport;
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

/// Does a restore that is for this node to do.
pub(super) async fn reconcile(restore: Arc<AetherRestore>, driver: Arc<Driver>) -> Result<()> {
    if restore.finished() || restore.metadata.deletion_timestamp.is_some() {
        return Ok(());
    }
    let namespace = restore.namespace().unwrap_or_default();
    let Some(session) = driver.cluster.sessions.get(&namespace, &restore.spec.session) else { return Ok(()) };
    if !driver.holds(&uid(&*session)) {
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

    let safety = format!("{}-safety", restore.name_any());
    let restore = begin(&restore, &driver, &safety, target).await?;
    match work(&session, &driver, &restore, &safety, target).await {
        Ok(Some(report)) => finish(&restore, &driver, Ok(report)).await,
        // Let go in the meantime: the operator restores a session that nobody holds.
        Ok(None) => Ok(()),
        Err(failure @ Failure::Kubernetes { .. }) => Err(failure),
        Err(failure) => {
            let message = format!("{}; checkpoint {safety} is the way back", chain(&failure));
            finish(&restore, &driver, Err((reason::NODE_FAILED, message))).await
        }
    }
}

/// A checkpoint has changed: restores that wait for its tree go on.
pub(super) async fn wake(checkpoint: Arc<AetherCheckpoint>, driver: Arc<Driver>) -> Result<()> {
    for restore in driver.cluster.restores.all() {
        if !restore.finished() && restore.namespace() == checkpoint.namespace() && restore.spec.checkpoint == checkpoint.name_any() {
            driver.cluster.restores.poke(restore.as_ref());
        }
    }
    Ok(())
}

async fn begin(restore: &Arc<AetherRestore>, driver: &Driver, safety: &str, target: Blob) -> Result<Arc<AetherRestore>> {
    let api = driver.cluster.restores.api(&restore.namespace().unwrap_or_default());
    update_status(&api, restore.clone(), names::DRIVER_MANAGER, |restore| {
        let begun = restore.status.as_ref().is_some_and(|status| status.node.as_deref() == Some(driver.node()));
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
) -> Result<Option<RestoreReport>> {
    let message = format!("before restore {} to checkpoint {}", restore.name_any(), restore.spec.checkpoint);
    let made = driver.make_checkpoint(session, safety, names::ORIGIN_SAFETY, message).await?;
    let taken = |checkpoint: &AetherCheckpoint| {
        checkpoint.status.as_ref().and_then(|status| status.durability).is_some_and(|durability| matches!(durability, Durability::Local | Durability::Durable))
    };
    if !taken(&made) && checkpoints::take(&Arc::new(made), driver).await?.is_none_or(|checkpoint| !taken(&checkpoint)) {
        return Ok(None);
    }

    let uid = uid(&**session);
    let _lock = driver.session_locks.lock(&uid).await;
    if !driver.holds(&uid) {
        return Ok(None);
    }
    let writers = driver.writers(&uid).await?;
    if !writers.without_cgroup.is_empty() {
        return Err(Failure::NotYet(format!(
            "no cgroup found for pod {}, whose processes must be held still: delete the pod and restore the session unmounted",
            writers.without_cgroup.join(", ")
        )));
    }
    driver.engine.mount_session(&uid).await?;
    let report = driver.engine.restore_in_place(&uid, target, &writers.cgroups, &driver.remote).await?;
    Ok(Some(report))
}

async fn finish(
    restore: &Arc<AetherRestore>,
    driver: &Driver,
    result: std::result::Result<RestoreReport, (&str, String)>,
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
                bytes = report.bytes,
                frozen_ms,
                "restored"
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
