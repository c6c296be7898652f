//! AetherCheckpoint, as far as the operator is concerned: of a session that no node holds, where the newest tree is
//! already in the store. The node that holds a session takes its checkpoints itself. Automatic ones are pruned here.

use std::sync::Arc;
use std::time::Duration;

use aether_api::conditions::{self, DURABLE, FAILED, READY, Wanted, reason};
use aether_api::names::{ORIGIN_AUTOMATIC, ORIGIN_LABEL, ORIGIN_RECOVERED, SESSION_UID_LABEL};
use aether_api::session::{Consistency, Durability};
use aether_api::{AetherCheckpoint, AetherCheckpointStatus, AetherCommit, AetherSession};
use kube::runtime::controller::Action;
use kube::{Api, Client, Resource, ResourceExt};

use crate::context::Context;
use crate::error::Result;
use crate::pins::{self, Pin};
use crate::{nodes, objects, schedule};

/// Objects applied together arrive in any order: how long a request waits for what it names.
pub const GRACE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_secs(2);

/// What is to be done about a checkpoint.
#[derive(Debug, PartialEq)]
enum Verdict {
    /// It is taken, or a node brings it; nothing is to be done.
    Taken,
    /// The node that holds the session has it or takes it. After a while people are told whom it waits for.
    Node(String),
    /// The session has no tree yet.
    NotYet(String),
    /// This is it.
    Take(Box<AetherCheckpointStatus>),
    /// It will never be.
    Never(Wanted),
}

/// Takes the checkpoint of a session that no node holds.
///
/// # Errors
/// The read or write that failed.
pub async fn reconcile(seen: Arc<AetherCheckpoint>, context: Arc<Context>) -> Result<Action> {
    let namespace = seen.namespace().unwrap_or_default();
    let checkpoints: Api<AetherCheckpoint> = objects::namespaced(&context.client, &namespace);
    let Some(checkpoint) = objects::get(&checkpoints, &seen.name_any()).await? else {
        return Ok(Action::await_change());
    };
    if checkpoint.meta().deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let sessions: Api<AetherSession> = objects::namespaced(&context.client, &namespace);
    let session = match is_settled(&checkpoint) {
        true if !is_automatic(&checkpoint) => None,
        _ => objects::get(&sessions, &checkpoint.spec.session).await?,
    };
    let mut status = checkpoint.status.clone().unwrap_or_default();
    let generation = checkpoint.meta().generation;
    let mut failure = None;
    let unsettled = session.as_ref().filter(|_| !is_settled(&checkpoint));
    let lost = context.nodes.lost_holder(unsettled).await?;
    let again = match judge(&checkpoint, session.as_ref(), lost.as_deref()) {
        Verdict::Taken => {
            if let Some(session) = session.filter(|_| is_automatic(&checkpoint)) {
                prune(&context.client, &checkpoints, &session).await?;
            }
            None
        }
        Verdict::Take(taken) => {
            status = *taken;
            None
        }
        Verdict::Never(wanted) => {
            if wanted.reason == reason::SESSION_NOT_FOUND && objects::age(&checkpoint) < GRACE {
                return Ok(Action::requeue(POLL));
            }
            conditions::set(&mut status.conditions, wanted.clone(), generation);
            failure = Some(wanted);
            None
        }
        Verdict::Node(message) | Verdict::NotYet(message) if objects::age(&checkpoint) < GRACE => {
            tracing::debug!(checkpoint = checkpoint.name_any(), namespace, why = message, "waits");
            return Ok(Action::requeue(POLL));
        }
        Verdict::Node(message) => {
            conditions::set(&mut status.conditions, Wanted::no(READY, reason::WAITING_FOR_NODE, message), generation);
            Some(POLL)
        }
        Verdict::NotYet(message) => {
            conditions::set(&mut status.conditions, Wanted::no(READY, reason::SESSION_NOT_READY, message), generation);
            Some(POLL)
        }
    };
    let checkpoint = match objects::write_status(&checkpoints, &checkpoint, &status).await? {
        Some(written) => {
            if let Some(failure) = failure {
                context.warn(&written, &failure).await;
            }
            written
        }
        None => checkpoint,
    };
    let pinned = context.pins.keep(pins_of(&checkpoint)).await;
    Ok(schedule::action(if pinned { again } else { schedule::sooner(again, pins::RETRY) }))
}

fn has_origin(checkpoint: &AetherCheckpoint, wanted: &str) -> bool {
    checkpoint.labels().get(ORIGIN_LABEL).is_some_and(|origin| origin == wanted)
}

fn is_automatic(checkpoint: &AetherCheckpoint) -> bool {
    has_origin(checkpoint, ORIGIN_AUTOMATIC)
}

fn is_durable(checkpoint: &AetherCheckpoint) -> bool {
    checkpoint.status.as_ref().is_some_and(|status| status.durability == Some(Durability::Durable))
}

/// Whether a node has it, or it is in the store, or it failed: whether the operator has no part in it any more.
fn is_settled(checkpoint: &AetherCheckpoint) -> bool {
    checkpoint.status.as_ref().is_some_and(|status| {
        status.durability.is_some() || status.node.is_some() || conditions::is_true(&status.conditions, FAILED)
    })
}

/// Decides. `lost` says why the session's holder counts as lost, if it does.
fn judge(checkpoint: &AetherCheckpoint, session: Option<&AetherSession>, lost: Option<&str>) -> Verdict {
    // What a node had unsaved when it lost the session is on that node alone: the head would be the wrong tree.
    if is_settled(checkpoint) || has_origin(checkpoint, ORIGIN_RECOVERED) {
        return Verdict::Taken;
    }
    let name = &checkpoint.spec.session;
    if name.is_empty() {
        return Verdict::Never(Wanted::yes(FAILED, reason::INVALID, "spec.session is empty: name an AetherSession"));
    }
    let Some(session) = session else {
        let message = format!("AetherSession {name} does not exist in this namespace");
        return Verdict::Never(Wanted::yes(FAILED, reason::SESSION_NOT_FOUND, message));
    };
    if let Some(node) = session.holder().filter(|_| lost.is_none()) {
        return Verdict::Node(format!("node {node}, which holds AetherSession {name}, has not answered yet"));
    }
    let about = session.status.clone().unwrap_or_default();
    let unsaved = about.head.as_ref().is_some_and(|head| head.durability == Durability::Local);
    let Some(root) = session.head_root().filter(|_| !unsaved) else {
        return Verdict::NotYet(match lost {
            Some(why) => format!("{}; it has no tree in the store yet", nodes::way_out(why, name)),
            None => format!("AetherSession {name} has no tree in the store yet"),
        });
    };
    let now = objects::now();
    let mut status = AetherCheckpointStatus {
        root: Some(root.into()),
        parent: Some(root.into()),
        base: about.base.clone(),
        session_uid: session.uid(),
        durability: Some(Durability::Durable),
        consistency: Some(Consistency::PointInTime),
        local_time: Some(now.clone()),
        durable_time: Some(now),
        changed_files: about.changed_files,
        own_bytes: about.own_bytes,
        ..checkpoint.status.clone().unwrap_or_default()
    };
    let generation = checkpoint.meta().generation;
    let message = match lost {
        Some(why) => format!("the session's node is lost ({why}): this is the newest tree that was saved"),
        None => "no node held the session: this is its newest tree".into(),
    };
    conditions::set(&mut status.conditions, Wanted::yes(READY, reason::READY, message), generation);
    conditions::set(
        &mut status.conditions,
        Wanted::yes(DURABLE, reason::READY, "the tree is in the store"),
        generation,
    );
    Verdict::Take(Box::new(status))
}

/// Deletes the automatic checkpoints that the session does not want to keep any longer. Those of an earlier session of the
/// same name stay, and all of them once no more are asked for: they may be the only way back.
async fn prune(client: &Client, checkpoints: &Api<AetherCheckpoint>, session: &AetherSession) -> Result<()> {
    let (Some(automatic), Some(uid)) = (&session.spec.checkpoints, session.uid()) else { return Ok(()) };
    let selector = format!("{ORIGIN_LABEL}={ORIGIN_AUTOMATIC},{SESSION_UID_LABEL}={uid}");
    let of_session = objects::list(checkpoints, &selector).await?;
    let old = superfluous(of_session, automatic.keep as usize);
    if old.is_empty() {
        return Ok(());
    }
    let commits: Api<AetherCommit> = objects::namespaced(client, &session.namespace().unwrap_or_default());
    let commits = objects::list(&commits, "").await?;
    for old in old.iter().filter(|old| !commits.iter().any(|commit| commit.needs(&old.name_any()))) {
        objects::delete(checkpoints, old).await?;
    }
    Ok(())
}

/// Those older than the newest `keep` durable ones. One that is not durable yet replaces none that is.
fn superfluous(mut checkpoints: Vec<AetherCheckpoint>, keep: usize) -> Vec<AetherCheckpoint> {
    checkpoints.sort_by_key(|checkpoint| {
        std::cmp::Reverse((checkpoint.creation_timestamp().map(|time| time.0), checkpoint.name_any()))
    });
    let mut durable = 0;
    checkpoints.retain(|checkpoint| {
        let superfluous = durable >= keep && checkpoint.meta().deletion_timestamp.is_none();
        durable += usize::from(is_durable(checkpoint));
        superfluous
    });
    checkpoints
}

fn pins_of(checkpoint: &AetherCheckpoint) -> Vec<Pin> {
    if !is_durable(checkpoint) {
        return Vec::new();
    }
    let owner = checkpoint.uid().unwrap_or_default();
    let status = checkpoint.status.clone().unwrap_or_default();
    [("", status.root), ("base", status.base.and_then(|base| base.revision_root))]
        .into_iter()
        .filter_map(|(name, tree)| {
            Some(Pin { owner: owner.clone(), kind: pins::CHECKPOINT, name: name.into(), tree: tree? })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_api::AetherSessionStatus;
    use aether_api::session::{Attachment, Head};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    fn session() -> AetherSession {
        let mut session = AetherSession::new("fix", Default::default());
        session.metadata.uid = Some("s-1".into());
        let head = Head { root: "d/4".into(), durability: Durability::Durable, time: objects::now() };
        session.status = Some(AetherSessionStatus { head: Some(head), changed_files: Some(3), ..Default::default() });
        session
    }

    fn checkpoint() -> AetherCheckpoint {
        AetherCheckpoint::new(
            "before",
            aether_api::AetherCheckpointSpec { session: "fix".into(), ..Default::default() },
        )
    }

    #[test]
    fn nobody_holds_it_so_the_head_is_the_checkpoint() {
        let Verdict::Take(status) = judge(&checkpoint(), Some(&session()), None) else { panic!("not taken") };
        assert_eq!(
            (status.root.as_deref(), status.session_uid.as_deref(), status.changed_files),
            (Some("d/4"), Some("s-1"), Some(3))
        );
        assert!(conditions::is_true(&status.conditions, DURABLE) && conditions::is_true(&status.conditions, READY));
        let taken = AetherCheckpoint { status: Some(*status), ..checkpoint() };
        assert_eq!(judge(&taken, None, None), Verdict::Taken, "it outlives its session");
    }

    #[test]
    fn a_held_session_is_its_nodes_business() {
        let mut held = session();
        held.status.as_mut().unwrap().attachment = Some(Attachment { node: Some("n1".into()), epoch: 1, since: None });
        assert!(matches!(judge(&checkpoint(), Some(&held), None), Verdict::Node(message) if message.contains("n1")));
        let mut unsaved = session();
        unsaved.status.as_mut().unwrap().head.as_mut().unwrap().durability = Durability::Local;
        assert!(matches!(judge(&checkpoint(), Some(&unsaved), None), Verdict::NotYet(_)));
        assert!(
            matches!(judge(&checkpoint(), None, None), Verdict::Never(wanted) if wanted.reason == reason::SESSION_NOT_FOUND)
        );
    }

    #[test]
    fn of_a_lost_node_there_is_what_was_saved() {
        let mut held = session();
        held.status.as_mut().unwrap().attachment = Some(Attachment { node: Some("n1".into()), epoch: 1, since: None });
        let Verdict::Take(status) = judge(&checkpoint(), Some(&held), Some("node n1 does not exist any more")) else {
            panic!("not taken")
        };
        assert_eq!(status.root.as_deref(), Some("d/4"));
        assert!(conditions::get(&status.conditions, READY).unwrap().message.contains("n1 does not exist"));
        held.status.as_mut().unwrap().head = None;
        assert!(
            matches!(judge(&checkpoint(), Some(&held), Some("gone")), Verdict::NotYet(message) if message.contains("mount the session in a pod"))
        );
    }

    #[test]
    fn what_a_lost_node_had_unsaved_is_for_that_node_to_bring() {
        let mut recovered = checkpoint();
        recovered.labels_mut().insert(ORIGIN_LABEL.into(), ORIGIN_RECOVERED.into());
        assert_eq!(judge(&recovered, Some(&session()), None), Verdict::Taken);
        assert_eq!(judge(&recovered, None, None), Verdict::Taken, "also when the session is gone");
    }

    #[test]
    fn pruning_counts_durable_ones_only() {
        let at = |name: &str, second: i64, durability| {
            let mut checkpoint = checkpoint();
            checkpoint.metadata.name = Some(name.into());
            checkpoint.metadata.creation_timestamp = Some(Time(jiff::Timestamp::from_second(second).unwrap()));
            checkpoint.status = Some(AetherCheckpointStatus { durability: Some(durability), ..Default::default() });
            checkpoint
        };
        use Durability::{Durable, Local};
        let all = vec![at("a", 1, Durable), at("b", 2, Durable), at("c", 3, Durable), at("d", 4, Local)];
        let names = |keep| superfluous(all.clone(), keep).iter().map(ResourceExt::name_any).collect::<Vec<_>>();
        assert_eq!(names(1), ["b", "a"]);
        assert_eq!(names(2), ["a"]);
        assert!(names(3).is_empty());
    }
}
