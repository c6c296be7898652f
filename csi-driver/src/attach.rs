//! Brings a session to this node for writing: the lease by compare-and-swap, the upper from what is here or from the
//! last durable tree, the mount. How the lease moves is decided in [`crate::lease`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use aether_api::liveness::{self, Liveness};
use aether_api::session::{Attachment, Base};
use aether_api::{AetherSession, conditions, names};
use aether_cas::tree::Owner;
use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::runtime::events::EventType;
use kube::runtime::watcher;
use kube::{Api, ResourceExt as _};
use serde_json::json;
use tokio::sync::OwnedMutexGuard;

use crate::cluster::Patience;
use crate::driver::{Driver, parse_root};
use crate::failure::{Failure, Result, chain, status_code};
use crate::lease::{self, Action};
use crate::moments::full_name;
use crate::records::{Pod, SessionRecord, Upper};

/// The pause before a holder is looked at again when there was no answer to judge by.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// A session that is mounted here for writing. It stays so as long as the lock is held; who publishes it before letting
/// go of the lock keeps it.
pub(crate) struct Attached {
    pub session: Arc<AetherSession>,
    pub _lock: OwnedMutexGuard<()>,
}

/// What a new session's upper begins with.
enum Beginning {
    /// A snapshot on this node: the moment of a fork.
    Snapshot(String),
    /// A tree.
    Tree(aether_cas::Blob),
}

impl Driver {
    /// Takes the lease of a session and mounts it, waiting while another node holds it or while there is nothing to
    /// mount yet. `first` is what the status of a session gets with its first lease, for a session that this node made.
    pub(crate) async fn attach(
        self: &Arc<Self>,
        mut session: Arc<AetherSession>,
        first: Option<serde_json::Value>,
        pod: Option<&Pod>,
        patience: &Patience,
    ) -> Result<Attached> {
        let uid = session.uid().unwrap_or_default();
        let mut liveness = None;
        let mut told = false;
        loop {
            if session.metadata.deletion_timestamp.is_some() {
                return Err(Failure::NotFound(format!("session {} is being deleted", full_name(&*session))));
            }
            // What takes long is done before the lease is taken and without any lock.
            if first.is_none() {
                session = self.wait_until_resolved(session, patience).await?;
                self.warm(&session).await?;
            }
            let lock = self.session_locks.lock(&uid).await;
            let record = self.sessions.get(&uid);
            let alive = liveness.take();
            let decide = |session: &AetherSession| {
                let attachment = session.status.as_ref().and_then(|status| status.attachment.as_ref());
                lease::decide(attachment, record.as_ref(), self.node(), alive)
            };
            let mut action = decide(&session);
            // The cache may be behind what another pod's publish here has just done. Only what the API server says now, with
            // nobody else at work on the session, may cost that pod its mount.
            if matches!(action, Action::Reread | Action::Recover) {
                session = self.reread(&session).await?;
                action = decide(&session);
            }
            match action {
                Action::Keep { epoch } => {
                    self.mount(&session, record.as_ref(), epoch).await?;
                    return Ok(Attached { session, _lock: lock });
                }
                Action::Take { epoch, from } => match self.take(&session, epoch, first.as_ref()).await? {
                    Some(taken) => {
                        if let Some(from) = from {
                            self.metrics.takeovers.inc();
                            self.tell_of_takeover(&taken, &from, epoch).await;
                        }
                        session = taken;
                        self.mount(&session, record.as_ref(), epoch).await?;
                        self.poke_dependents(&session.namespace().unwrap_or_default(), &session.name_any());
                        return Ok(Attached { session, _lock: lock });
                    }
                    None => session = self.reread(&session).await?,
                },
                Action::Recover => {
                    let record = record.ok_or(Failure::Lost("the record of a session"))?;
                    self.recover(&session, &record).await?;
                }
                Action::Reread => {
                    let epoch = record.map_or(0, |record| record.epoch);
                    return Err(Failure::NotYet(format!(
                        "session {} was written here under epoch {epoch}, but its status names an older one: it was set back, so put {epoch} into status.attachment.epoch",
                        full_name(&*session)
                    )));
                }
                Action::Inspect { holder } => {
                    // The cache may show a holder that has let go since.
                    session = self.reread(&session).await?;
                    if session.holder() == Some(&holder) {
                        liveness = Some(self.liveness(&holder).await?);
                    }
                }
                Action::Wait { holder } => {
                    drop(lock);
                    if !std::mem::replace(&mut told, true)
                        && let Some(pod) = pod
                    {
                        let note = format!(
                            "session {} is mounted for writing on node {holder}; this pod starts as soon as it is let go there (a readOnly mount works at once)",
                            full_name(&*session)
                        );
                        self.events.on_pod(pod, EventType::Warning, "WaitingForSession", note).await;
                    }
                    session = self.wait_for_holder(session, &holder, patience).await?;
                }
            }
        }
    }

    /// One attempt at the compare-and-swap; `None` when somebody else was faster.
    async fn take(
        &self,
        session: &AetherSession,
        epoch: i64,
        first: Option<&serde_json::Value>,
    ) -> Result<Option<Arc<AetherSession>>> {
        let attachment = Attachment { node: Some(self.node().into()), epoch, since: Some(Time(Timestamp::now())) };
        let mut status = json!({"attachment": attachment});
        // Only into an empty status: what is stamped once stays.
        if let (Some(first), true) = (first, session.status.as_ref().is_none_or(|status| status.base.is_none())) {
            let (Some(all), Some(more)) = (status.as_object_mut(), first.as_object()) else {
                return Err(Failure::Lost("the first status of a session"));
            };
            all.extend(more.clone());
        }
        let body = json!({"metadata": {"resourceVersion": session.resource_version()}, "status": status});
        let parameters =
            kube::api::PatchParams { field_manager: Some(names::DRIVER_MANAGER.into()), ..Default::default() };
        let api = self.cluster.sessions.api(&session.namespace().unwrap_or_default());
        match api.patch_status(&session.name_any(), &parameters, &kube::api::Patch::Merge(&body)).await {
            Ok(taken) => {
                tracing::info!(session = full_name(session), epoch, "lease taken");
                Ok(Some(Arc::new(taken)))
            }
            Err(error) if status_code(&error) == Some(409) => Ok(None),
            Err(error) => Err(Failure::api(|| format!("take the lease of session {}", full_name(session)))(error)),
        }
    }

    /// Mounts a session whose lease this node holds under `epoch`. The upper that is here is used when it is the
    /// session's head, or was never let go; else one is made from the head.
    async fn mount(&self, session: &AetherSession, record: Option<&SessionRecord>, epoch: i64) -> Result<()> {
        let uid = session.uid().unwrap_or_default();
        let here = record.is_some_and(|record| match &record.upper {
            Upper::Dirty => record.epoch == epoch,
            Upper::Clean { root } => session.head_root() == Some(root),
            Upper::Fenced { .. } => false,
        });
        let usable = here && self.engine.session(&uid).await.map(|_| true).or_else(absent)?;
        if here && !usable && record.is_some_and(|record| record.upper == Upper::Dirty) {
            self.tell_of_lost_upper(session).await;
        }
        if !usable {
            // The record goes after what it speaks of: files that were written and no record speaks of are somebody's lost
            // work. From here until the new record, nothing on this node counts as the session.
            self.engine.unmount_session(&uid).await.or_else(absent)?;
            self.engine.delete_session(&uid).await.or_else(absent)?;
            self.sessions.remove(&uid).await?;
            let beginning = self.beginning(session).await?.ok_or_else(|| unresolved(session))?;
            match beginning {
                Beginning::Snapshot(snapshot) => {
                    self.engine.fork_session(&uid, &snapshot).await?;
                }
                Beginning::Tree(root) => {
                    let image = self.image(root, owner(session), &self.wanted(session)).await?;
                    self.engine.create_session_on(self.medium(session), &uid, &image).await?;
                }
            }
        }
        self.apply_limits(session).await?;
        // What is known of another upper says nothing of a new one.
        let known = record.filter(|_| usable).cloned().unwrap_or_default();
        let put = SessionRecord {
            namespace: session.namespace().unwrap_or_default(),
            name: session.name_any(),
            epoch,
            upper: Upper::Dirty,
            last_root: known.last_root.or_else(|| session.head_root().map(str::to_owned)),
            head_nanos: known.head_nanos.filter(|_| known.epoch == epoch),
            applied: record.map(|record| record.applied.clone()).unwrap_or_default(),
            uid: uid.clone(),
        };
        self.sessions.put(put).await?;
        self.mount_session(&uid, session).await?;
        Ok(())
    }

    /// What an upper of this session would begin with; `None` while nobody knows.
    async fn beginning(&self, session: &AetherSession) -> Result<Option<Beginning>> {
        let Some(status) = &session.status else { return Ok(None) };
        if let (None, Some(forked)) = (&status.head, &status.forked_from)
            && forked.node.as_deref() == Some(self.node())
            && let Some(name) = &forked.snapshot
        {
            let snapshot = self.engine.snapshot_record(name).await.map(Some).or_else(absent)?;
            // A fork with another owner needs another image, and on another medium it shares nothing: it starts from the tree.
            let medium = self.engine.snapshot_medium(name).await?;
            if snapshot.is_some_and(|snapshot| snapshot.image.id().owner() == owner(session))
                && medium == self.medium(session)
            {
                return Ok(Some(Beginning::Snapshot(name.clone())));
            }
        }
        let object = format!("session {}", full_name(session));
        session.head_root().map(|root| parse_root(root, &object).map(Beginning::Tree)).transpose()
    }

    /// Waits until the session has something to mount.
    async fn wait_until_resolved(
        &self,
        mut session: Arc<AetherSession>,
        patience: &Patience,
    ) -> Result<Arc<AetherSession>> {
        let mut changes = self.cluster.sessions.changes();
        while self.beginning(&session).await?.is_none() && !self.holds(&session.uid().unwrap_or_default()) {
            let reason = unresolved(&session).to_string();
            if lost_moment(&session).is_some() {
                return Err(Failure::NotFound(reason));
            }
            patience.changed(&mut changes, &reason).await?;
            session = self.latest(session)?;
        }
        Ok(session)
    }

    /// Prepares the image that a mount of the session will need, if it will need one.
    pub(crate) async fn warm(&self, session: &AetherSession) -> Result<()> {
        let record = self.sessions.get(&session.uid().unwrap_or_default());
        let here = record.is_some_and(|record| match record.upper {
            Upper::Dirty => true,
            Upper::Clean { root } => session.head_root() == Some(&root),
            Upper::Fenced { .. } => false,
        });
        if !here && let Some(Beginning::Tree(root)) = self.beginning(session).await? {
            self.image(root, owner(session), &self.wanted(session)).await?;
        }
        Ok(())
    }

    /// The newest version of a session that the cache has; the given one when that is newer.
    fn latest(&self, session: Arc<AetherSession>) -> Result<Arc<AetherSession>> {
        match self.cluster.sessions.get(&session.namespace().unwrap_or_default(), &session.name_any()) {
            Some(newer) if newer.uid() == session.uid() => Ok(newer),
            // The cache can be behind the API server, which we have asked before: an object that it does not have is
            // not gone. One of the same name with another uid is.
            None => Ok(session),
            Some(_) => Err(Failure::NotFound(format!("session {} was deleted and made anew", full_name(&*session)))),
        }
    }

    async fn reread(&self, session: &AetherSession) -> Result<Arc<AetherSession>> {
        self.cluster
            .sessions
            .read(&session.namespace().unwrap_or_default(), &session.name_any())
            .await?
            .filter(|newer| newer.uid() == session.uid())
            .ok_or_else(|| Failure::NotFound(format!("session {} was deleted", full_name(session))))
    }

    /// Whether a holder lives.
    async fn liveness(&self, holder: &str) -> Result<Liveness> {
        let describe = || format!("ask whether node {holder} lives");
        let nodes: Api<Node> = Api::all(self.cluster.client.clone());
        let leases = self.node_leases();
        let (node, lease) =
            tokio::try_join!(nodes.get_metadata_opt(holder), leases.get_opt(holder)).map_err(Failure::api(describe))?;
        Ok(self.holders.judge(holder, node.is_some(), lease.as_ref(), Instant::now()))
    }

    fn node_leases(&self) -> Api<Lease> {
        Api::namespaced(self.cluster.client.clone(), liveness::NODE_LEASES)
    }

    /// Waits until the holder lets go, another takes it, or the holder is lost.
    async fn wait_for_holder(
        &self,
        seen: Arc<AetherSession>,
        holder: &str,
        patience: &Patience,
    ) -> Result<Arc<AetherSession>> {
        let begun = Instant::now();
        let reason = format!(
            "session {} is mounted for writing on node {holder}: delete the pod that uses it there, or mount it readOnly",
            full_name(&*seen)
        );
        let attachment = |session: &AetherSession| session.status.as_ref().and_then(|status| status.attachment.clone());
        let mut changes = self.cluster.sessions.changes();
        // Tells at once when the node is deleted, and its lease with it.
        let mut leases = std::pin::pin!(watcher::watch_object(self.node_leases(), holder));
        let mut again = Instant::now();
        let result = loop {
            let newest = self.latest(seen.clone())?;
            if attachment(&newest) != attachment(&seen) && newest.resource_version() != seen.resource_version() {
                break Ok(newest);
            }
            tokio::select! {
                changed = patience.changed(&mut changes, &reason) => if let Err(end) = changed { break Err(end) },
                () = tokio::time::sleep_until(again.into()) => {
                    let look = tokio::select! {
                        look = self.liveness(holder) => look,
                        end = patience.end(&reason) => break Err(end),
                    };
                    again = Instant::now() + match look {
                        Ok(Liveness::Alive { again }) => again,
                        Ok(liveness) if liveness.lost() => break Ok(seen),
                        // A node that never had a lease may still be deleted.
                        Ok(_) => 10 * LOOK_AGAIN,
                        Err(failure) => {
                            tracing::warn!(error = chain(&failure), holder, "looking at a node lease");
                            LOOK_AGAIN
                        }
                    };
                }
                lease = leases.next() => match lease {
                    Some(Ok(Some(_))) => {}
                    Some(Ok(None)) => again = Instant::now(),
                    Some(Err(error)) => {
                        tracing::warn!(%error, holder, "watching a node lease");
                        tokio::time::sleep(LOOK_AGAIN).await;
                    }
                    None => break Ok(seen),
                },
            }
        };
        self.metrics.lease_wait.observe(begun.elapsed().as_secs_f64());
        result
    }

    pub(crate) async fn tell_of_lost_upper(&self, session: &AetherSession) {
        let note = format!(
            "node {} no longer has the files that were written there; the session continues from {}",
            self.node(),
            session.head_root().unwrap_or("its base")
        );
        tracing::error!(session = full_name(session), note, "the upper is gone");
        self.events.on(session, EventType::Warning, "UpperLost", note).await;
    }

    async fn tell_of_takeover(&self, session: &AetherSession, from: &str, epoch: i64) {
        tracing::warn!(session = full_name(session), from, epoch, "taken over from a lost node");
        let note = format!(
            "taken over from node {from}, which is lost; continues from {}. What that node had unsaved comes back as checkpoint {} when it does",
            session.head_root().unwrap_or("its base"),
            names::recovered_checkpoint_name(&session.name_any(), epoch - 1)
        );
        self.events.on(session, EventType::Warning, "TakenOver", note).await;
    }
}

/// The owner of a session's files.
pub(crate) fn owner(session: &AetherSession) -> Owner {
    let base: Option<&Base> = session.status.as_ref().and_then(|status| status.base.as_ref());
    match base.map(|base| base.owner).or(session.spec.owner) {
        Some(owner) => Owner { uid: owner.uid, gid: owner.gid },
        None => Owner { uid: names::DEFAULT_OWNER.0, gid: names::DEFAULT_OWNER.1 },
    }
}

/// Why there is nothing to mount yet.
pub(crate) fn unresolved(session: &AetherSession) -> Failure {
    let name = full_name(session);
    let status = session.status.as_ref();
    if let Some(why) = lost_moment(session) {
        return Failure::NotYet(format!("session {name} has nothing to start from: {why}"));
    }
    let forked = status.and_then(|status| status.forked_from.as_ref());
    Failure::NotYet(match (&session.spec.session, forked) {
        (Some(parent), None) => format!("session {name} is a fork of {parent}, whose moment has not been taken yet"),
        (_, Some(forked)) => format!(
            "session {name} was forked on node {} and its moment is still on the way to the store",
            forked.node.as_deref().unwrap_or("?")
        ),
        (None, None) => {
            let said = status
                .and_then(|status| conditions::get(&status.conditions, conditions::READY))
                .map(|condition| format!(": {}", condition.message))
                .unwrap_or_default();
            format!("session {name} has no base yet{said}")
        }
    })
}

/// Why there will never be a tree of a fork's moment.
fn lost_moment(session: &AetherSession) -> Option<&str> {
    let status = session.status.as_ref().filter(|_| session.head_root().is_none())?;
    let failed = conditions::get(&status.conditions, conditions::FAILED)?;
    (failed.status == "True").then_some(failed.message.as_str())
}

/// What was to be taken away is not there.
pub(crate) fn absent<T: Default>(error: aether_engine::Error) -> Result<T, aether_engine::Error> {
    if error.is_not_found() { Ok(T::default()) } else { Err(error) }
}
