//! What no event tells of: volumes, checkpoints and pins whose owner went while nobody looked.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aether_api::checkpoint::DeletionPolicy;
use aether_api::names;
use aether_api::{AetherCheckpoint, AetherCommit, AetherSession, AetherSource};
use aether_proto::store::v1::Root;
use k8s_openapi::api::core::v1::{Namespace, PersistentVolume};
use kube::{Api, Resource, ResourceExt};

use crate::context::Context;
use crate::error::Result;
use crate::session::remains;
use crate::{objects, pins};

/// How often to sweep.
pub const PERIOD: Duration = Duration::from_secs(5 * 60);
/// A pin younger than this may be of an object that was not listed yet.
const PIN_GRACE: Duration = Duration::from_secs(10 * 60);

/// A checkpoint made for the time of a diff and older than this was left behind by a client that was killed.
const DIFF_GRACE: Duration = Duration::from_secs(60 * 60);

/// Removes every stray there is. One that cannot be removed keeps no other: the next sweep tries again.
///
/// # Errors
/// The list that failed.
pub async fn sweep(context: &Arc<Context>) -> Result<()> {
    let client = &context.client;
    // What may be stray is listed before what it could belong to, so that nothing young is taken for a stray.
    let volumes: Api<PersistentVolume> = objects::cluster(client);
    let labelled = objects::list(&volumes, names::SESSION_UID_LABEL).await?;
    let checkpoints = objects::list::<AetherCheckpoint>(&Api::all(client.clone()), "").await?;
    let pinning = context.pins.taken(PIN_GRACE).await;
    let born = born(context).await.unwrap_or_else(|error| {
        tracing::warn!(%error, "it is not known how old the cluster is; all pins are kept");
        None
    });
    let sessions = objects::list::<AetherSession>(&Api::all(client.clone()), "").await?;
    let sources = objects::list::<AetherSource>(&Api::all(client.clone()), "").await?;
    let commits = objects::list::<AetherCommit>(&Api::all(client.clone()), "").await?;

    let session_uids: HashSet<String> = sessions.iter().filter_map(ResourceExt::uid).collect();
    for volume in labelled.into_iter().filter(|volume| is_stray_volume(volume, &session_uids)) {
        let name = volume.name_any();
        if let Err(error) = remains::reconcile(Arc::new(volume), context.clone()).await {
            tracing::warn!(volume = name, %error, "what is left of a session could not be removed");
        }
    }
    for checkpoint in &checkpoints {
        if commits
            .iter()
            .any(|commit| commit.namespace() == checkpoint.namespace() && commit.needs(&checkpoint.name_any()))
        {
            continue;
        }
        let why = if is_stray_checkpoint(checkpoint, &session_uids) {
            "deleting a checkpoint that goes with its session, which is gone"
        } else if is_forgotten_diff(checkpoint) {
            "deleting a checkpoint that was left behind by a diff"
        } else {
            continue;
        };
        let (name, namespace) = (checkpoint.name_any(), checkpoint.namespace().unwrap_or_default());
        tracing::info!(checkpoint = name, namespace, "{why}");
        if let Err(error) = objects::delete(&objects::namespaced(client, &namespace), checkpoint).await {
            tracing::warn!(checkpoint = name, namespace, %error, "a checkpoint could not be deleted");
        }
    }
    let uids = sources.iter().filter_map(ResourceExt::uid).chain(checkpoints.iter().filter_map(ResourceExt::uid));
    let uids = uids.chain(commits.iter().filter_map(ResourceExt::uid));
    let living: HashSet<String> = uids.chain(session_uids).collect();
    let forgotten = async {
        let pinned = pinning?;
        let of_this_cluster = pinned.iter().filter(|root| born.is_some_and(|born| root.pinned_at >= born));
        let owners: HashSet<&str> = of_this_cluster.map(|root| root.owner_uid.as_str()).collect();
        for owner in context.orphans.gone(&owners, &living, Instant::now()) {
            tracing::info!(owner, "the store need not keep what an object had pinned that is gone");
            context.pins.forget(&owner).await?;
        }
        for root in pinned.iter().filter(|root| is_old_revision(root, &sources)) {
            tracing::info!(owner = root.owner_uid, revision = root.name, "the store need not keep an old revision");
            context.pins.forget_one(&root.owner_uid, pins::SOURCE_REVISION, &root.name).await?;
        }
        Ok::<(), tonic::Status>(())
    };
    if let Err(status) = forgotten.await {
        tracing::warn!(code = %status.code(), said = status.message(), "the store's pins could not be swept");
    }
    Ok(())
}

/// When the cluster was made, in seconds since 1970: its first namespace is as old. What was pinned before that was pinned by
/// objects that a former cluster had, and whoever brings those back still needs it.
async fn born(context: &Context) -> Result<Option<i64>> {
    let namespaces: Api<Namespace> = objects::cluster(&context.client);
    let first = objects::get(&namespaces, "kube-system").await?;
    Ok(first.and_then(|first| first.metadata.creation_timestamp).map(|time| time.0.as_second()))
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

/// Whether a source that is there has pinned this and does not list it any more.
fn is_old_revision(root: &Root, sources: &[AetherSource]) -> bool {
    let source = sources.iter().find(|source| source.uid().as_ref() == Some(&root.owner_uid));
    root.kind == pins::SOURCE_REVISION
        && source.is_some_and(|source| {
            let revisions = source.status.as_ref().map_or(&[][..], |status| &status.revisions);
            revisions.iter().all(|revision| revision.name != root.name)
        })
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
    fn an_old_revision_is_one_that_its_source_does_not_list() {
        let source: AetherSource = serde_json::from_value(json!({
            "apiVersion": "aether.dev/v1alpha1", "kind": "AetherSource", "metadata": {"name": "linux", "uid": "s-1"}, "spec": {},
            "status": {"revisions": [{"name": "r2", "root": "b/1", "files": 1, "bytes": 1, "time": "2026-01-01T00:00:00Z", "milliseconds": 1}]}
        }))
        .unwrap();
        let root = |owner: &str, kind: &str, name: &str| Root {
            owner_uid: owner.into(),
            kind: kind.into(),
            name: name.into(),
            ..Root::default()
        };
        let old = |root| is_old_revision(&root, std::slice::from_ref(&source));
        assert!(old(root("s-1", pins::SOURCE_REVISION, "r1")));
        assert!(!old(root("s-1", pins::SOURCE_REVISION, "r2")));
        assert!(!old(root("s-2", pins::SOURCE_REVISION, "r1")), "of a source that is not listed");
        assert!(!old(root("s-1", pins::CHECKPOINT, "")));
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
