//! How a session leaves this node: let go after its last writer with everything in the store, dropped when its object is
//! deleted, or kept as a checkpoint when another node has taken it over.

use std::sync::Arc;

use aether_api::conditions::{self, READY, Wanted, reason};
use aether_api::session::Durability;
use aether_api::{AetherCheckpoint, AetherCheckpointSpec, AetherCheckpointStatus, AetherSession, names};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;
use kube::api::PostParams;
use kube::runtime::events::EventType;
use serde_json::json;

use crate::attach::absent;
use crate::cluster::update_status;
use crate::driver::Driver;
use crate::failure::{Failure, Result, status_code};
use crate::lease;
use crate::moments::{base_root, consistency, frozen_microseconds, full_name, head_status, taken_at, uid};
use crate::records::{SessionRecord, Upper};
use crate::target;

impl Driver {
    /// Lets go of a session that no pod here writes any more: unmount, snapshot, digest, upload, then one write that sets
    /// the head and clears the lease. Ends early, with nothing lost, when a pod here mounts it again first.
    pub(crate) async fn release(self: &Arc<Self>, session: &Arc<AetherSession>) -> Result<()> {
        let uid = uid(&**session);
        let (snapshot, generation) = {
            let _lock = self.session_locks.lock(&uid).await;
            let Some(record) = self.sessions.get(&uid) else { return Ok(()) };
            if self.published_for_writing(&uid) {
                return Ok(());
            }
            if record.upper != Upper::Dirty {
                return Ok(());
            }
            // Nobody writes once it is unmounted, so this moment is the session's last.
            self.engine.unmount_session(&uid).await.or_else(absent)?;
            let generation = self.engine.session(&uid).await?.generation;
            let name = format!("release-{}", uuid::Uuid::new_v4());
            (self.snapshot(&uid, &name).await?, generation)
        };
        let result = self.release_moment(session, &uid, &snapshot, generation).await;
        self.drop_snapshot(&snapshot.id).await;
        result
    }

    async fn release_moment(
        self: &Arc<Self>,
        session: &Arc<AetherSession>,
        uid: &str,
        snapshot: &aether_engine::Snapshot,
        generation: u64,
    ) -> Result<()> {
        let digested = self.make_durable(&snapshot.id).await?;
        let account = self.account(base_root(session), digested.root).await?;
        let _lock = self.session_locks.lock(uid).await;
        let Some(mut record) = self.sessions.get(uid).filter(|record| record.upper == Upper::Dirty) else { return Ok(()) };
        if self.published_for_writing(uid) {
            tracing::info!(session = full_name(&**session), "published again before it was let go");
            return Ok(());
        }
        // It may have been mounted, written and unpublished again since the snapshot.
        if self.engine.session(uid).await?.generation != generation {
            return Err(Failure::NotYet("the session was mounted again in the meantime".into()));
        }
        let root = digested.root.to_string();
        record.last_root = Some(root.clone());
        self.sessions.put(record.clone())?;
        let after = self.let_go(session, &record, head_status(digested.root, taken_at(snapshot), account)).await?;
        // Only now is the upper a mere copy. A kill before this line costs the copy, not the tree.
        if after.holder().is_none() && after.head_root() == Some(&root) {
            record.upper = Upper::Clean { root };
            self.sessions.put(record)?;
        }
        self.attached.send_modify(|version| *version += 1);
        Ok(())
    }

    /// Clears the lease, if it is this node's, and writes `status` with it.
    async fn let_go(
        &self,
        session: &Arc<AetherSession>,
        record: &SessionRecord,
        status: serde_json::Value,
    ) -> Result<Arc<AetherSession>> {
        let api = self.cluster.sessions.api(&record.namespace);
        let after = update_status(&api, session.clone(), names::DRIVER_MANAGER, |session| {
            let attachment = session.status.as_ref()?.attachment.as_ref()?;
            if attachment.node.as_deref() != Some(self.node()) || attachment.epoch != record.epoch {
                return None;
            }
            let mut status = status.clone();
            status["attachment"] = json!({"node": null, "since": null, "epoch": record.epoch});
            Some(status)
        })
        .await?;
        tracing::info!(session = full_name(&**session), epoch = record.epoch, "lease let go");
        Ok(after)
    }

    /// Removes what this node has of a session whose object is deleted or being deleted, unless a pod still has it.
    /// Nothing is uploaded. Snapshots that checkpoints still need stay.
    pub(crate) async fn discard(&self, uid: &str) -> Result<bool> {
        let _lock = self.session_locks.lock(uid).await;
        if !self.mounts_of(uid).is_empty() {
            return Ok(false);
        }
        self.engine.unmount_session(uid).await.or_else(absent)?;
        self.engine.delete_session(uid).await.or_else(absent)?;
        if self.sessions.get(uid).is_some() {
            self.sessions.remove(uid)?;
            tracing::info!(session = uid, "dropped");
            self.count();
        }
        Ok(true)
    }

    /// Clears the lease of a session of which this node has nothing but perhaps a copy: the session is being deleted, this
    /// node lost its state, or it was killed between taking the lease and mounting.
    pub(crate) async fn disclaim(&self, session: &Arc<AetherSession>) -> Result<()> {
        let uid = uid(&**session);
        let _lock = self.session_locks.lock(&uid).await;
        let written = self.sessions.get(&uid).is_some_and(|record| !matches!(record.upper, Upper::Clean { .. }));
        if written || !self.mounts_of(&uid).iter().all(|publish| publish.read_only) {
            return Ok(());
        }
        let api = self.cluster.sessions.api(&session.namespace().unwrap_or_default());
        let cleared = update_status(&api, session.clone(), names::DRIVER_MANAGER, |session| {
            let attachment = session.status.as_ref()?.attachment.as_ref()?;
            (attachment.node.as_deref() == Some(self.node()))
                .then(|| json!({"attachment": {"node": null, "since": null, "epoch": attachment.epoch}}))
        })
        .await;
        match cleared {
            Ok(_) => Ok(()),
            Err(failure) if failure.is_gone() => Ok(()),
            Err(failure) => Err(failure),
        }
    }

    /// Keeps what this node has unsaved of a session that was taken over, as checkpoint `recovered-<epoch>`, and lets go
    /// of everything else of it. Each step can be repeated. Whoever calls it holds the session's lock.
    ///
    /// # Errors
    /// `Busy` while processes of a pod still use the mount; the checkpoint exists by then.
    pub(crate) async fn recover(self: &Arc<Self>, session: &Arc<AetherSession>, record: &SessionRecord) -> Result<()> {
        let uid = record.uid.as_str();
        let name = match &record.upper {
            Upper::Fenced { snapshot } => snapshot.clone(),
            Upper::Clean { .. } => return self.let_fall(record).await,
            Upper::Dirty => {
                let name = format!("recovered-{uid}-{}", record.epoch);
                match self.snapshot(uid, &name).await {
                    Ok(_) => {}
                    Err(failure) if matches!(&failure, Failure::Engine(error) if error.is_not_found()) => {
                        return self.let_fall(record).await;
                    }
                    Err(failure) => return Err(failure),
                }
                self.sessions.put(SessionRecord { upper: Upper::Fenced { snapshot: name.clone() }, ..record.clone() })?;
                name
            }
        };
        if let Some(snapshot) = self.engine.snapshot_record(&name).await.map(Some).or_else(absent)? {
            let digested = self.engine.digest(&name).await?;
            if record.last_root == Some(digested.root.to_string()) {
                tracing::info!(session = full_name(&**session), "was taken over; nothing was unsaved here");
                self.drop_snapshot(&name).await;
            } else {
                self.keep_recovered(session, record, &snapshot).await?;
            }
        }
        self.let_fall(record).await
    }

    async fn keep_recovered(
        &self,
        session: &Arc<AetherSession>,
        record: &SessionRecord,
        snapshot: &aether_engine::Snapshot,
    ) -> Result<()> {
        let name = names::recovered_checkpoint_name(&record.name, record.epoch);
        let message = format!(
            "what node {} had unsaved under epoch {} when another node took the session over",
            self.node(),
            record.epoch
        );
        let checkpoint = self.make_checkpoint(session, &name, names::ORIGIN_RECOVERED, message.clone()).await?;
        let seen = checkpoint.status.as_ref().and_then(|status| status.durability);
        if seen.is_none() {
            let status = local_status(self.node(), session, snapshot, &checkpoint);
            let api = self.cluster.checkpoints.api(&record.namespace);
            update_status(&api, Arc::new(checkpoint), names::DRIVER_MANAGER, |checkpoint| {
                let taken = checkpoint.status.as_ref().is_some_and(|status| status.durability.is_some());
                (!taken).then(|| json!(status))
            })
            .await?;
            self.metrics.recovered.inc();
            tracing::warn!(session = full_name(&**session), checkpoint = name, "was taken over; unsaved work kept");
            let note = format!("checkpoint {name} keeps {message}");
            self.events.on(&**session, EventType::Warning, "Recovered", note).await;
        }
        Ok(())
    }

    /// Takes away mounts and upper of a session that this node has lost.
    async fn let_fall(self: &Arc<Self>, record: &SessionRecord) -> Result<()> {
        for publish in self.mounts_of(&record.uid).into_iter().filter(|publish| !publish.read_only) {
            target::clear(&publish.target)?;
            self.publishes.remove(&crate::records::Record::key(&publish))?;
        }
        self.engine.unmount_session(&record.uid).await.or_else(absent)?;
        self.engine.delete_session(&record.uid).await.or_else(absent)?;
        self.sessions.remove(&record.uid)?;
        self.count();
        Ok(())
    }

    /// Makes a checkpoint object in the name of the node; the one of that name that is there already is as good, if it
    /// is of the same session.
    pub(crate) async fn make_checkpoint(
        &self,
        session: &AetherSession,
        name: &str,
        origin: &str,
        message: String,
    ) -> Result<AetherCheckpoint> {
        let mut checkpoint = AetherCheckpoint::new(
            name,
            AetherCheckpointSpec { session: session.name_any(), message: Some(message), ..AetherCheckpointSpec::default() },
        );
        checkpoint.metadata.namespace = session.namespace();
        checkpoint.labels_mut().extend([
            (names::ORIGIN_LABEL.to_owned(), origin.to_owned()),
            (names::SESSION_UID_LABEL.to_owned(), uid(session)),
        ]);
        let namespace = session.namespace().unwrap_or_default();
        let api = self.cluster.checkpoints.api(&namespace);
        let describe = || format!("make checkpoint {namespace}/{name}");
        match api.create(&PostParams::default(), &checkpoint).await {
            Ok(made) => Ok(made),
            Err(error) if status_code(&error) == Some(409) => {
                let existing = api.get(name).await.map_err(Failure::api(describe))?;
                if existing.labels().get(names::SESSION_UID_LABEL) == Some(&uid(session)) {
                    Ok(existing)
                } else {
                    Err(Failure::Denied(format!(
                        "checkpoint {namespace}/{name} exists and is not of this session: delete or rename it"
                    )))
                }
            }
            Err(error) => Err(Failure::api(describe)(error)),
        }
    }

    /// Whether another node took the session over, as the API says.
    pub(crate) fn lost(&self, session: &AetherSession, record: &SessionRecord) -> bool {
        lease::lost(session.status.as_ref().and_then(|status| status.attachment.as_ref()), record, self.node())
    }
}

/// The status of a checkpoint that has a snapshot on this node and is not in the store yet.
pub(crate) fn local_status(
    node: &str,
    session: &AetherSession,
    snapshot: &aether_engine::Snapshot,
    checkpoint: &AetherCheckpoint,
) -> AetherCheckpointStatus {
    let mut status = AetherCheckpointStatus {
        parent: session.head_root().map(str::to_owned),
        base: session.status.as_ref().and_then(|status| status.base.clone()),
        session_uid: session.uid(),
        node: Some(node.to_owned()),
        snapshot: Some(snapshot.id.clone()),
        durability: Some(Durability::Local),
        consistency: Some(consistency(snapshot)),
        frozen_microseconds: Some(frozen_microseconds(snapshot)),
        local_time: Some(Time(taken_at(snapshot))),
        ..checkpoint.status.clone().unwrap_or_default()
    };
    let message = snapshot
        .reason
        .as_ref()
        .map_or_else(|| format!("taken on node {node}"), |reason| format!("taken on node {node} file by file: {reason}"));
    conditions::set(&mut status.conditions, Wanted::yes(READY, reason::READY, message), checkpoint.metadata.generation);
    let waiting = format!("node {node} is bringing it to the store");
    conditions::set(
        &mut status.conditions,
        Wanted::no(conditions::DURABLE, reason::IN_PROGRESS, waiting),
        checkpoint.metadata.generation,
    );
    status
}
