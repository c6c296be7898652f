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
use crate::control;
use crate::driver::Driver;
use crate::failure::{Failure, Result, status_code};
use crate::lease;
use crate::moments::{base_root, consistency, frozen_microseconds, full_name, head_status, taken_at, uid, under_epoch};
use crate::records::{SessionRecord, Upper};
use crate::target;

impl Driver {
    /// Lets go of a session that no pod here writes any more: unmount, snapshot, digest, upload, then one write that sets
    /// the head and clears the lease. Ends early, with nothing lost, when a pod here mounts it again first.
    pub(crate) async fn release(self: &Arc<Self>, session: &Arc<AetherSession>) -> Result<()> {
        let uid = uid(&**session);
        let (snapshot, generation, _used) = {
            let _lock = self.session_locks.lock(&uid).await;
            let Some(record) = self.sessions.get(&uid) else { return Ok(()) };
            if self.published_for_writing(&uid) {
                return Ok(());
            }
            if record.upper != Upper::Dirty {
                return Ok(());
            }
            if matches!(self.engine.session(&uid).await, Err(error) if error.is_not_found()) {
                return self.let_go_of_nothing(record).await;
            }
            // Nobody writes once it is unmounted, so this moment is the session's last.
            self.engine.unmount_session(&uid).await.or_else(absent)?;
            let generation = self.engine.session(&uid).await?.generation;
            let name = under_epoch(&format!("release-{}", uuid::Uuid::new_v4()), record.epoch);
            let used = self.moments.using(&name);
            (self.snapshot(&uid, &name).await?, generation, used)
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
        let digested = {
            let _permit = self.workers.acquire().await.map_err(|_| Failure::Lost("worker pool"))?;
            self.engine.digest(&snapshot.id).await?
        };
        // The next node waits for the store alone: counting goes on beside it, and is left out when nothing has changed.
        let counting = async {
            if session.head_root() == Some(digested.root.to_string().as_str()) {
                return Ok(None);
            }
            self.account(base_root(session), digested.root).await.map(Some)
        };
        let (digested, account) = tokio::try_join!(self.make_durable(&snapshot.id), counting)?;
        control::stamp_all_kept(uid, self).await?;
        let _lock = self.session_locks.lock(uid).await;
        let Some(mut record) = self.sessions.get(uid).filter(|record| record.upper == Upper::Dirty) else {
            return Ok(());
        };
        let session = match self.holds_now(uid).await? {
            Some((session, _)) => session,
            // Lost, or let go by an attempt whose answer did not arrive: what is written below decides on the newest.
            None => match self.cluster.sessions.read(&record.namespace, &record.name).await? {
                Some(session) if session.uid().as_deref() == Some(uid) => session,
                _ => return Ok(()),
            },
        };
        let session = &session;
        if self.published_for_writing(uid) {
            tracing::info!(session = full_name(&**session), "published again before it was let go");
            return Ok(());
        }
        // It may have been mounted, written and unpublished again since the snapshot.
        if self.engine.session(uid).await?.generation != generation {
            return Err(Failure::NotYet("the session was mounted again in the meantime".into()));
        }
        let root = digested.root.to_string();
        let after = self.let_go(session, &record, head_status(digested.root, taken_at(snapshot), account)).await?;
        // Only now is the upper a mere copy of the head. Were it said before, a node that takes over meanwhile would make what
        // was uploaded here nobody's.
        if after.holder().is_none() && after.head_root() == Some(&root) {
            record.last_root = Some(root.clone());
            record.upper = Upper::Clean { root };
            self.sessions.put(record).await?;
        }
        self.attached.send_modify(|version| *version += 1);
        Ok(())
    }

    /// Lets go of a session whose upper is gone: there is no moment to take, so its head stays where it is. Whoever calls it
    /// holds the session's lock.
    async fn let_go_of_nothing(&self, record: SessionRecord) -> Result<()> {
        if let Some(session) = self.session_of(&record).await? {
            let after = self.let_go(&session, &record, json!({})).await?;
            self.tell_of_lost_upper(&after).await;
        }
        self.sessions.remove(&record.uid).await?;
        self.count();
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
        if after.holder().is_none() {
            tracing::info!(session = full_name(&**session), epoch = record.epoch, "lease let go");
        }
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
            self.sessions.remove(uid).await?;
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
        let (name, kept) = match &record.upper {
            Upper::Fenced { snapshot, root } => (snapshot.clone(), root.clone()),
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
                self.sessions.put(fenced(record, &name, None)).await?;
                (name, None)
            }
        };
        let kept = match kept {
            Some(root) => Some(root),
            None => match self.engine.snapshot_record(&name).await.map(Some).or_else(absent)? {
                Some(snapshot) => {
                    let checkpoint = names::recovered_checkpoint_name(&record.name, record.epoch);
                    let root = self.keep_recovered(session, record, &snapshot, &checkpoint, None).await?;
                    self.sessions.put(fenced(record, &name, Some(root.clone()))).await?;
                    Some(root)
                }
                None => None,
            },
        };
        self.clear_writers(record).await?;
        self.keep_the_rest(session, record, kept.as_deref()).await?;
        self.let_fall(record).await
    }

    /// Processes that had files open went on writing after the snapshot. Now that the session is unmounted, what they wrote
    /// beyond the tree `kept` is kept too.
    async fn keep_the_rest(
        &self,
        session: &Arc<AetherSession>,
        record: &SessionRecord,
        kept: Option<&str>,
    ) -> Result<()> {
        let uid = record.uid.as_str();
        let name = format!("recovered-{uid}-{}-2", record.epoch);
        let snapshot = match self.snapshot(uid, &name).await {
            Ok(snapshot) => snapshot,
            Err(Failure::Engine(error)) if error.is_not_found() => return Ok(()),
            Err(failure) => return Err(failure),
        };
        let checkpoint = format!("{}-2", names::recovered_checkpoint_name(&record.name, record.epoch));
        self.keep_recovered(session, record, &snapshot, &checkpoint, kept).await.map(|_| ())
    }

    /// Makes a checkpoint of a snapshot of a lost session, unless its tree is known to be kept: as the session's head, as the
    /// tree last made the head here, or as `kept`. Returns the tree.
    async fn keep_recovered(
        &self,
        session: &Arc<AetherSession>,
        record: &SessionRecord,
        snapshot: &aether_engine::Snapshot,
        name: &str,
        kept: Option<&str>,
    ) -> Result<String> {
        let root = self.engine.digest(&snapshot.id).await?.root.to_string();
        let known = [record.last_root.as_deref(), session.head_root(), kept];
        if known.contains(&Some(root.as_str())) {
            tracing::info!(
                session = full_name(&**session),
                snapshot = snapshot.id,
                "was taken over; nothing was unsaved here"
            );
            self.drop_snapshot(&snapshot.id).await;
            return Ok(root);
        }
        let message = format!(
            "what node {} had unsaved under epoch {} when another node took the session over",
            self.node(),
            record.epoch
        );
        let checkpoint = self.make_checkpoint(session, name, names::ORIGIN_RECOVERED, message.clone(), None).await?;
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
        Ok(root)
    }

    /// Takes away the mounts of a session that this node has lost.
    async fn clear_writers(&self, record: &SessionRecord) -> Result<()> {
        for publish in self.mounts_of(&record.uid).into_iter().filter(|publish| !publish.read_only) {
            target::clear(&publish.target)?;
            self.publishes.remove(&crate::records::Record::key(&publish)).await?;
        }
        self.engine.unmount_session(&record.uid).await.or_else(absent)?;
        Ok(())
    }

    /// Takes away mounts and upper of a session that this node has lost.
    async fn let_fall(&self, record: &SessionRecord) -> Result<()> {
        self.clear_writers(record).await?;
        self.engine.delete_session(&record.uid).await.or_else(absent)?;
        self.sessions.remove(&record.uid).await?;
        self.count();
        Ok(())
    }

    /// Makes a checkpoint object in the name of the node; the one of that name that is there already is as good, if it
    /// is of the same session. `restore` is the uid of the restore that it is made for.
    pub(crate) async fn make_checkpoint(
        &self,
        session: &AetherSession,
        name: &str,
        origin: &str,
        message: String,
        restore: Option<&str>,
    ) -> Result<AetherCheckpoint> {
        let mut checkpoint = AetherCheckpoint::new(
            name,
            AetherCheckpointSpec {
                session: session.name_any(),
                message: Some(message),
                ..AetherCheckpointSpec::default()
            },
        );
        checkpoint.metadata.namespace = session.namespace();
        checkpoint.labels_mut().extend([
            (names::ORIGIN_LABEL.to_owned(), origin.to_owned()),
            (names::SESSION_UID_LABEL.to_owned(), uid(session)),
        ]);
        if let Some(restore) = restore {
            checkpoint.annotations_mut().insert(names::RESTORE_UID_ANNOTATION.to_owned(), restore.to_owned());
        }
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

/// The record of a session that was taken over.
fn fenced(record: &SessionRecord, snapshot: &str, root: Option<String>) -> SessionRecord {
    SessionRecord { upper: Upper::Fenced { snapshot: snapshot.to_owned(), root }, ..record.clone() }
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
    let message = snapshot.reason.as_ref().map_or_else(
        || format!("taken on node {node}"),
        |reason| format!("taken on node {node} file by file: {reason}"),
    );
    conditions::set(&mut status.conditions, Wanted::yes(READY, reason::READY, message), checkpoint.metadata.generation);
    let waiting = format!("node {node} is bringing it to the store");
    conditions::set(
        &mut status.conditions,
        Wanted::no(conditions::DURABLE, reason::IN_PROGRESS, waiting),
        checkpoint.metadata.generation,
    );
    status
}
