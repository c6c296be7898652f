//! Restores of sessions that this node holds: the tree difference through the mount, with the pods held still. What the session
//! shows in that moment becomes the safety checkpoint: its object is made before, its uid is the name of the snapshot that the engine
//! keeps before it touches anything, and whoever finds such a snapshot stamps the object with it. So the way back lacks nothing that was
//! written while contents were fetched, and a checkpoint without a snapshot says that nothing was touched.
//!
//! A restore that a kill interrupted in the middle begins again at the difference that is left, with a safety checkpoint more for what
//! was written meanwhile; one that was done is remembered in the session's record before anybody is told, and is never done
//! again.

use std::path::PathBuf;
use std::sync::Arc;

use aether_api::conditions::{self, COMPLETE, FAILED, Wanted, reason};
use aether_api::restore::foreign;
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
use crate::moments::{full_name, uid, under_epoch};
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
        if let Some(name) = &applied.safety
            && let Some(safety) = driver.cluster.checkpoints.read(&namespace, name).await?
        {
            checkpoints::stamp_kept(&safety, &driver).await?;
        }
        return finish(&restore, &driver, &Outcome::Done(applied.clone())).await;
    }
    if record.upper != Upper::Dirty || restored_before(&restore, &driver, &record.uid).await? {
        return Ok(());
    }
    let Some(checkpoint) = driver.cluster.checkpoints.find(&namespace, &restore.spec.checkpoint).await? else {
        let message = format!("checkpoint {} does not exist", restore.spec.checkpoint);
        return finish(&restore, &driver, &Outcome::Refused(reason::CHECKPOINT_NOT_FOUND, message)).await;
    };
    let Some(target) = checkpoint.status.as_ref().and_then(|status| status.root.as_deref()) else {
        if checkpoint.status.as_ref().is_some_and(|status| conditions::is_true(&status.conditions, FAILED)) {
            let message = format!("checkpoint {} failed and has no tree", restore.spec.checkpoint);
            return finish(&restore, &driver, &Outcome::Refused(reason::CHECKPOINT_NOT_READY, message)).await;
        }
        // `wake` brings it back here when the checkpoint has its tree.
        return Ok(());
    };
    let target = match parse_root(target, &format!("checkpoint {}", restore.spec.checkpoint)) {
        Ok(target) => target,
        Err(failure) => return finish(&restore, &driver, &Outcome::Refused(reason::INVALID, chain(&failure))).await,
    };

    if let Some(why) = foreign(&session, &checkpoint) {
        return finish(&restore, &driver, &Outcome::Refused(reason::INVALID, why)).await;
    }

    let safety = choose_safety(&restore, &session, &driver).await?;
    let restore = begin(&restore, &driver, safety.way_back(), target).await?;
    match work(&session, &driver, &restore, &safety, target).await {
        Ok(Some(applied)) => finish(&restore, &driver, &Outcome::Done(applied)).await,
        // Let go in the meantime: the operator restores a session that nobody holds, and says so.
        Ok(None) => Ok(()),
        Err(failure @ Failure::Kubernetes { .. }) => Err(failure),
        Err(failure) => {
            let way_back = way_back(&restore, &session, &driver, &safety).await?;
            let what = way_back
                .as_ref()
                .map_or("nothing was changed".into(), |name| format!("checkpoint {name} is the way back"));
            let message = format!("{}; {what}", chain(&failure));
            finish(&restore, &driver, &Outcome::Failed { message, way_back }).await
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

/// What a checkpoint is to a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Made for it and not taken yet: the engine takes it when it holds the pods still.
    Waiting,
    /// Of an attempt of this node that was cut short after it may have touched the session: what was there before.
    Before,
    /// Something else, or taken by an earlier holder: what was written since would be missing.
    None,
}

/// The operator's, for a restore that began while nobody held the session, may name the session only.
fn role(checkpoint: &AetherCheckpoint, restore: &AetherRestore, session: &AetherSession) -> Role {
    let of_session = checkpoint.labels().get(names::SESSION_UID_LABEL) == session.uid().as_ref();
    let made_for_it = match checkpoint.annotations().get(names::RESTORE_UID_ANNOTATION) {
        Some(uid) => restore.uid().as_ref() == Some(uid),
        None => {
            checkpoint.labels().get(names::ORIGIN_LABEL).is_some_and(|origin| origin == names::ORIGIN_SAFETY)
                && checkpoint.creation_timestamp().map(|time| time.0) >= restore.creation_timestamp().map(|time| time.0)
        }
    };
    if !(of_session && made_for_it) {
        return Role::None;
    }
    let status = checkpoint.status.as_ref();
    if status.is_none_or(|status| status.durability.is_none()) {
        let withdrawn = status.is_some_and(|status| conditions::is_true(&status.conditions, FAILED));
        return if withdrawn { Role::None } else { Role::Waiting };
    }
    let attached = session.status.as_ref().and_then(|status| status.attachment.as_ref()?.since.as_ref());
    let taken = status.and_then(|status| status.local_time.as_ref());
    if taken.zip(attached).is_some_and(|(taken, since)| taken.0 > since.0) { Role::Before } else { Role::None }
}

/// The safety checkpoint of an attempt.
struct Safety {
    name: String,
    /// That of the first attempt, if this is not the first.
    before: Option<String>,
}

impl Safety {
    /// What the session was before the restore.
    fn way_back(&self) -> &str {
        self.before.as_ref().unwrap_or(&self.name)
    }
}

/// Finds a name for the safety checkpoint: the plain one, unless that is taken.
async fn choose_safety(restore: &AetherRestore, session: &AetherSession, driver: &Arc<Driver>) -> Result<Safety> {
    let plain = format!("{}-safety", restore.name_any());
    let mut name = plain.clone();
    let mut before = None;
    let own = uid(restore);
    let own = own.split('-').next().unwrap_or_default();
    for number in 1.. {
        let Some(there) = driver.cluster.checkpoints.read(&restore.namespace().unwrap_or_default(), &name).await?
        else {
            break;
        };
        let there = checkpoints::stamp_kept(&there, driver).await?.unwrap_or(there);
        match role(&there, restore, session) {
            Role::Waiting => break,
            Role::Before => _ = before.get_or_insert(name),
            Role::None => {}
        }
        name = format!("{plain}-{own}-{number}");
    }
    Ok(Safety { name, before })
}

/// After a failure: the checkpoint that is the way back, or nothing when the session is as it was. Then the one that was made
/// for the attempt will never be taken.
async fn way_back(
    restore: &AetherRestore,
    session: &AetherSession,
    driver: &Arc<Driver>,
    safety: &Safety,
) -> Result<Option<String>> {
    let namespace = restore.namespace().unwrap_or_default();
    let Some(made) = driver.cluster.checkpoints.read(&namespace, &safety.name).await? else {
        return Ok(safety.before.clone());
    };
    let ours = restore.uid().is_some_and(|uid| made.annotations().get(names::RESTORE_UID_ANNOTATION) == Some(&uid));
    if ours && checkpoints::stamp_kept(&made, driver).await?.is_some() {
        return Ok(Some(safety.way_back().to_owned()));
    }
    if role(&made, restore, session) == Role::Waiting {
        checkpoints::withdraw(&made, driver, "the restore failed before it touched anything").await?;
    }
    Ok(safety.before.clone())
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
    safety: &Safety,
    target: Blob,
) -> Result<Option<Applied>> {
    let uid = uid(&**session);
    writers(driver, &uid).await?;
    // Contents may take minutes to come; nobody waits for the session's lock meanwhile.
    driver.engine.prepare_restore(&uid, target, &*driver.remote).await?;

    let _lock = driver.session_locks.lock(&uid).await;
    let Some((held, mut record)) = driver.holds_now(&uid).await? else { return Ok(None) };
    // Let go, restored by the operator and taken again since the beginning.
    if restore.has_moved(&held) {
        return Ok(None);
    }
    let cgroups = writers(driver, &uid).await?;
    let made = {
        let mut message = format!("before restore {} to checkpoint {}", restore.name_any(), restore.spec.checkpoint);
        if let Some(before) = &safety.before {
            message = format!("{message} was begun again: what was there at first is checkpoint {before}");
        }
        let restore = crate::moments::uid(restore);
        driver.make_checkpoint(session, &safety.name, names::ORIGIN_SAFETY, message, Some(&restore)).await?
    };
    if role(&made, restore, session) != Role::Waiting {
        return Err(Failure::Denied(format!(
            "checkpoint {} is there already and is of something else, so rename it",
            safety.name
        )));
    }
    driver.mount_session(&uid, session).await?;
    let moment = under_epoch(&crate::moments::uid(&made), record.epoch);
    let report = driver.engine.restore_in_place(&uid, &moment, target, &cgroups, &*driver.remote).await?;
    tracing::info!(restore = full_name(restore), bytes = report.bytes, "restored");
    let applied = Applied {
        restore: crate::moments::uid(restore),
        safety: Some(safety.name.clone()),
        changed: report.changed,
        removed: report.removed,
        frozen_micros: report.frozen_micros,
    };
    // Pods write again from here on: what says that it was done must outlive this process.
    let forgotten = (record.applied.len() + 1).saturating_sub(REMEMBERED);
    record.applied.drain(..forgotten);
    record.applied.push(applied.clone());
    driver.sessions.put(record).await?;
    checkpoints::stamp_kept(&Arc::new(made), driver).await?;
    Ok(Some(applied))
}

/// The cgroups of all writers of a session.
async fn writers(driver: &Driver, uid: &str) -> Result<Vec<PathBuf>> {
    let writers = driver.writers(uid).await?;
    if writers.doubts.is_empty() {
        return Ok(writers.cgroups);
    }
    Err(Failure::NotYet(format!(
        "every writer must be held still, but {}: delete the session's pods and restore it unmounted",
        writers.doubts.join("; ")
    )))
}

/// How a restore ended.
enum Outcome {
    Done(Applied),
    /// It asks for what cannot be, by a reason of [`reason`].
    Refused(&'static str, String),
    /// This node could not. Without a way back nothing was changed.
    Failed {
        message: String,
        way_back: Option<String>,
    },
}

async fn finish(restore: &Arc<AetherRestore>, driver: &Driver, outcome: &Outcome) -> Result<()> {
    let (wanted, mut status) = match outcome {
        Outcome::Done(report) => {
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
            (Wanted::yes(COMPLETE, reason::DONE, message), json!({"phase": "Succeeded", "changedPaths": changed}))
        }
        Outcome::Refused(why, message) => (Wanted::yes(FAILED, *why, message), json!({"phase": "Failed"})),
        Outcome::Failed { message, way_back } => {
            let status = json!({"phase": "Failed", "safetyCheckpoint": way_back});
            (Wanted::yes(FAILED, reason::NODE_FAILED, message), status)
        }
    };
    if wanted.type_ == FAILED {
        driver.events.on(&**restore, EventType::Warning, "RestoreFailed", wanted.message.clone()).await;
    }
    status["finished"] = json!(Time(Timestamp::now()));
    let api = driver.cluster.restores.api(&restore.namespace().unwrap_or_default());
    update_status(&api, restore.clone(), names::DRIVER_MANAGER, |restore| {
        if restore.finished() {
            return None;
        }
        let mut all = restore.status.as_ref().map(|status| status.conditions.clone()).unwrap_or_default();
        conditions::set(&mut all, wanted.clone(), restore.metadata.generation);
        let mut status = status.clone();
        status["conditions"] = json!(all);
        Some(status)
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
            ("just made", safety(Some("r-2"), "s-1", 21, None), Role::Waiting),
            ("taken before a kill", safety(Some("r-2"), "s-1", 21, Some(22)), Role::Before),
            ("taken by an earlier holder", safety(Some("r-2"), "s-1", 11, Some(12)), Role::None),
            ("of an earlier restore of this name", safety(Some("r-1"), "s-1", 5, Some(6)), Role::None),
            ("of an earlier restore, while it was held here", safety(Some("r-1"), "s-1", 21, Some(22)), Role::None),
            ("the operator's, not taken yet", safety(None, "s-1", 11, None), Role::Waiting),
            ("the operator's, before this node wrote", safety(None, "s-1", 11, Some(12)), Role::None),
            ("the operator's, for an earlier restore", safety(None, "s-1", 9, None), Role::None),
            ("of another session", safety(Some("r-2"), "s-0", 21, None), Role::None),
        ] {
            assert_eq!(role(&checkpoint, &restore, &session), expected, "{name}");
        }
    }
}
