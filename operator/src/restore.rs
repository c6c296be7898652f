//! AetherRestore of a session that no node holds: a safety checkpoint, then the session's head becomes the
//! checkpoint's tree. The node that holds a session restores it in place itself.
//!
//! At most once: the target is noted before the head is moved, so one that was cut short right after that is
//! recognised as done. A node that lets go of the session before it has restored it leaves the rest to the operator.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use aether_api::conditions::{self, COMPLETE, FAILED, Wanted, reason};
use aether_api::names::{ORIGIN_LABEL, ORIGIN_SAFETY};
use aether_api::session::{Durability, Head};
use aether_api::{AetherCheckpoint, AetherCheckpointSpec, AetherRestore, AetherRestoreStatus, AetherSession};
use kube::core::ObjectMeta;
use kube::runtime::controller::Action;
use kube::{Api, Resource, ResourceExt};

use crate::checkpoint::GRACE;
use crate::context::Context;
use crate::error::Result;
use crate::{objects, schedule};

const POLL: Duration = Duration::from_secs(2);

/// What is to be done next about a restore.
#[derive(Debug, PartialEq)]
enum Step {
    /// The session's node does it.
    Node(String),
    /// Something is not there yet.
    Wait(&'static str, String),
    /// It will never be.
    Fail(&'static str, String),
    /// Take the safety checkpoint and note the beginning.
    Begin { root: String },
    /// The safety checkpoint is safe: move the head.
    Move { root: String },
    /// The head was moved.
    Finish { root: String },
}

/// Everything that a restore speaks of, as it is now.
struct Found {
    session: Option<AetherSession>,
    checkpoint: Option<AetherCheckpoint>,
    safety: Option<AetherCheckpoint>,
}

/// Restores a session that no node holds.
///
/// # Errors
/// The read or write that failed.
pub async fn reconcile(seen: Arc<AetherRestore>, context: Arc<Context>) -> Result<Action> {
    let namespace = seen.namespace().unwrap_or_default();
    let restores: Api<AetherRestore> = objects::namespaced(&context.client, &namespace);
    let Some(restore) = objects::get(&restores, &seen.name_any()).await? else { return Ok(Action::await_change()) };
    if restore.meta().deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    if restore.finished() {
        let finished = restore.status.as_ref().and_then(|status| status.finished.clone());
        return schedule::collect(&restores, &restore, finished, restore.spec.ttl_seconds_after_finished).await;
    }
    let sessions: Api<AetherSession> = objects::namespaced(&context.client, &namespace);
    let checkpoints: Api<AetherCheckpoint> = objects::namespaced(&context.client, &namespace);
    let found = Found {
        session: objects::get(&sessions, &restore.spec.session).await?,
        checkpoint: objects::get(&checkpoints, &restore.spec.checkpoint).await?,
        safety: objects::get(&checkpoints, &safety_name(&restore)).await?,
    };
    let mut status = restore.status.clone().unwrap_or_default();
    let generation = restore.meta().generation;
    let pending = |status: &mut AetherRestoreStatus, why, message: String| {
        status.phase.get_or_insert_with(|| "Pending".into());
        conditions::set(&mut status.conditions, Wanted::no(COMPLETE, why, message), generation);
    };
    match next(&restore, &found) {
        Step::Node(message) => {
            if objects::age(&restore) < GRACE {
                return Ok(Action::requeue(POLL));
            }
            pending(&mut status, reason::WAITING_FOR_NODE, message);
        }
        Step::Wait(why, message) => pending(&mut status, why, message),
        Step::Fail(why, message) => {
            let absent = [reason::SESSION_NOT_FOUND, reason::CHECKPOINT_NOT_FOUND].contains(&why);
            if absent && objects::age(&restore) < GRACE {
                return Ok(Action::requeue(POLL));
            }
            end(&mut status, "Failed", Wanted::yes(FAILED, why, message.clone()), generation);
            if objects::write_status(&restores, &restore, &status).await?.is_some() {
                context.warn(&restore, &Wanted::yes(FAILED, why, message)).await;
            }
            return Ok(Action::requeue(POLL));
        }
        Step::Begin { root } => {
            objects::create(&checkpoints, &safety(&restore)).await?;
            status.phase = Some("Running".into());
            status.safety_checkpoint = Some(safety_name(&restore));
            status.started = Some(objects::now());
            status.root = Some(root);
            pending(&mut status, reason::IN_PROGRESS, format!("waits for the safety checkpoint {}", safety_name(&restore)));
        }
        Step::Move { root } => {
            let (Some(session), Some(checkpoint)) = (&found.session, &found.checkpoint) else { return Ok(Action::requeue(POLL)) };
            // Refused if a node takes the lease meanwhile; then that node restores it in place.
            objects::write_status(&sessions, session, &moved(session, checkpoint, &root)).await?;
            finish(&mut status, root, generation);
        }
        Step::Finish { root } => finish(&mut status, root, generation),
    }
    objects::write_status(&restores, &restore, &status).await?;
    Ok(Action::requeue(POLL))
}

fn safety_name(restore: &AetherRestore) -> String {
    format!("{}-safety", restore.name_any())
}

/// The checkpoint that is the way back.
fn safety(restore: &AetherRestore) -> AetherCheckpoint {
    let message = format!("before AetherRestore {} to {}", restore.name_any(), restore.spec.checkpoint);
    AetherCheckpoint {
        metadata: ObjectMeta {
            name: Some(safety_name(restore)),
            namespace: restore.namespace(),
            labels: Some(BTreeMap::from([(ORIGIN_LABEL.into(), ORIGIN_SAFETY.into())])),
            ..ObjectMeta::default()
        },
        spec: AetherCheckpointSpec { session: restore.spec.session.clone(), message: Some(message), ..AetherCheckpointSpec::default() },
        status: None,
    }
}

fn next(restore: &AetherRestore, found: &Found) -> Step {
    let (name, checkpoint_name) = (&restore.spec.session, &restore.spec.checkpoint);
    let status = restore.status.clone().unwrap_or_default();
    if name.is_empty() || checkpoint_name.is_empty() {
        return Step::Fail(reason::INVALID, "spec.session and spec.checkpoint must both be named".into());
    }
    let Some(session) = found.session.as_ref() else {
        return Step::Fail(reason::SESSION_NOT_FOUND, format!("AetherSession {name} does not exist in this namespace"));
    };
    if let Some(node) = session.holder() {
        return Step::Node(format!("node {node}, which holds AetherSession {name}, has not answered yet"));
    }
    if let Some(root) = status.root.filter(|root| status.started.is_some() && session.head_root() == Some(root)) {
        return Step::Finish { root };
    }
    let Some(checkpoint) = found.checkpoint.as_ref() else {
        return Step::Fail(reason::CHECKPOINT_NOT_FOUND, format!("AetherCheckpoint {checkpoint_name} does not exist in this namespace"));
    };
    let target = checkpoint.status.clone().unwrap_or_default();
    if let Some(failed) = conditions::get(&target.conditions, FAILED).filter(|failed| failed.status == "True") {
        return Step::Fail(reason::CHECKPOINT_NOT_READY, format!("AetherCheckpoint {checkpoint_name} failed: {}", failed.message));
    }
    let (Some(root), Some(Durability::Durable)) = (target.root, target.durability) else {
        return Step::Wait(reason::CHECKPOINT_NOT_READY, format!("AetherCheckpoint {checkpoint_name} is not in the store yet"));
    };
    let source = |base: Option<&aether_api::session::Base>| base.and_then(|base| Some((base.source_namespace.clone()?, base.source_name.clone()?)));
    let (ours, theirs) = (source(session.status.as_ref().and_then(|about| about.base.as_ref())), source(target.base.as_ref()));
    if ours.is_some() && theirs.is_some() && ours != theirs {
        return Step::Fail(reason::INVALID, format!("AetherCheckpoint {checkpoint_name} is of another source than AetherSession {name}: make a session from the checkpoint instead"));
    }
    if session.head_root().is_none() {
        return Step::Wait(reason::SESSION_NOT_READY, format!("AetherSession {name} has no tree in the store yet"));
    }
    if status.started.is_none() {
        return Step::Begin { root };
    }
    let Some(safety) = found.safety.as_ref().and_then(|safety| safety.status.clone()) else {
        return Step::Wait(reason::IN_PROGRESS, format!("waits for the safety checkpoint {}", safety_name(restore)));
    };
    if conditions::is_true(&safety.conditions, FAILED) {
        return Step::Fail(reason::CHECKPOINT_NOT_READY, format!("the safety checkpoint {} failed, so nothing was changed", safety_name(restore)));
    }
    // The safety checkpoint must be of what is there now, or the way back would miss something.
    match safety.durability {
        Some(Durability::Durable) if safety.root.as_deref() == session.head_root() => Step::Move { root },
        Some(Durability::Durable) => Step::Fail(
            reason::SESSION_NOT_READY,
            format!("AetherSession {name} changed after the safety checkpoint {}, so it is left as it is: make another AetherRestore", safety_name(restore)),
        ),
        _ => Step::Wait(reason::IN_PROGRESS, format!("waits for the safety checkpoint {}", safety_name(restore))),
    }
}

/// The session's status with its head moved.
fn moved(session: &AetherSession, checkpoint: &AetherCheckpoint, root: &str) -> aether_api::AetherSessionStatus {
    let mut about = session.status.clone().unwrap_or_default();
    let target = checkpoint.status.as_ref();
    about.head = Some(Head { root: root.into(), durability: Durability::Durable, time: objects::now() });
    about.changed_files = target.and_then(|target| target.changed_files);
    about.own_bytes = target.and_then(|target| target.own_bytes);
    about
}

fn finish(status: &mut AetherRestoreStatus, root: String, generation: Option<i64>) {
    status.root = Some(root);
    status.node = None;
    end(status, "Succeeded", Wanted::yes(COMPLETE, reason::DONE, "no node held the session: its head is the checkpoint's tree now"), generation);
}

fn end(status: &mut AetherRestoreStatus, phase: &str, wanted: Wanted, generation: Option<i64>) {
    status.phase = Some(phase.into());
    status.finished = Some(objects::now());
    conditions::set(&mut status.conditions, wanted, generation);
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_api::session::{Attachment, Base, Owner};
    use aether_api::{AetherCheckpointStatus, AetherRestoreSpec, AetherSessionStatus};

    fn restore() -> AetherRestore {
        AetherRestore::new("back", AetherRestoreSpec { session: "fix".into(), checkpoint: "before".into(), ..Default::default() })
    }

    fn checkpoint(root: &str, source: &str) -> AetherCheckpoint {
        let base = Base {
            root: None,
            source_namespace: Some("platform".into()),
            source_name: Some(source.into()),
            revision: None,
            revision_root: None,
            owner: Owner::default(),
        };
        let mut checkpoint = AetherCheckpoint::new("before", Default::default());
        let status = AetherCheckpointStatus { root: Some(root.into()), base: Some(base), durability: Some(Durability::Durable), ..Default::default() };
        checkpoint.status = Some(status);
        checkpoint
    }

    fn found() -> Found {
        let mut session = AetherSession::new("fix", Default::default());
        let head = Head { root: "new/2".into(), durability: Durability::Durable, time: objects::now() };
        let base = checkpoint("", "linux").status.unwrap().base;
        session.status = Some(AetherSessionStatus { head: Some(head), base, ..Default::default() });
        Found { session: Some(session), checkpoint: Some(checkpoint("old/1", "linux")), safety: None }
    }

    fn begun() -> AetherRestore {
        let mut restore = restore();
        restore.status = Some(AetherRestoreStatus { started: Some(objects::now()), root: Some("old/1".into()), ..Default::default() });
        restore
    }

    #[test]
    fn the_safety_checkpoint_comes_first_then_the_head_moves_once() {
        let mut found = found();
        assert_eq!(next(&restore(), &found), Step::Begin { root: "old/1".into() });
        assert!(matches!(next(&begun(), &found), Step::Wait(reason::IN_PROGRESS, _)));
        found.safety = Some(checkpoint("new/2", "linux"));
        assert_eq!(next(&begun(), &found), Step::Move { root: "old/1".into() });
        let session = found.session.as_ref().unwrap();
        let status = moved(session, found.checkpoint.as_ref().unwrap(), "old/1");
        found.session.as_mut().unwrap().status = Some(status);
        assert_eq!(next(&begun(), &found), Step::Finish { root: "old/1".into() }, "cut short after the move");
    }

    #[test]
    fn what_changed_after_the_safety_checkpoint_is_not_lost() {
        let mut found = found();
        found.safety = Some(checkpoint("older/3", "linux"));
        assert!(matches!(next(&begun(), &found), Step::Fail(reason::SESSION_NOT_READY, _)));
    }

    #[test]
    fn a_mounted_session_is_restored_by_its_node() {
        let mut found = found();
        found.session.as_mut().unwrap().status.as_mut().unwrap().attachment = Some(Attachment { node: Some("n1".into()), epoch: 1, since: None });
        assert!(matches!(next(&restore(), &found), Step::Node(message) if message.contains("n1")));
        // The node began, and let go before it had restored anything.
        let mut begun = begun();
        begun.status.as_mut().unwrap().node = Some("n1".into());
        found.session.as_mut().unwrap().status.as_mut().unwrap().attachment.as_mut().unwrap().node = None;
        found.safety = Some(checkpoint("new/2", "linux"));
        assert_eq!(next(&begun, &found), Step::Move { root: "old/1".into() });
    }

    #[test]
    fn what_is_missing_or_foreign_is_named() {
        let nothing = Found { session: None, ..found() };
        assert!(matches!(next(&restore(), &nothing), Step::Fail(reason::SESSION_NOT_FOUND, message) if message.contains("fix")));
        let no_checkpoint = Found { checkpoint: None, ..found() };
        assert!(matches!(next(&restore(), &no_checkpoint), Step::Fail(reason::CHECKPOINT_NOT_FOUND, message) if message.contains("before")));
        let foreign = Found { checkpoint: Some(checkpoint("old/1", "windows")), ..found() };
        assert!(matches!(next(&restore(), &foreign), Step::Fail(reason::INVALID, _)));
    }
}
