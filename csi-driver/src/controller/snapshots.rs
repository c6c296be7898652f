//! Snapshots: checkpoints that the standard snapshotter asked for. Every other checkpoint can be read as one too.

use std::collections::HashMap;

use aether_api::conditions::{self, FAILED};
use aether_api::session::Durability;
use aether_api::{AetherCheckpoint, AetherCheckpointSpec, names};
use aether_proto::csi::v1::Snapshot;
use kube::api::{ListParams, PostParams};
use kube::{Api, ResourceExt as _};
use prost_types::Timestamp;

use super::Controller;
use super::ids::{CSI_NAME_ANNOTATION, Id, object_name};
use super::volumes::no_such;
use crate::cluster::Patience;
use crate::failure::{Failure, Result, status_code};
use crate::moments::full_name;

/// Annotation on checkpoints that this service made: the id of the volume, as the caller knows it.
const CSI_VOLUME_ANNOTATION: &str = "aether.dev/csi-volume";
/// What the snapshotter sends with `--extra-create-metadata`.
const SNAPSHOT_NAME: &str = "csi.storage.k8s.io/volumesnapshot/name";

impl Controller {
    /// Takes the checkpoint that a snapshot of this name is, and waits until its moment is taken.
    pub(super) async fn create_snapshot(
        &self,
        name: &str,
        volume: &str,
        parameters: &HashMap<String, String>,
        patience: &Patience,
    ) -> Result<Snapshot> {
        if let Some(unknown) = parameters.keys().filter(|key| !key.starts_with("csi.storage.k8s.io/")).min() {
            return Err(Failure::Invalid(format!("the snapshot class has parameter {unknown:?}, but none is known")));
        }
        let session = self.session(volume).await?.ok_or_else(|| no_such("volume", volume))?;
        let message = parameters.get(SNAPSHOT_NAME).map(|name| format!("VolumeSnapshot {name}"));
        let spec = AetherCheckpointSpec { session: session.name_any(), message, ..AetherCheckpointSpec::default() };
        let mut wanted = AetherCheckpoint::new(&object_name(name), spec);
        wanted.metadata.namespace = session.namespace();
        wanted.annotations_mut().extend([
            (CSI_NAME_ANNOTATION.to_owned(), name.to_owned()),
            (CSI_VOLUME_ANNOTATION.to_owned(), volume.to_owned()),
        ]);
        let full = full_name(&wanted);
        let api: Api<AetherCheckpoint> = Api::namespaced(self.client.clone(), &session.namespace().unwrap_or_default());
        let checkpoint = match api.create(&PostParams::default(), &wanted).await {
            Ok(made) => made,
            Err(error) if status_code(&error) == Some(409) => {
                let there = api
                    .get_opt(&wanted.name_any())
                    .await
                    .map_err(Failure::api(|| format!("read checkpoint {full}")))?
                    .filter(|there| there.metadata.deletion_timestamp.is_none())
                    .ok_or_else(|| Failure::Aborted(format!("checkpoint {full} is being deleted: try again")))?;
                let uid = there.status.as_ref().and_then(|status| status.session_uid.clone());
                if there.annotations().get(CSI_NAME_ANNOTATION).map(String::as_str) != Some(name)
                    || there.spec.session != wanted.spec.session
                    || uid.is_some_and(|uid| Some(uid) != session.uid())
                {
                    return Err(Failure::Taken(format!(
                        "checkpoint {full} exists and is not of volume {volume}: delete it, or choose another name"
                    )));
                }
                there
            }
            Err(error) => return Err(Failure::api(|| format!("make checkpoint {full}"))(error)),
        };
        let taken = |checkpoint: &AetherCheckpoint| {
            let status = checkpoint.status.as_ref()?;
            match conditions::get(&status.conditions, FAILED).filter(|failed| failed.status == "True") {
                Some(failed) => Some(Err(Failure::NotYet(format!("checkpoint {full} failed: {}", failed.message)))),
                None => snapshot(checkpoint).map(Ok),
            }
        };
        let uid = checkpoint.uid();
        let (checkpoint, result) = self.wait_for(&api, checkpoint, taken, patience).await?;
        if result.is_err() {
            // The caller's next attempt begins anew.
            Self::delete(&api, &checkpoint.name_any(), uid).await?;
        }
        result
    }

    /// Deletes the checkpoint that a snapshot is. One that is not there is deleted.
    pub(super) async fn delete_snapshot(&self, id: &str) -> Result<()> {
        let Some(checkpoint) = self.checkpoint(id).await? else { return Ok(()) };
        if !checkpoint.annotations().contains_key(CSI_NAME_ANNOTATION) {
            return Err(Failure::NotYet(format!(
                "snapshot {id} is an AetherCheckpoint that the snapshotter did not make: delete the checkpoint, or set deletionPolicy: Retain"
            )));
        }
        let api: Api<AetherCheckpoint> =
            Api::namespaced(self.client.clone(), &checkpoint.namespace().unwrap_or_default());
        Self::delete(&api, &checkpoint.name_any(), checkpoint.uid()).await
    }

    /// The snapshots that fit, in the order of their ids: the one called `id`, those of `volume`, or all; at most `most` of
    /// those after `token`. With the token for the rest.
    pub(super) async fn list_snapshots(
        &self,
        id: &str,
        volume: &str,
        token: &str,
        most: usize,
    ) -> Result<(Vec<Snapshot>, String)> {
        let after = match token {
            "" => None,
            token => Some(Id::parse(token).ok_or_else(|| {
                Failure::Aborted(format!("starting_token {token:?} is none that was given out: begin again without"))
            })?),
        };
        let found = if id.is_empty() {
            let all = Api::<AetherCheckpoint>::all(self.client.clone());
            all.list(&ListParams::default()).await.map_err(Failure::api(|| "list checkpoints".into()))?.items
        } else {
            self.checkpoint(id).await?.into_iter().collect()
        };
        let mut fitting: Vec<(Id, Snapshot)> = found
            .iter()
            .filter_map(|checkpoint| Some((id_of(checkpoint), snapshot(checkpoint)?)))
            .filter(|(id, snapshot)| {
                (volume.is_empty() || snapshot.source_volume_id == volume)
                    && after.as_ref().is_none_or(|after| id > after)
            })
            .collect();
        fitting.sort_by(|(one, _), (other, _)| one.cmp(other));
        let more = most > 0 && fitting.len() > most;
        if more {
            fitting.truncate(most);
        }
        let next = fitting.last().filter(|_| more).map(|(id, _)| id.to_string()).unwrap_or_default();
        Ok((fitting.into_iter().map(|(_, snapshot)| snapshot).collect(), next))
    }
}

fn id_of(checkpoint: &AetherCheckpoint) -> Id {
    Id { namespace: checkpoint.namespace().unwrap_or_default(), name: checkpoint.name_any() }
}

/// A checkpoint as CSI sees it; `None` while its moment is not taken.
fn snapshot(checkpoint: &AetherCheckpoint) -> Option<Snapshot> {
    let status = checkpoint.status.as_ref()?;
    let durability = status.durability?;
    let of_operator = || status.session_uid.as_deref().map(names::volume_name);
    let taken = status.local_time.as_ref().or(status.durable_time.as_ref()).map(|time| time.0);
    Some(Snapshot {
        // A session has no size of its own that a new one must have.
        size_bytes: 0,
        snapshot_id: id_of(checkpoint).to_string(),
        source_volume_id: checkpoint
            .annotations()
            .get(CSI_VOLUME_ANNOTATION)
            .cloned()
            .or_else(of_operator)
            .unwrap_or_default(),
        creation_time: taken
            .or_else(|| checkpoint.creation_timestamp().map(|time| time.0))
            .map(|time| Timestamp { seconds: time.as_second(), nanos: time.subsec_nanosecond() }),
        // A volume can be made of it on any node.
        ready_to_use: durability == Durability::Durable,
        group_snapshot_id: String::new(),
    })
}
