//! AetherRestore: a request, in the manner of a Job, to take a session back to a checkpoint.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::conditions::{self, RESTORED, Wanted, reason};
use crate::session::Base;
use crate::{AetherCheckpoint, AetherSession};

/// Takes a session back to a checkpoint, once, after a safety checkpoint. Works on a mounted session too.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[kube(
    group = "aether.dev",
    version = "v1alpha1",
    kind = "AetherRestore",
    plural = "aetherrestores",
    shortname = "arst",
    category = "aether",
    namespaced,
    status = "AetherRestoreStatus",
    printcolumn(name = "Session", type_ = "string", json_path = ".spec.session"),
    printcolumn(name = "Checkpoint", type_ = "string", json_path = ".spec.checkpoint"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Safety", type_ = "string", json_path = ".status.safetyCheckpoint"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self == oldSelf", "a restore cannot be changed: make another one"))]
pub struct AetherRestoreSpec {
    /// The session, of this namespace.
    #[schemars(length(min = 1))]
    pub session: String,
    /// The checkpoint, of this namespace: of this session or of any other of the same source.
    #[schemars(length(min = 1))]
    pub checkpoint: String,
    /// Delete this object so many seconds after it finished. Never when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds_after_finished: Option<u32>,
}

/// What became of a restore.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AetherRestoreStatus {
    /// `Pending`, `Running`, `Succeeded` or `Failed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// The checkpoint that was taken first: the way back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub safety_checkpoint: Option<String>,
    /// The tree that the session was taken to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// The node that restored the mounted session; absent when no node held it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// When it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<Time>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<Time>,
    /// Paths that were changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_paths: Option<i64>,
    /// `Complete` or `Failed`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

impl AetherRestore {
    /// Whether it ended, well or badly.
    pub fn finished(&self) -> bool {
        self.status.as_ref().is_some_and(|status| status.finished.is_some())
    }

    /// The session's condition that says that this restore moved its head. It is written together with the head, so that
    /// a restore that was cut short right after that is known to be done: see [`Self::has_moved`].
    pub fn moved(&self) -> Wanted {
        let name = self.metadata.name.as_deref().unwrap_or_default();
        let message = format!("to AetherCheckpoint {} by AetherRestore {name} {}", self.spec.checkpoint, self.mark());
        Wanted::yes(RESTORED, reason::DONE, message)
    }

    /// Whether this restore has moved the session's head, whatever became of the session since.
    pub fn has_moved(&self, session: &AetherSession) -> bool {
        let conditions = session.status.as_ref().map_or(&[][..], |status| &status.conditions);
        self.metadata.uid.is_some()
            && conditions::get(conditions, RESTORED).is_some_and(|restored| restored.message.ends_with(&self.mark()))
    }

    /// How the message of [`Self::moved`] ends.
    fn mark(&self) -> String {
        format!("(uid {})", self.metadata.uid.as_deref().unwrap_or_default())
    }
}

/// Why a session cannot be taken back to a checkpoint: each says which source it began with, and it is not the same one.
pub fn foreign(session: &AetherSession, checkpoint: &AetherCheckpoint) -> Option<String> {
    let of =
        |base: Option<&Base>| base.and_then(|base| Some((base.source_namespace.clone()?, base.source_name.clone()?)));
    let ours = of(session.status.as_ref().and_then(|status| status.base.as_ref()))?;
    let theirs = of(checkpoint.status.as_ref().and_then(|status| status.base.as_ref()))?;
    let name = |name: &Option<String>| name.clone().unwrap_or_default();
    (ours != theirs).then(|| {
        format!(
            "AetherCheckpoint {} is of another source than AetherSession {}: make a session from the checkpoint instead",
            name(&checkpoint.metadata.name),
            name(&session.metadata.name)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AetherCheckpointStatus, AetherSessionStatus};

    #[test]
    fn a_session_tells_which_restore_moved_it() {
        let restore = |name: &str, uid: Option<&str>| {
            let spec = AetherRestoreSpec { session: "fix".into(), checkpoint: "good".into(), ..Default::default() };
            let mut restore = AetherRestore::new(name, spec);
            restore.metadata.uid = uid.map(Into::into);
            restore
        };
        let back = restore("back", Some("r-1"));
        let mut session = AetherSession::new("fix", Default::default());
        assert!(!back.has_moved(&session), "nobody has");
        let mut status = AetherSessionStatus::default();
        conditions::set(&mut status.conditions, back.moved(), None);
        session.status = Some(status);
        assert!(back.has_moved(&session));
        assert!(!restore("back", Some("r-2")).has_moved(&session), "another of the same name");
        assert!(!restore("back", Some("1")).has_moved(&session), "the end of its uid");
        assert!(!restore("back", None).has_moved(&session), "one that is not made yet");
    }

    #[test]
    fn a_session_is_not_taken_to_a_checkpoint_of_another_source() {
        let base = |source: Option<&str>| Base {
            root: None,
            source_namespace: source.map(|_| "platform".into()),
            source_name: source.map(Into::into),
            revision: None,
            revision_root: None,
            commit: None,
            owner: Default::default(),
        };
        let between = |ours: Option<&str>, theirs: Option<&str>| {
            let mut session = AetherSession::new("fix", Default::default());
            session.status = Some(AetherSessionStatus { base: Some(base(ours)), ..Default::default() });
            let mut checkpoint = AetherCheckpoint::new("good", Default::default());
            checkpoint.status = Some(AetherCheckpointStatus { base: Some(base(theirs)), ..Default::default() });
            foreign(&session, &checkpoint)
        };
        let said = between(Some("linux"), Some("windows")).unwrap();
        assert!(said.contains("good") && said.contains("fix"), "{said}");
        assert_eq!(between(Some("linux"), Some("linux")), None);
        // One that says nothing, as an older one may, is not refused.
        assert_eq!(between(Some("linux"), None), None);
        assert_eq!(between(None, Some("windows")), None);
    }
}
