//! What a commit is of: found out once, when its checkpoint is durable, and then fixed in its status.

use std::collections::BTreeMap;

use aether_api::commit::{AetherCommitStatus, CommitBase, CommitSource};
use aether_api::conditions::{self, FAILED, reason};
use aether_api::names::{COMMIT_UID_LABEL, ORIGIN_COMMIT, ORIGIN_LABEL};
use aether_api::session::Durability;
use aether_api::{AetherCheckpoint, AetherCheckpointSpec, AetherCommit, AetherSession, AetherSource};
use kube::core::ObjectMeta;
use kube::{Api, Resource, ResourceExt};

use crate::admission::Creation;
use crate::checkpoint::GRACE;
use crate::context::Context;
use crate::crash::crash_point;
use crate::error::Result;
use crate::objects;
use crate::signature::{Keys, Refusal, Statement};

/// Whether it is known what the commit is of.
pub(super) enum Settled {
    /// The status says it.
    Yes,
    /// Something is not there yet: a reason and a message.
    NotYet(&'static str, String),
    /// It will never be.
    Never(&'static str, String),
}

/// Whether the commit is what the operator has signed.
pub(super) fn is_genuine(commit: &AetherCommit, keys: &Keys) -> std::result::Result<(), Refusal> {
    let (namespace, name) = (commit.namespace().unwrap_or_default(), commit.name_any());
    let statement = Statement::commit(&namespace, &name, &commit.spec);
    keys.verify(&statement, commit.spec.signature.as_ref(), commit.meta().creation_timestamp.as_ref())
}

/// Finds out what the commit is of, and fixes it in `status`.
pub(super) async fn settle(
    commit: &AetherCommit,
    status: &mut AetherCommitStatus,
    keys: &Keys,
    context: &Context,
) -> Result<Settled> {
    let namespace = commit.namespace().unwrap_or_default();
    let young = objects::age(commit) < GRACE;
    let missing = |why, message| if young { Settled::NotYet(why, message) } else { Settled::Never(why, message) };
    let checkpoints: Api<AetherCheckpoint> = objects::namespaced(&context.client, &namespace);
    let name = match (&commit.spec.checkpoint, &status.checkpoint) {
        (Some(name), _) | (None, Some(name)) => name.clone(),
        (None, None) => {
            let session = commit.spec.session.as_deref().unwrap_or_default();
            let sessions: Api<AetherSession> = objects::namespaced(&context.client, &namespace);
            if objects::get(&sessions, session).await?.is_none() {
                let message = format!("AetherSession {session} does not exist in this namespace");
                return Ok(missing(reason::SESSION_NOT_FOUND, message));
            }
            take(commit, &checkpoints).await?
        }
    };
    status.checkpoint = Some(name.clone());
    let Some(checkpoint) = objects::get(&checkpoints, &name).await? else {
        let message = format!("AetherCheckpoint {name} does not exist in this namespace");
        return Ok(missing(reason::CHECKPOINT_NOT_FOUND, message));
    };
    let about = checkpoint.status.clone().unwrap_or_default();
    if let Some(failed) = conditions::get(&about.conditions, FAILED).filter(|failed| failed.status == "True") {
        let message = format!("AetherCheckpoint {name} failed: {}", failed.message);
        return Ok(Settled::Never(reason::CHECKPOINT_NOT_READY, message));
    }
    let root = about.root.clone().filter(|_| about.durability == Some(Durability::Durable));
    let (Some(root), Some(base)) = (root, about.base.clone()) else {
        let message = format!("AetherCheckpoint {name} is not in the store yet");
        return Ok(Settled::NotYet(reason::CHECKPOINT_NOT_READY, message));
    };
    let (Some(of), Some(source), Some(base_root)) = (base.source_namespace, base.source_name, base.revision_root)
    else {
        let message = format!("AetherCheckpoint {name} does not say what source its session started from");
        return Ok(Settled::Never(reason::SOURCE_NOT_FOUND, message));
    };
    let sources: Api<AetherSource> = objects::namespaced(&context.client, &of);
    let Some(source) = objects::get(&sources, &source).await? else {
        let message = format!("AetherSource {of}/{source} does not exist");
        return Ok(Settled::NotYet(reason::SOURCE_NOT_FOUND, message));
    };
    if !allows(&source, &namespace) {
        let message = format!("AetherSource {of}/{} does not allow namespace {namespace}", source.name_any());
        return Ok(Settled::NotYet(reason::NAMESPACE_NOT_ALLOWED, message));
    }
    status.base = Some(CommitBase {
        commit: base.commit.or_else(|| commit_of(&source, base.revision.as_deref(), &base_root)),
        revision: base.revision,
        root: base_root,
    });
    status.source =
        Some(CommitSource { namespace: of, name: source.name_any(), uid: source.uid().unwrap_or_default() });
    status.session = Some(checkpoint.spec.session.clone());
    (status.makers, status.unknown_makers) =
        makers(commit, &checkpoint, about.session_uid.as_deref(), keys, context).await?;
    // Last, because it says that all of this is known.
    status.root = Some(root);
    Ok(Settled::Yes)
}

/// The git commit of a revision, as far as the source still keeps that: for sessions that were made before they remembered it.
fn commit_of(source: &AetherSource, revision: Option<&str>, root: &str) -> Option<String> {
    let mut revisions = source.status.iter().flat_map(|status| &status.revisions);
    revisions.find(|one| one.root == root && Some(one.name.as_str()) == revision)?.commit.clone()
}

/// Takes the checkpoint of a commit that names a session. One of the commit's own name may be somebody else's.
async fn take(commit: &AetherCommit, checkpoints: &Api<AetherCheckpoint>) -> Result<String> {
    let (name, uid) = (commit.name_any(), commit.uid().unwrap_or_default());
    let another = objects::derived_name(&name, "commit", &[&uid]);
    for name in [&name, &another] {
        let checkpoint = AetherCheckpoint {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: commit.namespace(),
                labels: Some(BTreeMap::from([
                    (ORIGIN_LABEL.to_owned(), ORIGIN_COMMIT.to_owned()),
                    (COMMIT_UID_LABEL.to_owned(), uid.clone()),
                ])),
                ..ObjectMeta::default()
            },
            spec: AetherCheckpointSpec {
                session: commit.spec.session.clone().unwrap_or_default(),
                message: Some(format!("for AetherCommit {}", commit.name_any())),
                ..AetherCheckpointSpec::default()
            },
            status: None,
        };
        if objects::create(checkpoints, &checkpoint).await?.is_some() {
            crash_point!("commit.checkpoint.taken");
            return Ok(name.clone());
        }
        let there = objects::get(checkpoints, name).await?;
        if there.is_some_and(|there| there.labels().get(COMMIT_UID_LABEL) == Some(&uid)) {
            return Ok(name.clone());
        }
    }
    // Whoever made it knew the uid: it is as good as one that was named, and its maker is asked for.
    Ok(another)
}

/// Who made the session, the checkpoint and the commit; and of what that is not known.
async fn makers(
    commit: &AetherCommit,
    checkpoint: &AetherCheckpoint,
    session_uid: Option<&str>,
    keys: &Keys,
    context: &Context,
) -> Result<(Vec<String>, Vec<String>)> {
    let sessions: Api<AetherSession> = objects::namespaced(&context.client, &commit.namespace().unwrap_or_default());
    let session = objects::get(&sessions, &checkpoint.spec.session).await?;
    let session = session.filter(|session| session.uid().as_deref() == session_uid);
    let of_session = session.map_or(Err("it is gone".to_owned()), |session| Creation::of(&session, keys));
    let unknown = |kind: &str, name: &str, why: String| {
        format!("who made {kind} {name} is not known ({why}): make a session from the checkpoint, and commit that")
    };
    let known = [
        Ok(commit.spec.requested_by.clone().unwrap_or_default()),
        of_session.map_err(|why| unknown("AetherSession", &checkpoint.spec.session, why)),
        Creation::of(checkpoint, keys).map_err(|why| unknown("AetherCheckpoint", &checkpoint.name_any(), why)),
    ];
    let (mut makers, mut unknown) = (Vec::new(), Vec::new());
    for one in known {
        match one {
            Ok(who) => makers.push(who.username),
            Err(why) => unknown.push(why),
        }
    }
    makers.sort();
    makers.dedup();
    Ok((makers, unknown))
}

fn allows(source: &AetherSource, namespace: &str) -> bool {
    source.namespace().as_deref() == Some(namespace)
        || source.spec.allowed_namespaces.iter().any(|allowed| allowed == namespace || allowed == "*")
}

/// The source of the commit as it is now; else a reason and a message.
pub(super) async fn source(
    commit: &AetherCommit,
    status: &AetherCommitStatus,
    context: &Context,
) -> Result<std::result::Result<AetherSource, (&'static str, String)>> {
    let named = status.source.clone().unwrap_or_default();
    let sources: Api<AetherSource> = objects::namespaced(&context.client, &named.namespace);
    let source = objects::get(&sources, &named.name).await?;
    let Some(source) = source.filter(|source| source.uid().as_deref() == Some(&named.uid)) else {
        let message = format!("AetherSource {}/{} does not exist any more", named.namespace, named.name);
        return Ok(Err((reason::SOURCE_NOT_FOUND, message)));
    };
    let namespace = commit.namespace().unwrap_or_default();
    if !allows(&source, &namespace) {
        let message = format!("AetherSource {}/{} does not allow namespace {namespace}", named.namespace, named.name);
        return Ok(Err((reason::NAMESPACE_NOT_ALLOWED, message)));
    }
    Ok(Ok(source))
}

/// Why what the commit asks for can never be done with what it is of.
///
/// A revision that was promoted stands on a git commit too, by way of the session that it was made of, but a commit of a session
/// that started from it would be on top of that and so bring out the promoted change with its own. Reviewers compare with where
/// the session started: they were not shown the former. And without it what remains may not fit. So it is refused.
pub(super) fn cannot(commit: &AetherCommit, status: &AetherCommitStatus, context: &Context) -> Option<String> {
    let target = &commit.spec.target;
    if target.promote.is_none() && context.config.committer_image.is_none() {
        return Some(
            "this operator carries nothing out of the cluster: it was started without --committer-image".into(),
        );
    }
    target.git.as_ref()?;
    let base = status.base.clone().unwrap_or_default();
    let revision = base.revision.unwrap_or_default();
    base.commit.is_none().then(|| {
        format!(
            "revision {revision}, which the session started from, is not known to be a git commit: it was promoted (or the session was made by an older operator, and the source keeps that revision no more); promote this one too, or make a session from a revision that was imported"
        )
    })
}
