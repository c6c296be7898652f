//! Sessions of inline volumes: made by the driver at publish, from the newest revision of a source; owned by the pod, and
//! deleted when the volume is unpublished. Two writes to get there: the object, and its status with base and lease.

use std::sync::Arc;
use std::time::Duration;

use aether_api::conditions::{self, READY, Wanted, reason};
use aether_api::session::{AetherSessionSpec, Base, ClaimPolicy, Limits, Owner, SourceReference};
use aether_api::source::Revision;
use aether_api::{AetherSession, AetherSource};
use aether_runtime::Stage;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::runtime::events::EventType;
use kube::{Resource as _, ResourceExt as _};
use serde_json::json;

use crate::attach::absent;
use crate::cluster::Patience;
use crate::driver::{Driver, parse_root};
use crate::failure::{Failure, Result, status_code};
use crate::hydration;
use crate::moments::full_name;
use crate::records::{Pod, PublishRecord, Record as _};
use crate::volume::inline_session_name;

/// The session of an inline volume, and what its status begins with.
pub(crate) struct Own {
    pub session: Arc<AetherSession>,
    pub first: serde_json::Value,
}

impl Driver {
    /// Makes the session of an inline volume, or finds the one that an earlier attempt made. `record` is on the disk
    /// before the object is made, so that a driver killed in between still deletes it.
    pub(crate) async fn own_session(
        &self,
        record: &PublishRecord,
        pod: &Pod,
        (source_namespace, source): (&str, &str),
        (owner, limits): (Owner, Option<&Limits>),
        patience: &Patience,
    ) -> Result<Own> {
        let (source, revision) = self.usable_revision(source_namespace, source, pod, patience).await?;
        // The image is made before the session is: a source that cannot be fetched makes no object.
        let root = parse_root(&revision.root, &format!("source {}", full_name(&*source)))?;
        let files_of = aether_cas::tree::Owner { uid: owner.uid, gid: owner.gid };
        self.image(root, files_of, &hydration::Wanted::of(&source)).await?;

        let wanted = build(record, pod, &source, (owner, limits));
        let api = self.cluster.sessions.api(&pod.namespace);
        let describe = || format!("make session {} of pod {}/{}", record.session, pod.namespace, pod.name);
        let session = match api.create(&PostParams::default(), &wanted).await {
            Ok(session) => session,
            Err(error) if status_code(&error) == Some(409) => {
                let existing = api.get(&record.session).await.map_err(Failure::api(describe))?;
                let ours = existing.owner_references().iter().any(|owner| owner.uid == pod.uid);
                if !ours {
                    return Err(Failure::Denied(format!(
                        "session {} exists and belongs to somebody else, so pod {} cannot have it: delete it, or name the pod otherwise",
                        full_name(&existing),
                        pod.name
                    )));
                }
                existing
            }
            Err(error) => return Err(Failure::api(describe)(error)),
        };
        let first = first_status(&source, &revision, owner, &session);
        Ok(Own { session: Arc::new(session), first })
    }

    /// The newest revision of a source that this pod may use; waits for a source that is still being imported.
    async fn usable_revision(
        &self,
        namespace: &str,
        name: &str,
        pod: &Pod,
        patience: &Patience,
    ) -> Result<(Arc<AetherSource>, Revision)> {
        let mut changes = self.cluster.sources.changes();
        let mut told = false;
        loop {
            let source = match self.cluster.sources.get(namespace, name) {
                Some(source) => source,
                None => self.cluster.sources.read(namespace, name).await?.ok_or_else(|| {
                    Failure::NotFound(format!(
                        "source {namespace}/{name} of the inline volume of pod {}/{} does not exist",
                        pod.namespace, pod.name
                    ))
                })?,
            };
            if !allowed(&source, &pod.namespace) {
                return Err(Failure::Denied(format!(
                    "source {namespace}/{name} may not be used in namespace {}: add it to the source's allowedNamespaces",
                    pod.namespace
                )));
            }
            if let Some(revision) = latest(&source) {
                let revision = revision.clone();
                return Ok((source, revision));
            }
            let reason = format!("source {namespace}/{name} has no revision yet{}", said(&source));
            if !std::mem::replace(&mut told, true) {
                self.events.on_pod(pod, EventType::Normal, "WaitingForSource", reason.clone()).await;
            }
            patience.changed(&mut changes, &reason).await?;
        }
    }

    /// Deletes what an inline volume made, here and in the cluster, until it has succeeded. The record goes last.
    pub(crate) fn begin_end_own_session(self: &Arc<Self>, record: PublishRecord) {
        let driver = self.clone();
        let owner = format!("{}/{}", record.namespace, record.session);
        self.tasks.spawn(Stage::Work, "end inline session", &owner, move |_| async move {
            driver.end_own_session(record).await;
            Ok(())
        });
    }

    async fn end_own_session(&self, record: PublishRecord) {
        let mut delay = Duration::from_millis(500);
        while let Err(error) = self.try_end_own_session(&record).await {
            tracing::warn!(
                session = record.session,
                error = crate::failure::chain(&error),
                "deleting the session of an inline volume"
            );
            tokio::select! {
                () = tokio::time::sleep(delay) => delay = (delay * 2).min(Duration::from_secs(60)),
                // The record stays: the next start goes on.
                () = self.stop.cancelled() => return,
            }
        }
    }

    pub(crate) async fn try_end_own_session(&self, record: &PublishRecord) -> Result<()> {
        let key = record.key();
        // A pod that is started again has the same target and the same session: when it has been published anew, its session is
        // in use.
        let _target = self.target_locks.lock(&key).await;
        if !self.publishes.get(&key).is_some_and(|current| current.unpublished) {
            return Ok(());
        }
        if let Some(uid) = &record.uid {
            let _lock = self.session_locks.lock(uid).await;
            self.engine.unmount_session(uid).await.or_else(absent)?;
            self.engine.delete_session(uid).await.or_else(absent)?;
            self.sessions.remove(uid).await?;
        }
        let api = self.cluster.sessions.api(&record.namespace);
        // Without a uid the driver was killed while it made the object: the pod's uid tells whether it is ours.
        let uid = match (&record.uid, &record.pod) {
            (Some(uid), _) => Some(uid.clone()),
            (None, Some(pod)) => self
                .cluster
                .sessions
                .read(&record.namespace, &record.session)
                .await?
                .filter(|session| session.owner_references().iter().any(|owner| owner.uid == pod.uid))
                .and_then(|session| session.uid()),
            (None, None) => None,
        };
        if let Some(uid) = uid {
            let only = DeleteParams {
                preconditions: Some(Preconditions { uid: Some(uid), resource_version: None }),
                ..DeleteParams::background()
            };
            match api.delete(&record.session, &only).await {
                Ok(_) => {}
                // Gone, or another of that name.
                Err(error) if matches!(status_code(&error), Some(404 | 409)) => {}
                Err(error) => {
                    return Err(Failure::api(|| format!("delete session {}/{}", record.namespace, record.session))(
                        error,
                    ));
                }
            }
        }
        self.publishes.remove(&key).await?;
        self.count();
        Ok(())
    }
}

/// The record of an inline volume, as it is before anything is made.
pub(crate) fn session_name(pod: &Pod, volume_id: &str) -> String {
    inline_session_name(&pod.name, volume_id)
}

fn build(
    record: &PublishRecord,
    pod: &Pod,
    source: &AetherSource,
    (owner, limits): (Owner, Option<&Limits>),
) -> AetherSession {
    let mut session = AetherSession::new(
        &record.session,
        AetherSessionSpec {
            source: Some(SourceReference { namespace: source.namespace(), name: source.name_any(), revision: None }),
            owner: Some(owner),
            limits: limits.cloned(),
            claim: ClaimPolicy::None,
            ..AetherSessionSpec::default()
        },
    );
    session.metadata.namespace = Some(pod.namespace.clone());
    session.metadata.owner_references = Some(vec![OwnerReference {
        api_version: "v1".into(),
        kind: "Pod".into(),
        name: pod.name.clone(),
        uid: pod.uid.clone(),
        ..OwnerReference::default()
    }]);
    session
}

/// What the operator would stamp.
fn first_status(
    source: &AetherSource,
    revision: &Revision,
    owner: Owner,
    session: &AetherSession,
) -> serde_json::Value {
    let base = Base {
        root: Some(revision.root.clone()),
        source_namespace: source.namespace(),
        source_name: Some(source.name_any()),
        revision: Some(revision.name.clone()),
        revision_root: Some(revision.root.clone()),
        commit: revision.commit.clone(),
        owner,
    };
    let mut ready = Vec::new();
    let message = format!("starts from revision {} of source {}", revision.name, full_name(source));
    conditions::set(&mut ready, Wanted::yes(READY, reason::READY, message), session.meta().generation);
    json!({
        "phase": "Bound",
        "observedGeneration": session.meta().generation,
        "base": base,
        "changedFiles": 0,
        "ownBytes": 0,
        "sharedBytes": revision.bytes,
        "conditions": ready,
    })
}

fn allowed(source: &AetherSource, namespace: &str) -> bool {
    source.namespace().as_deref() == Some(namespace)
        || source.spec.allowed_namespaces.iter().any(|allowed| allowed == "*" || allowed == namespace)
}

fn latest(source: &AetherSource) -> Option<&Revision> {
    let status = source.status.as_ref()?;
    status.revisions.iter().find(|revision| Some(&revision.name) == status.latest.as_ref())
}

fn said(source: &AetherSource) -> String {
    source
        .status
        .as_ref()
        .and_then(|status| conditions::get(&status.conditions, READY))
        .map(|condition| format!(": {}", condition.message))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_api::AetherSourceSpec;

    #[test]
    fn a_session_of_a_pod_knows_the_git_commit_that_it_started_from() {
        let revision = json!({"name": "r1", "root": "aa/1", "files": 1, "bytes": 1, "commit": "c0ffee",
            "time": "2026-01-01T00:00:00Z", "milliseconds": 1});
        let revision: Revision = serde_json::from_value(revision).unwrap();
        let source = AetherSource::new("linux", AetherSourceSpec::default());
        let session = AetherSession::new("s", Default::default());
        let status = first_status(&source, &revision, Owner { uid: 1, gid: 1 }, &session);
        assert_eq!((&status["base"]["commit"], &status["base"]["revisionRoot"]), (&json!("c0ffee"), &json!("aa/1")));
    }

    #[test]
    fn a_source_says_which_namespaces_may_use_it() {
        let source = |allowed: &[&str]| {
            let mut source = AetherSource::new(
                "kubernetes",
                AetherSourceSpec {
                    allowed_namespaces: allowed.iter().map(|name| (*name).to_owned()).collect(),
                    ..AetherSourceSpec::default()
                },
            );
            source.metadata.namespace = Some("platform".into());
            source
        };
        assert!(allowed(&source(&[]), "platform"));
        assert!(!allowed(&source(&[]), "team"));
        assert!(allowed(&source(&["team"]), "team"));
        assert!(allowed(&source(&["*"]), "team"));
        assert!(!allowed(&source(&["tea"]), "team"));
    }
}
