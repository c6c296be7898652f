//! What a deleted session leaves: its volume, its claim, and the checkpoints that go with it.
//!
//! A session has no finalizer, so that it and its namespace can go while nobody reconciles. Its volume, which belongs to
//! no namespace, says whose it was and is removed last: what was cut short is found again by the volume, at the next
//! event of session or volume and in the next sweep. What the session had on nodes the nodes put away themselves, when
//! the object is gone and nothing mounts it any more.
//!
//! Nothing is removed of a session that might exist: gone is what the API server does not list, asked for that kind and
//! name at that moment.

use std::sync::Arc;
use std::time::Duration;

use aether_api::checkpoint::DeletionPolicy;
use aether_api::names;
use aether_api::{AetherCheckpoint, AetherCommit, AetherSession};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::runtime::controller::Action;
use kube::{Api, Client, Resource, ResourceExt};

use crate::context::Context;
use crate::error::Result;
use crate::objects;

/// When to look again at a claim that a pod uses, although the volume's release should tell.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// The session that a volume is of.
#[derive(Clone, Debug, PartialEq)]
struct Named {
    namespace: String,
    name: String,
    uid: String,
}

/// Removes a volume whose session is gone, and what else is left of the session.
///
/// # Errors
/// The read or write that failed; the volume stays until all else is done.
pub async fn reconcile(seen: Arc<PersistentVolume>, context: Arc<Context>) -> Result<Action> {
    let volumes: Api<PersistentVolume> = objects::cluster(&context.client);
    let Some(session) = session_of(&seen) else { return Ok(Action::await_change()) };
    let sessions: Api<AetherSession> = objects::namespaced(&context.client, &session.namespace);
    let there = objects::find(&sessions, &session.name).await?;
    if there.is_some_and(|there| there.uid().as_ref() == Some(&session.uid)) {
        return Ok(Action::await_change());
    }
    delete_checkpoints(&session, &context.client).await?;
    if !delete_claim(&seen, &context.client).await? {
        return Ok(Action::requeue(LOOK_AGAIN));
    }
    if seen.meta().deletion_timestamp.is_none() {
        tracing::info!(
            volume = seen.name_any(),
            session.namespace,
            session.name,
            "its session is gone, and so it goes"
        );
        objects::delete(&volumes, &seen).await?;
    }
    Ok(Action::await_change())
}

/// Whose volume it is; `None` for one that is not ours in every respect.
fn session_of(volume: &PersistentVolume) -> Option<Named> {
    let csi = volume.spec.as_ref()?.csi.as_ref().filter(|csi| csi.driver == names::CSI_DRIVER)?;
    let attribute = |name: &str| csi.volume_attributes.as_ref()?.get(name).filter(|value| !value.is_empty()).cloned();
    let session = Named {
        namespace: attribute(names::ATTRIBUTE_NAMESPACE)?,
        name: attribute(names::ATTRIBUTE_SESSION)?,
        uid: attribute(names::ATTRIBUTE_SESSION_UID)?,
    };
    let labelled = volume.labels().get(names::SESSION_UID_LABEL) == Some(&session.uid);
    (labelled && volume.name_any() == names::volume_name(&session.uid)).then_some(session)
}

/// Deletes the claim that the volume is reserved for; whether it is gone. While a pod uses it, Kubernetes keeps it.
async fn delete_claim(volume: &PersistentVolume, client: &Client) -> Result<bool> {
    let Some(reserved) = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref()) else { return Ok(true) };
    let (Some(namespace), Some(name), Some(uid)) = (&reserved.namespace, &reserved.name, &reserved.uid) else {
        return Ok(true);
    };
    let claims: Api<PersistentVolumeClaim> = objects::namespaced(client, namespace);
    let is_it = |claim: &PersistentVolumeClaim| claim.uid().as_ref() == Some(uid);
    let Some(claim) = objects::get(&claims, name).await?.filter(is_it) else { return Ok(true) };
    if claim.meta().deletion_timestamp.is_none() {
        objects::delete(&claims, &claim).await?;
    }
    // Without a pod it is gone within moments.
    Ok(objects::get(&claims, name).await?.filter(is_it).is_none())
}

/// Deletes the checkpoints that were taken of the session and are to go with it.
async fn delete_checkpoints(session: &Named, client: &Client) -> Result<()> {
    let checkpoints: Api<AetherCheckpoint> = objects::namespaced(client, &session.namespace);
    let commits = objects::list::<AetherCommit>(&objects::namespaced(client, &session.namespace), "").await?;
    for checkpoint in objects::list(&checkpoints, "").await? {
        // The sweep deletes it when the commit has ended.
        if commits.iter().any(|commit| commit.needs(&checkpoint.name_any())) {
            continue;
        }
        let taken_of = checkpoint.status.as_ref().and_then(|status| status.session_uid.as_ref());
        if taken_of == Some(&session.uid)
            && checkpoint.spec.deletion_policy == DeletionPolicy::WithSession
            && checkpoint.meta().deletion_timestamp.is_none()
        {
            objects::delete(&checkpoints, &checkpoint).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_a_volume_that_is_ours_in_every_respect_is_a_sessions() {
        let volume = |name: &str, label: &str, driver: &str, uid: &str| -> PersistentVolume {
            serde_json::from_value(json!({
                "metadata": {"name": name, "labels": {names::SESSION_UID_LABEL: label}},
                "spec": {"csi": {"driver": driver, "volumeHandle": name, "volumeAttributes": {
                    names::ATTRIBUTE_NAMESPACE: "agents", names::ATTRIBUTE_SESSION: "fix", names::ATTRIBUTE_SESSION_UID: uid,
                }}}
            }))
            .unwrap()
        };
        let ours = volume("aether-s-1", "s-1", names::CSI_DRIVER, "s-1");
        let named = Named { namespace: "agents".into(), name: "fix".into(), uid: "s-1".into() };
        assert_eq!(session_of(&ours), Some(named));
        for other in [
            volume("aether-s-1", "s-1", "other.driver", "s-1"),
            volume("aether-s-2", "s-1", names::CSI_DRIVER, "s-1"),
            volume("aether-s-1", "s-2", names::CSI_DRIVER, "s-1"),
            volume("aether-", "", names::CSI_DRIVER, ""),
            PersistentVolume::default(),
        ] {
            assert_eq!(session_of(&other), None, "{other:?}");
        }
    }
}
