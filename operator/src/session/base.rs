//! Where a session starts: read what its spec names, then decide, once, on a tree.

use aether_api::conditions::{self, FAILED, reason};
use aether_api::names::DEFAULT_OWNER;
use aether_api::session::{Base, Consistency, Durability, ForkedFrom, Owner};
use aether_api::{AetherCheckpoint, AetherSession, AetherSessionStatus, AetherSource};
use kube::ResourceExt;

use super::QUIET;
use crate::context::Context;
use crate::error::Result;
use crate::{nodes, objects};

/// What the spec names, as it is now.
pub(super) enum Origin {
    /// The status says already where the session started. With why the node counts as lost, if it does, that has the moment
    /// of the fork and has not brought it to the store.
    Known {
        lost: Option<String>,
    },
    Source(Option<Box<AetherSource>>),
    Checkpoint(Option<Box<AetherCheckpoint>>),
    /// The parent, and why the node that holds it counts as lost, if it does.
    Parent(Option<Box<AetherSession>>, Option<String>),
}

/// Where the session starts.
#[derive(Debug, PartialEq)]
pub(super) struct Start {
    base: Option<Base>,
    forked_from: Option<ForkedFrom>,
    /// What people should be told of it.
    pub(super) notice: Option<String>,
}

impl Start {
    /// The status with the start in it. What is there already stays: a start is stamped once.
    pub(super) fn stamp(self, mut status: AetherSessionStatus) -> AetherSessionStatus {
        status.base = status.base.or(self.base);
        status.forked_from = status.forked_from.or(self.forked_from);
        status
    }
}

/// Why a session cannot start yet.
#[derive(Debug, PartialEq)]
pub(super) struct Waiting {
    pub reason: &'static str,
    pub message: String,
    /// It ends by itself in a moment, as a rule.
    pub quiet: bool,
    /// It takes a person to end it.
    pub fatal: bool,
}

impl Waiting {
    pub(super) fn quietly(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), quiet: true, fatal: false }
    }

    fn openly(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), quiet: false, fatal: false }
    }

    pub(super) fn fatally(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), quiet: false, fatal: true }
    }
}

/// Reads what the spec names.
pub(super) async fn dereference(session: &AetherSession, context: &Context) -> Result<Origin> {
    let client = &context.client;
    let namespace = session.namespace().unwrap_or_default();
    if session.status.as_ref().is_some_and(|status| status.base.is_some()) {
        // As a rule it is in the store within moments, so that nobody need ask for the node.
        let slow = moment_under_way(session).filter(|moment| objects::since(&moment.time) >= QUIET);
        let lost = match slow.and_then(|moment| moment.node.as_deref()) {
            Some(node) => context.nodes.lost(node).await?,
            None => None,
        };
        return Ok(Origin::Known { lost });
    }
    if let Some(source) = &session.spec.source {
        let namespace = source.namespace.as_deref().unwrap_or(&namespace);
        let source = objects::get(&objects::namespaced(client, namespace), &source.name).await?;
        return Ok(Origin::Source(source.map(Box::new)));
    }
    if let Some(checkpoint) = &session.spec.checkpoint {
        let checkpoint = objects::get(&objects::namespaced(client, &namespace), checkpoint).await?;
        return Ok(Origin::Checkpoint(checkpoint.map(Box::new)));
    }
    let parent = session.spec.session.as_deref().unwrap_or_default();
    let parent = objects::get(&objects::namespaced(client, &namespace), parent).await?;
    // Once the moment is caught, the parent's node matters no more.
    let waits = session.status.as_ref().is_none_or(|status| status.forked_from.is_none());
    let lost = context.nodes.lost_holder(parent.as_ref().filter(|_| waits)).await?;
    Ok(Origin::Parent(parent.map(Box::new), lost))
}

/// The moment of a fork that is on the parent's node alone.
pub(super) fn moment_under_way(session: &AetherSession) -> Option<&ForkedFrom> {
    session.status.as_ref()?.forked_from.as_ref().filter(|moment| !moment.durable && moment.snapshot.is_some())
}

/// What the node says that had the moment of the fork and has it no more.
fn failure(session: &AetherSession) -> Option<String> {
    moment_under_way(session)?;
    let failed = conditions::get(&session.status.as_ref()?.conditions, FAILED)?;
    (failed.status == "True").then(|| failed.message.clone())
}

/// The node that has the moment of the fork may come back, and then the fork goes on.
fn moment_lost(session: &AetherSession, why: &str) -> Waiting {
    let parent = session.spec.session.as_deref().unwrap_or_default();
    let message = format!(
        "{why}, and the moment of the fork was not brought to the store before: if the node does not come back, delete this session and fork AetherSession {parent} again"
    );
    Waiting::openly(reason::WAITING_FOR_NODE, message)
}

/// Decides where the session starts.
pub(super) fn resolve(session: &AetherSession, origin: &Origin) -> std::result::Result<Start, Waiting> {
    match origin {
        Origin::Known { lost } => match (failure(session), lost) {
            (Some(failed), _) => Err(Waiting::fatally(reason::NODE_FAILED, failed)),
            (None, Some(why)) => Err(moment_lost(session, why)),
            (None, None) => Ok(Start { base: None, forked_from: None, notice: None }),
        },
        Origin::Source(source) => from_source(session, source.as_deref()),
        Origin::Checkpoint(checkpoint) => from_checkpoint(session, checkpoint.as_deref()),
        Origin::Parent(parent, lost) => from_parent(session, parent.as_deref(), lost.as_deref()),
    }
}

fn owner(session: &AetherSession, inherited: Option<&Base>) -> Owner {
    let (uid, gid) = DEFAULT_OWNER;
    session.spec.owner.or_else(|| Some(inherited?.owner)).unwrap_or(Owner { uid, gid })
}

fn from_source(session: &AetherSession, source: Option<&AetherSource>) -> std::result::Result<Start, Waiting> {
    let reference = session.spec.source.clone().unwrap_or_default();
    let own = session.namespace().unwrap_or_default();
    let namespace = reference.namespace.unwrap_or_else(|| own.clone());
    let name = format!("{namespace}/{}", reference.name);
    let Some(source) = source else {
        return Err(Waiting::openly(
            reason::SOURCE_NOT_FOUND,
            format!("AetherSource {name} does not exist: create it, or name another"),
        ));
    };
    let allowed =
        namespace == own || source.spec.allowed_namespaces.iter().any(|allowed| *allowed == own || allowed == "*");
    if !allowed {
        let message = format!(
            "AetherSource {name} does not allow namespace {own}: its owner can add it to spec.allowedNamespaces"
        );
        return Err(Waiting::fatally(reason::NAMESPACE_NOT_ALLOWED, message));
    }
    let revisions = source.status.as_ref().map_or(&[][..], |status| &status.revisions);
    let Some(newest) = revisions.first() else {
        let ready = source.status.as_ref().and_then(|status| conditions::get(&status.conditions, conditions::READY));
        let why = ready.map_or("it was not imported yet", |ready| ready.message.as_str());
        return Err(Waiting::openly(reason::SOURCE_NOT_READY, format!("AetherSource {name} has no revision: {why}")));
    };
    let revision = match &reference.revision {
        None => newest,
        Some(wanted) => revisions.iter().find(|revision| revision.name == *wanted).ok_or_else(|| {
            let there: Vec<&str> = revisions.iter().map(|revision| revision.name.as_str()).collect();
            let message = format!("AetherSource {name} has no revision {wanted}: it has {}", there.join(", "));
            Waiting::fatally(reason::REVISION_NOT_FOUND, message)
        })?,
    };
    let base = Base {
        root: Some(revision.root.clone()),
        source_namespace: Some(namespace),
        source_name: Some(reference.name),
        revision: Some(revision.name.clone()),
        revision_root: Some(revision.root.clone()),
        commit: revision.commit.clone(),
        owner: owner(session, None),
    };
    Ok(Start { base: Some(base), forked_from: None, notice: None })
}

fn from_checkpoint(
    session: &AetherSession,
    checkpoint: Option<&AetherCheckpoint>,
) -> std::result::Result<Start, Waiting> {
    let name = session.spec.checkpoint.as_deref().unwrap_or_default();
    let Some(checkpoint) = checkpoint else {
        return Err(Waiting::openly(
            reason::CHECKPOINT_NOT_FOUND,
            format!("AetherCheckpoint {name} does not exist in this namespace"),
        ));
    };
    let status = checkpoint.status.clone().unwrap_or_default();
    if let Some(failed) = conditions::get(&status.conditions, FAILED).filter(|failed| failed.status == "True") {
        return Err(Waiting::fatally(
            reason::CHECKPOINT_NOT_READY,
            format!("AetherCheckpoint {name} failed: {}", failed.message),
        ));
    }
    let (Some(root), Some(Durability::Durable)) = (&status.root, status.durability) else {
        return Err(Waiting::openly(
            reason::CHECKPOINT_NOT_READY,
            format!("AetherCheckpoint {name} is not in the store yet"),
        ));
    };
    Ok(Start {
        base: Some(continued(session, status.base.as_ref(), Some(root.clone()))),
        forked_from: None,
        notice: None,
    })
}

fn from_parent(
    session: &AetherSession,
    parent: Option<&AetherSession>,
    lost: Option<&str>,
) -> std::result::Result<Start, Waiting> {
    let name = session.spec.session.as_deref().unwrap_or_default();
    let lineage = parent.and_then(|parent| parent.status.as_ref()?.base.as_ref());
    if session.status.as_ref().is_some_and(|status| status.forked_from.is_some()) {
        // The parent's node has caught the moment. Its tree follows when it is digested.
        return Ok(Start { base: Some(continued(session, lineage, None)), forked_from: None, notice: None });
    }
    let Some(parent) = parent else {
        return Err(Waiting::openly(
            reason::SESSION_NOT_FOUND,
            format!("AetherSession {name} does not exist in this namespace"),
        ));
    };
    if let Some(node) = parent.holder().filter(|_| lost.is_none()) {
        let message =
            format!("node {node}, which holds AetherSession {name}, has not caught the moment of the fork yet");
        return Err(Waiting::quietly(reason::WAITING_FOR_NODE, message));
    }
    let status = parent.status.as_ref();
    let unsaved =
        status.and_then(|status| status.head.as_ref()).is_some_and(|head| head.durability == Durability::Local);
    let Some(root) = parent.head_root().filter(|_| !unsaved) else {
        let message = match lost {
            Some(why) => format!("{}; it has no tree in the store yet", nodes::way_out(why, name)),
            None => format!("AetherSession {name}, the parent, has no tree in the store yet"),
        };
        return Err(Waiting::openly(reason::SESSION_NOT_READY, message));
    };
    // Nobody can catch the moment on a lost node: the fork is of the last one that was saved.
    let saved = status.and_then(|status| status.head.as_ref()).map(|head| head.time.clone());
    let forked_from = ForkedFrom {
        session: name.into(),
        uid: parent.uid().unwrap_or_default(),
        node: None,
        snapshot: None,
        time: saved.filter(|_| lost.is_some()).unwrap_or_else(objects::now),
        consistency: Consistency::PointInTime,
        frozen_microseconds: None,
        durable: true,
    };
    let notice = lost.map(|why| {
        format!("starts from the newest tree of AetherSession {name} that was saved, because its node is lost ({why})")
    });
    Ok(Start { base: Some(continued(session, lineage, Some(root.into()))), forked_from: Some(forked_from), notice })
}

/// A base that goes on where an ancestor was, with the ancestor's source, for the sake of diffs.
fn continued(session: &AetherSession, ancestor: Option<&Base>, root: Option<String>) -> Base {
    Base {
        root,
        source_namespace: ancestor.and_then(|base| base.source_namespace.clone()),
        source_name: ancestor.and_then(|base| base.source_name.clone()),
        revision: ancestor.and_then(|base| base.revision.clone()),
        revision_root: ancestor.and_then(|base| base.revision_root.clone()),
        commit: ancestor.and_then(|base| base.commit.clone()),
        owner: owner(session, ancestor),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_api::session::{Attachment, Head, SourceReference};
    use aether_api::source::Revision;
    use aether_api::{AetherCheckpointStatus, AetherSessionSpec, AetherSourceSpec, AetherSourceStatus};

    fn revision(name: &str, root: &str) -> Revision {
        Revision {
            name: name.into(),
            root: root.into(),
            files: 1,
            bytes: 1,
            commit: None,
            listing: None,
            promoted: None,
            time: objects::now(),
            milliseconds: 1,
        }
    }

    fn source(allowed: &[&str]) -> AetherSource {
        let spec = AetherSourceSpec {
            allowed_namespaces: allowed.iter().map(|name| (*name).into()).collect(),
            ..Default::default()
        };
        let mut source = AetherSource::new("linux", spec);
        source.status = Some(AetherSourceStatus {
            revisions: vec![revision("r2", "b/2"), revision("r1", "a/1")],
            ..Default::default()
        });
        source
    }

    fn session(spec: AetherSessionSpec) -> AetherSession {
        let mut session = AetherSession::new("fix", spec);
        session.metadata.namespace = Some("agents".into());
        session
    }

    fn of_source(revision: Option<&str>) -> AetherSession {
        let source = SourceReference {
            namespace: Some("platform".into()),
            name: "linux".into(),
            revision: revision.map(Into::into),
        };
        session(AetherSessionSpec { source: Some(source), ..Default::default() })
    }

    fn reason_of(result: std::result::Result<Start, Waiting>) -> &'static str {
        result.unwrap_err().reason
    }

    #[test]
    fn a_session_starts_at_the_newest_or_the_named_revision() {
        let origin = Origin::Source(Some(source(&["agents"]).into()));
        let base = resolve(&of_source(None), &origin).unwrap().base.unwrap();
        assert_eq!((base.root.as_deref(), base.revision.as_deref()), (Some("b/2"), Some("r2")));
        assert_eq!((base.owner.uid, base.owner.gid), DEFAULT_OWNER);
        let base = resolve(&of_source(Some("r1")), &origin).unwrap().base.unwrap();
        assert_eq!(base.revision_root.as_deref(), Some("a/1"));
        let missing = resolve(&of_source(Some("r9")), &origin).unwrap_err();
        assert_eq!((missing.reason, missing.fatal), (reason::REVISION_NOT_FOUND, true));
        assert!(missing.message.contains("r2, r1"), "{}", missing.message);
    }

    #[test]
    fn a_source_is_for_the_namespaces_that_it_lists() {
        assert_eq!(
            reason_of(resolve(&of_source(None), &Origin::Source(Some(source(&["other"]).into())))),
            reason::NAMESPACE_NOT_ALLOWED
        );
        assert!(resolve(&of_source(None), &Origin::Source(Some(source(&["*"]).into()))).is_ok());
        assert_eq!(reason_of(resolve(&of_source(None), &Origin::Source(None))), reason::SOURCE_NOT_FOUND);
        let mut own = of_source(None);
        own.metadata.namespace = Some("platform".into());
        assert!(resolve(&own, &Origin::Source(Some(source(&[]).into()))).is_ok());
        let mut empty = source(&["*"]);
        empty.status = None;
        assert_eq!(reason_of(resolve(&of_source(None), &Origin::Source(Some(empty.into())))), reason::SOURCE_NOT_READY);
    }

    #[test]
    fn a_checkpoint_must_be_durable() {
        let session = session(AetherSessionSpec { checkpoint: Some("before".into()), ..Default::default() });
        let mut checkpoint = AetherCheckpoint::new("before", Default::default());
        let lineage = resolve(&of_source(None), &Origin::Source(Some(source(&["*"]).into()))).unwrap().base;
        let status = AetherCheckpointStatus {
            root: Some("c/3".into()),
            base: lineage,
            durability: Some(Durability::Local),
            ..Default::default()
        };
        checkpoint.status = Some(status);
        assert_eq!(
            reason_of(resolve(&session, &Origin::Checkpoint(Some(checkpoint.clone().into())))),
            reason::CHECKPOINT_NOT_READY
        );
        checkpoint.status.as_mut().unwrap().durability = Some(Durability::Durable);
        let base = resolve(&session, &Origin::Checkpoint(Some(checkpoint.into()))).unwrap().base.unwrap();
        assert_eq!((base.root.as_deref(), base.revision_root.as_deref()), (Some("c/3"), Some("b/2")));
    }

    #[test]
    fn a_fork_takes_the_head_of_a_parent_that_nobody_holds() {
        let mut parent = of_source(None);
        let base = Base {
            owner: Owner { uid: 7, gid: 8 },
            ..resolve(&parent, &Origin::Source(Some(source(&["*"]).into()))).unwrap().base.unwrap()
        };
        let head = Head { root: "d/4".into(), durability: Durability::Durable, time: objects::now() };
        parent.status = Some(AetherSessionStatus { base: Some(base), head: Some(head), ..Default::default() });
        parent.metadata.uid = Some("p-1".into());
        let fork = session(AetherSessionSpec { session: Some("fix".into()), ..Default::default() });
        let start = resolve(&fork, &Origin::Parent(Some(Box::new(parent.clone())), None)).unwrap();
        let base = start.base.unwrap();
        assert_eq!(
            (base.root.as_deref(), base.revision_root.as_deref(), base.owner.uid),
            (Some("d/4"), Some("b/2"), 7)
        );
        assert!(start.forked_from.is_some_and(|from| from.durable && from.uid == "p-1"));

        parent.status.as_mut().unwrap().attachment =
            Some(Attachment { node: Some("n1".into()), epoch: 1, since: None });
        let waiting = resolve(&fork, &Origin::Parent(Some(Box::new(parent.clone())), None)).unwrap_err();
        assert_eq!((waiting.reason, waiting.quiet), (reason::WAITING_FOR_NODE, true));

        let saved = resolve(
            &fork,
            &Origin::Parent(Some(Box::new(parent.clone())), Some("node n1 does not exist any more".into())),
        )
        .unwrap();
        assert!(
            saved.notice.is_some_and(|notice| notice.contains("n1")),
            "people are told that it is not the present moment"
        );
        assert_eq!(saved.base.unwrap().root.as_deref(), Some("d/4"));

        let mut caught = fork;
        let from = ForkedFrom {
            session: "fix".into(),
            uid: "p-1".into(),
            node: Some("n1".into()),
            snapshot: Some("s".into()),
            time: objects::now(),
            consistency: Consistency::PointInTime,
            frozen_microseconds: Some(1),
            durable: false,
        };
        caught.status = Some(AetherSessionStatus { forked_from: Some(from), ..Default::default() });
        let base = resolve(&caught, &Origin::Parent(Some(Box::new(parent)), None)).unwrap().base.unwrap();
        assert_eq!(
            (base.root, base.revision_root.as_deref()),
            (None, Some("b/2")),
            "the root follows when the node has digested it"
        );
    }
}
