//! AetherRestore of a session that no node holds: a safety checkpoint, then the session's head becomes the
//! checkpoint's tree. The node that holds a session restores it in place itself.
//!
//! At most once: the target is noted before the head is moved, and the session's `Restored` condition is written together
//! with its head, so a restore that was cut short right after that is recognised as done, whatever became of the session
//! since. A node that lets go of the session before it has restored it leaves the rest to the operator.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use aether_api::conditions::{self, COMPLETE, FAILED, Wanted, reason};
use aether_api::names::{ORIGIN_LABEL, ORIGIN_SAFETY, RESTORE_UID_ANNOTATION, SESSION_UID_LABEL};
use aether_api::restore::foreign;
use aether_api::session::{Durability, Head};
use aether_api::{AetherCheckpoint, AetherCheckpointSpec, AetherRestore, AetherRestoreStatus, AetherSession};
use kube::core::ObjectMeta;
use kube::runtime::controller::Action;
use kube::{Api, Resource, ResourceExt};

use crate::checkpoint::GRACE;
use crate::context::Context;
use crate::error::Result;
use crate::{nodes, objects, schedule};

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
    /// The name of the safety checkpoint, whether it is there or not.
    safety_name: String,
    safety: Option<AetherCheckpoint>,
    /// Why the node that holds the session counts as lost.
    lost: Option<String>,
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
    let session = objects::get(&sessions, &restore.spec.session).await?;
    let (safety_name, safety_found) = find_safety(&restore, &checkpoints).await?;
    let found = Found {
        checkpoint: objects::get(&checkpoints, &restore.spec.checkpoint).await?,
        lost: context.nodes.lost_holder(session.as_ref()).await?,
        session,
        safety_name,
        safety: safety_found,
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
            let Some(session) = &found.session else { return Ok(Action::requeue(POLL)) };
            objects::create(&checkpoints, &safety(&restore, session, &found.safety_name)).await?;
            status.phase = Some("Running".into());
            status.safety_checkpoint = Some(found.safety_name.clone());
            status.started.get_or_insert_with(objects::now);
            status.root = Some(root);
            pending(&mut status, reason::IN_PROGRESS, format!("waits for the safety checkpoint {}", found.safety_name));
        }
        Step::Move { root } => {
            let (Some(session), Some(checkpoint)) = (&found.session, &found.checkpoint) else {
                return Ok(Action::requeue(POLL));
            };
            // Refused if a node takes the lease meanwhile; then that node restores it in place.
            objects::write_status(&sessions, session, &moved(session, checkpoint, &restore, &root)).await?;
            finish(&mut status, root, generation);
        }
        Step::Finish { root } => finish(&mut status, root, generation),
    }
    objects::write_status(&restores, &restore, &status).await?;
    Ok(Action::requeue(POLL))
}

/// The names that the safety checkpoint may have, in order: one that is taken by somebody else's checkpoint (an earlier
/// restore of the same name, perhaps) is passed over.
fn safety_names(restore: &AetherRestore) -> Vec<String> {
    let name = restore.name_any();
    let plain = format!("{name}-safety");
    let noted = restore.status.as_ref().and_then(|status| status.safety_checkpoint.clone());
    let own = objects::derived_name(&name, "safety", &[&restore.uid().unwrap_or_default()]);
    // A name has at most 253 characters.
    noted.into_iter().chain((plain.len() <= 253).then_some(plain)).chain([own]).collect()
}

/// Whether the checkpoint was taken for this restore and no other.
fn is_safety_of(checkpoint: &AetherCheckpoint, restore: &AetherRestore) -> bool {
    restore.uid().is_some() && checkpoint.annotations().get(RESTORE_UID_ANNOTATION) == restore.meta().uid.as_ref()
}

/// The name of the safety checkpoint, and the checkpoint if it is there.
async fn find_safety(
    restore: &AetherRestore,
    checkpoints: &Api<AetherCheckpoint>,
) -> Result<(String, Option<AetherCheckpoint>)> {
    let mut names = safety_names(restore);
    let last = names.pop().unwrap_or_default();
    for name in names {
        match objects::get(checkpoints, &name).await? {
            Some(found) if !is_safety_of(&found, restore) => {}
            found => return Ok((name, found)),
        }
    }
    let found = objects::get(checkpoints, &last).await?;
    Ok((last, found))
}

/// The checkpoint that is the way back.
fn safety(restore: &AetherRestore, session: &AetherSession, name: &str) -> AetherCheckpoint {
    let message = format!("before AetherRestore {} to {}", restore.name_any(), restore.spec.checkpoint);
    AetherCheckpoint {
        metadata: ObjectMeta {
            name: Some(name.into()),
            namespace: restore.namespace(),
            labels: Some(BTreeMap::from([
                (ORIGIN_LABEL.into(), ORIGIN_SAFETY.into()),
                (SESSION_UID_LABEL.into(), session.uid().unwrap_or_default()),
            ])),
            annotations: Some(BTreeMap::from([(RESTORE_UID_ANNOTATION.into(), restore.uid().unwrap_or_default())])),
            ..ObjectMeta::default()
        },
        spec: AetherCheckpointSpec {
            session: restore.spec.session.clone(),
            message: Some(message),
            ..AetherCheckpointSpec::default()
        },
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
    if let Some(root) = status.root.filter(|_| restore.has_moved(session)) {
        return Step::Finish { root };
    }
    if let Some(node) = session.holder() {
        return match &found.lost {
            // What that node has unsaved is not in the head, so there is nothing to take a safety checkpoint of.
            Some(why) => Step::Wait(reason::WAITING_FOR_NODE, nodes::way_out(why, name)),
            None => Step::Node(format!("node {node}, which holds AetherSession {name}, has not answered yet")),
        };
    }
    let Some(checkpoint) = found.checkpoint.as_ref() else {
        return Step::Fail(
            reason::CHECKPOINT_NOT_FOUND,
            format!("AetherCheckpoint {checkpoint_name} does not exist in this namespace"),
        );
    };
    let target = checkpoint.status.clone().unwrap_or_default();
    if let Some(failed) = conditions::get(&target.conditions, FAILED).filter(|failed| failed.status == "True") {
        return Step::Fail(
            reason::CHECKPOINT_NOT_READY,
            format!("AetherCheckpoint {checkpoint_name} failed: {}", failed.message),
        );
    }
    let (Some(root), Some(Durability::Durable)) = (target.root, target.durability) else {
        return Step::Wait(
            reason::CHECKPOINT_NOT_READY,
            format!("AetherCheckpoint {checkpoint_name} is not in the store yet"),
        );
    };
    if let Some(why) = foreign(session, checkpoint) {
        return Step::Fail(reason::INVALID, why);
    }
    if session.head_root().is_none() {
        return Step::Wait(reason::SESSION_NOT_READY, format!("AetherSession {name} has no tree in the store yet"));
    }
    // A node that let go may have begun, and not come to the safety checkpoint.
    let Some(safety) = found.safety.as_ref().filter(|_| status.started.is_some()) else { return Step::Begin { root } };
    let safety_name = &found.safety_name;
    let Some(safety) = safety.status.clone() else {
        return Step::Wait(reason::IN_PROGRESS, format!("waits for the safety checkpoint {safety_name}"));
    };
    if conditions::is_true(&safety.conditions, FAILED) {
        return Step::Fail(
            reason::CHECKPOINT_NOT_READY,
            format!("the safety checkpoint {safety_name} failed, so nothing was changed"),
        );
    }
    // The safety checkpoint must be of what is there now, or the way back would miss something.
    match safety.durability {
        Some(Durability::Durable) if safety.root.as_deref() == session.head_root() => Step::Move { root },
        Some(Durability::Durable) => Step::Fail(
            reason::SESSION_NOT_READY,
            format!(
                "AetherSession {name} changed after the safety checkpoint {safety_name}, so it is left as it is: make another AetherRestore"
            ),
        ),
        _ => Step::Wait(reason::IN_PROGRESS, format!("waits for the safety checkpoint {safety_name}")),
    }
}

/// The session's status with its head moved, and the mark of who moved it.
fn moved(
    session: &AetherSession,
    checkpoint: &AetherCheckpoint,
    restore: &AetherRestore,
    root: &str,
) -> aether_api::AetherSessionStatus {
    let mut about = session.status.clone().unwrap_or_default();
    let target = checkpoint.status.as_ref();
    about.head = Some(Head { root: root.into(), durability: Durability::Durable, time: objects::now() });
    about.changed_files = target.and_then(|target| target.changed_files);
    about.own_bytes = target.and_then(|target| target.own_bytes);
    // A checkpoint does not say; it is counted with the next change.
    about.shared_bytes = None;
    conditions::set(&mut about.conditions, restore.moved(), session.meta().generation);
    about
}

fn finish(status: &mut AetherRestoreStatus, root: String, generation: Option<i64>) {
    status.root = Some(root);
    status.node = None;
    end(
        status,
        "Succeeded",
        Wanted::yes(COMPLETE, reason::DONE, "no node held the session: its head is the checkpoint's tree now"),
        generation,
    );
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
        let mut restore = AetherRestore::new(
            "back",
            AetherRestoreSpec { session: "fix".into(), checkpoint: "before".into(), ..Default::default() },
        );
        restore.metadata.uid = Some("r-1".into());
        restore
    }

    fn checkpoint(root: &str, source: &str) -> AetherCheckpoint {
        let base = Base {
            root: None,
            source_namespace: Some("platform".into()),
            source_name: Some(source.into()),
            revision: None,
            revision_root: None,
            commit: None,
            owner: Owner::default(),
        };
        let mut checkpoint = AetherCheckpoint::new("before", Default::default());
        let status = AetherCheckpointStatus {
            root: Some(root.into()),
            base: Some(base),
            durability: Some(Durability::Durable),
            ..Default::default()
        };
        checkpoint.status = Some(status);
        checkpoint
    }

    fn found() -> Found {
        let mut session = AetherSession::new("fix", Default::default());
        let head = Head { root: "new/2".into(), durability: Durability::Durable, time: objects::now() };
        let base = checkpoint("", "linux").status.unwrap().base;
        session.status = Some(AetherSessionStatus { head: Some(head), base, ..Default::default() });
        Found {
            session: Some(session),
            checkpoint: Some(checkpoint("old/1", "linux")),
            safety_name: "back-safety".into(),
            safety: None,
            lost: None,
        }
    }

    fn begun() -> AetherRestore {
        let mut restore = restore();
        restore.status = Some(AetherRestoreStatus {
            started: Some(objects::now()),
            root: Some("old/1".into()),
            ..Default::default()
        });
        restore
    }

    #[test]
    fn the_safety_checkpoint_comes_first_then_the_head_moves_once() {
        let mut found = found();
        assert_eq!(next(&restore(), &found), Step::Begin { root: "old/1".into() });
        assert_eq!(
            next(&begun(), &found),
            Step::Begin { root: "old/1".into() },
            "cut short before the safety checkpoint"
        );
        found.safety = Some(AetherCheckpoint { status: None, ..checkpoint("", "linux") });
        assert!(matches!(next(&begun(), &found), Step::Wait(reason::IN_PROGRESS, _)));
        found.safety = Some(checkpoint("new/2", "linux"));
        assert_eq!(next(&begun(), &found), Step::Move { root: "old/1".into() });
        let session = found.session.as_ref().unwrap();
        let mut status = moved(session, found.checkpoint.as_ref().unwrap(), &restore(), "old/1");
        assert_eq!(status.head.as_ref().map(|head| head.root.as_str()), Some("old/1"));
        found.session.as_mut().unwrap().status = Some(status.clone());
        assert_eq!(next(&begun(), &found), Step::Finish { root: "old/1".into() }, "cut short after the move");
        status.head.as_mut().unwrap().root = "newer/5".into();
        status.attachment = Some(Attachment { node: Some("n1".into()), epoch: 2, since: None });
        found.session.as_mut().unwrap().status = Some(status);
        assert_eq!(next(&begun(), &found), Step::Finish { root: "old/1".into() }, "and somebody worked on since");
        let mut another = begun();
        another.metadata.uid = Some("r-2".into());
        assert!(matches!(next(&another, &found), Step::Node(_)), "a later restore is another one");
    }

    #[test]
    fn a_session_that_has_the_tree_already_is_restored_with_a_way_back_too() {
        let mut found = found();
        found.session.as_mut().unwrap().status.as_mut().unwrap().head.as_mut().unwrap().root = "old/1".into();
        assert_eq!(next(&restore(), &found), Step::Begin { root: "old/1".into() });
        found.safety = Some(checkpoint("old/1", "linux"));
        assert_eq!(next(&begun(), &found), Step::Move { root: "old/1".into() });
    }

    #[test]
    fn a_safety_checkpoint_belongs_to_one_restore() {
        let found = found();
        let made = safety(&restore(), found.session.as_ref().unwrap(), "back-safety");
        assert!(is_safety_of(&made, &restore()));
        let mut again = restore();
        again.metadata.uid = Some("r-2".into());
        assert!(!is_safety_of(&made, &again), "an earlier restore of the same name");
        assert!(!is_safety_of(&checkpoint("new/2", "linux"), &restore()), "a checkpoint of a person");
        let names = safety_names(&again);
        assert_eq!(names[0], "back-safety");
        assert_ne!(names.last(), safety_names(&restore()).last());
    }

    #[test]
    fn while_its_node_is_lost_people_are_told_the_way_out() {
        let mut found = found();
        found.session.as_mut().unwrap().status.as_mut().unwrap().attachment =
            Some(Attachment { node: Some("n1".into()), epoch: 1, since: None });
        found.lost = Some("node n1 does not exist any more".into());
        assert!(
            matches!(next(&restore(), &found), Step::Wait(reason::WAITING_FOR_NODE, message) if message.contains("mount the session in a pod"))
        );
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
        found.session.as_mut().unwrap().status.as_mut().unwrap().attachment =
            Some(Attachment { node: Some("n1".into()), epoch: 1, since: None });
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
        assert!(
            matches!(next(&restore(), &nothing), Step::Fail(reason::SESSION_NOT_FOUND, message) if message.contains("fix"))
        );
        let no_checkpoint = Found { checkpoint: None, ..found() };
        assert!(
            matches!(next(&restore(), &no_checkpoint), Step::Fail(reason::CHECKPOINT_NOT_FOUND, message) if message.contains("before"))
        );
        let foreign = Found { checkpoint: Some(checkpoint("old/1", "windows")), ..found() };
        assert!(matches!(next(&restore(), &foreign), Step::Fail(reason::INVALID, _)));
    }
}
