//! What no event tells of: volumes, checkpoints and pins whose owner went while nobody looked.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use aether_api::checkpoint::DeletionPolicy;
use aether_api::names;
use aether_api::{AetherCheckpoint, AetherSession, AetherSource};
use k8s_openapi::api::core::v1::PersistentVolume;
use kube::{Api, Resource, ResourceExt};

use crate::context::Context;
use crate::error::Result;
use crate::objects;
use crate::session::remains;

/// How often to sweep.
pub const PERIOD: Duration = Duration::from_secs(5 * 60);
/// A pin younger than this may be of an object that was not listed yet.
const PIN_GRACE: Duration = Duration::from_secs(10 * 60);

/// A checkpoint made for the time of a diff and older than this was left behind by a client that was killed.
const DIFF_GRACE: Duration = Duration::from_secs(60 * 60);

/// Removes every stray there is.
///
/// # Errors
/// The list or delete that failed; the next sweep goes on.
pub async fn sweep(context: &Arc<Context>) -> Result<()> {
    let client = &context.client;
    // What may be stray is listed before what it could belong to, so that nothing young is taken for a stray.
    let volumes: Api<PersistentVolume> = objects::cluster(client);
    let labelled = objects::list(&volumes, names::SESSION_UID_LABEL).await?;
    let checkpoints = objects::list::<AetherCheckpoint>(&Api::all(client.clone()), "").await?;
    let pinning = context.pins.owners(PIN_GRACE).await;
    let sessions = objects::list::<AetherSession>(&Api::all(client.clone()), "").await?;
    let sources = objects::list::<AetherSource>(&Api::all(client.clone()), "").await?;

    let session_uids: HashSet<String> = sessions.iter().filter_map(ResourceExt::uid).collect();
    for volume in labelled.into_iter().filter(|volume| is_stray_volume(volume, &session_uids)) {
        remains::reconcile(Arc::new(volume), context.clone()).await?;
    }
    for checkpoint in checkpoints.iter().filter(|checkpoint| is_stray_checkpoint(checkpoint, &session_uids)) {
        let namespace = checkpoint.namespace().unwrap_or_default();
        tracing::info!(
            checkpoint = checkpoint.name_any(),
            namespace,
            "deleting a checkpoint that goes with its session, which is gone"
        );
        objects::delete(&objects::namespaced(client, &namespace), checkpoint).await?;
    }
    for checkpoint in checkpoints.iter().filter(|checkpoint| is_forgotten_diff(checkpoint)) {
        let namespace = checkpoint.namespace().unwrap_or_default();
        tracing::info!(
            checkpoint = checkpoint.name_any(),
            namespace,
            "deleting a checkpoint that was left behind by a diff"
        );
        objects::delete(&objects::namespaced(client, &namespace), checkpoint).await?;
    }
    let uids = sources.iter().filter_map(ResourceExt::uid).chain(checkpoints.iter().filter_map(ResourceExt::uid));
    let living: HashSet<String> = uids.chain(session_uids).collect();
    let forgotten = async {
        for owner in pinning?.iter().filter(|owner| !living.contains(*owner)) {
            tracing::info!(owner, "the store need not keep what an object had pinned that is gone");
            context.pins.forget(owner).await?;
        }
        Ok::<(), tonic::Status>(())
    };
    if let Err(status) = forgotten.await {
        tracing::warn!(code = %status.code(), said = status.message(), "the store's pins could not be swept");
    }
    Ok(())
}

fn is_stray_volume(volume: &PersistentVolume, sessions: &HashSet<String>) -> bool {
    let ours =
        volume.spec.as_ref().and_then(|spec| spec.csi.as_ref()).is_some_and(|csi| csi.driver == names::CSI_DRIVER);
    let uid = volume.labels().get(names::SESSION_UID_LABEL);
    ours && volume.meta().deletion_timestamp.is_none()
        && uid.is_some_and(|uid| !sessions.contains(uid) && volume.name_any() == names::volume_name(uid))
}

fn is_stray_checkpoint(checkpoint: &AetherCheckpoint, sessions: &HashSet<String>) -> bool {
    let uid = checkpoint.status.as_ref().and_then(|status| status.session_uid.as_ref());
    checkpoint.spec.deletion_policy == DeletionPolicy::WithSession
        && checkpoint.meta().deletion_timestamp.is_none()
        && uid.is_some_and(|uid| !sessions.contains(uid))
}

fn is_forgotten_diff(checkpoint: &AetherCheckpoint) -> bool {
    let of_diff = checkpoint.labels().get(names::ORIGIN_LABEL).is_some_and(|origin| origin == names::ORIGIN_DIFF);
    of_diff && checkpoint.meta().deletion_timestamp.is_none() && objects::age(checkpoint) > DIFF_GRACE
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_api::{AetherCheckpointSpec, AetherCheckpointStatus};
    use serde_json::json;

    #[test]
    fn only_our_volumes_without_a_session_are_strays() {
        let volume = |driver: &str, uid: &str| -> PersistentVolume {
            serde_json::from_value(json!({
                "metadata": {"name": format!("aether-{uid}"), "labels": {names::SESSION_UID_LABEL: uid}},
                "spec": {"csi": {"driver": driver, "volumeHandle": "v"}}
            }))
            .unwrap()
        };
        let sessions = HashSet::from(["s-1".to_owned()]);
        assert!(is_stray_volume(&volume(names::CSI_DRIVER, "s-2"), &sessions));
        assert!(!is_stray_volume(&volume(names::CSI_DRIVER, "s-1"), &sessions));
        assert!(!is_stray_volume(&volume("other.driver", "s-2"), &sessions));
    }

    #[test]
    fn a_checkpoint_of_a_diff_is_forgotten_after_an_hour() {
        use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
        let checkpoint = |origin: &str, minutes: i64| {
            let mut checkpoint = AetherCheckpoint::new("c", Default::default());
            checkpoint.labels_mut().insert(names::ORIGIN_LABEL.into(), origin.into());
            checkpoint.metadata.creation_timestamp =
                Some(Time(jiff::Timestamp::now() - jiff::SignedDuration::from_mins(minutes)));
            checkpoint
        };
        assert!(is_forgotten_diff(&checkpoint(names::ORIGIN_DIFF, 61)));
        assert!(!is_forgotten_diff(&checkpoint(names::ORIGIN_DIFF, 59)));
        assert!(!is_forgotten_diff(&checkpoint(names::ORIGIN_SAFETY, 61)));
        assert!(!is_forgotten_diff(&AetherCheckpoint::new("c", Default::default())));
    }

    #[test]
    fn a_checkpoint_that_is_to_be_kept_is_no_stray() {
        let checkpoint = |policy| {
            let mut checkpoint =
                AetherCheckpoint::new("c", AetherCheckpointSpec { deletion_policy: policy, ..Default::default() });
            checkpoint.status = Some(AetherCheckpointStatus { session_uid: Some("s-2".into()), ..Default::default() });
            checkpoint
        };
        assert!(is_stray_checkpoint(&checkpoint(DeletionPolicy::WithSession), &HashSet::new()));
        assert!(!is_stray_checkpoint(&checkpoint(DeletionPolicy::Keep), &HashSet::new()));
        assert!(!is_stray_checkpoint(&checkpoint(DeletionPolicy::WithSession), &HashSet::from(["s-2".to_owned()])));
    }
}
