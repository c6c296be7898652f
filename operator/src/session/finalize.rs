//! The end of a session. Nothing is created here, because the namespace may be going too.
//!
//! Order: wait until no node holds it (a lost node does not count), delete volume and claim, delete the checkpoints
//! that go with it, and when all that is gone let go of the object. The node drops its own part when the object is gone.

use std::time::Duration;

use aether_api::checkpoint::DeletionPolicy;
use aether_api::conditions::{self, READY, Wanted, reason};
use aether_api::names::{self, SESSION_FINALIZER};
use aether_api::{AetherCheckpoint, AetherSession};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::runtime::controller::Action;
use kube::{Api, Client, Resource, ResourceExt};

use super::claim;
use crate::context::Context;
use crate::error::Result;
use crate::{nodes, objects};

/// When to look again at what goes by itself.
const POLL: Duration = Duration::from_secs(2);
/// How long claim and volume may take to go before it is worth a write.
const QUIET: Duration = Duration::from_secs(5);

pub(super) async fn finalize(
    sessions: &Api<AetherSession>,
    session: &AetherSession,
    context: &Context,
) -> Result<Action> {
    if !session.finalizers().iter().any(|finalizer| finalizer == SESSION_FINALIZER) {
        return Ok(Action::await_change());
    }
    if let Some(node) = session.holder() {
        match nodes::lost(&context.client, node).await? {
            None => {
                let message = format!("node {node} holds it: it goes when the last pod that mounts it has ended");
                tell_why(sessions, session, message).await?;
                return Ok(Action::requeue(POLL));
            }
            Some(why) => tracing::warn!(
                session = session.name_any(),
                namespace = session.namespace(),
                why,
                "the session's node is lost; the session goes without it"
            ),
        }
    }
    if !delete_volume_and_claim(session, &context.client).await? {
        if session.meta().deletion_timestamp.as_ref().is_some_and(|begun| objects::since(begun) > QUIET) {
            tell_why(
                sessions,
                session,
                format!("claim {} is still there: it goes when no pod uses it any more", session.name_any()),
            )
            .await?;
        }
        return Ok(Action::requeue(POLL));
    }
    delete_checkpoints(session, &context.client).await?;
    let finalizers: Vec<String> =
        session.finalizers().iter().filter(|finalizer| *finalizer != SESSION_FINALIZER).cloned().collect();
    match objects::write_finalizers(sessions, session, &finalizers).await {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(Action::await_change()),
    }
}

/// Deletes volume and claim; whether both are gone.
async fn delete_volume_and_claim(session: &AetherSession, client: &Client) -> Result<bool> {
    let volumes: Api<PersistentVolume> = objects::cluster(client);
    let volume = objects::get(&volumes, &names::volume_name(&session.uid().unwrap_or_default())).await?;
    if let Some(volume) = volume.as_ref().filter(|volume| volume.meta().deletion_timestamp.is_none()) {
        objects::delete(&volumes, volume).await?;
    }
    let claims: Api<PersistentVolumeClaim> = objects::namespaced(client, &session.namespace().unwrap_or_default());
    let claim = objects::get(&claims, &session.name_any()).await?.filter(|found| claim::belongs_to(found, session));
    if let Some(claim) = claim.as_ref().filter(|claim| claim.meta().deletion_timestamp.is_none()) {
        objects::delete(&claims, claim).await?;
    }
    if volume.is_none() && claim.is_none() {
        return Ok(true);
    }
    // Without a pod they are gone within moments.
    let volume_gone = match &volume {
        Some(volume) => objects::get(&volumes, &volume.name_any()).await?.is_none(),
        None => true,
    };
    let claim_gone = match &claim {
        Some(claim) => objects::get(&claims, &claim.name_any()).await?.is_none_or(|found| found.uid() != claim.uid()),
        None => true,
    };
    Ok(volume_gone && claim_gone)
}

/// Deletes the checkpoints of the session that are to go with it.
///
/// # Errors
/// The list or the delete that failed.
pub async fn delete_checkpoints(session: &AetherSession, client: &Client) -> Result<()> {
    let checkpoints: Api<AetherCheckpoint> = objects::namespaced(client, &session.namespace().unwrap_or_default());
    for checkpoint in objects::list(&checkpoints, "").await? {
        let uid = checkpoint.status.as_ref().and_then(|status| status.session_uid.clone());
        let of_session = checkpoint.spec.session == session.name_any() && (uid.is_none() || uid == session.uid());
        if of_session
            && checkpoint.spec.deletion_policy == DeletionPolicy::WithSession
            && checkpoint.meta().deletion_timestamp.is_none()
        {
            objects::delete(&checkpoints, &checkpoint).await?;
        }
    }
    Ok(())
}

async fn tell_why(sessions: &Api<AetherSession>, session: &AetherSession, message: String) -> Result<()> {
    let mut status = session.status.clone().unwrap_or_default();
    status.phase = Some("Terminating".into());
    conditions::set(&mut status.conditions, Wanted::no(READY, reason::IN_PROGRESS, message), session.meta().generation);
    objects::write_status(sessions, session, &status).await?;
    Ok(())
}
