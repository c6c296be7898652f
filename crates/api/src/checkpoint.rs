//! AetherCheckpoint: a kept state of a session. Checkpoints are data: nothing removes them by age.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::session::{Base, Consistency, Durability};

/// A kept state of a session, taken at the moment this object is first seen.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[kube(
    group = "aether.dev",
    version = "v1alpha1",
    kind = "AetherCheckpoint",
    plural = "aethercheckpoints",
    shortname = "ackpt",
    category = "aether",
    namespaced,
    status = "AetherCheckpointStatus",
    printcolumn(name = "Session", type_ = "string", json_path = ".spec.session"),
    printcolumn(name = "Durability", type_ = "string", json_path = ".status.durability"),
    printcolumn(name = "Changed", type_ = "integer", json_path = ".status.changedFiles"),
    printcolumn(name = "Consistency", type_ = "string", json_path = ".status.consistency", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".spec.message"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self.session == oldSelf.session", "session cannot be changed: make another checkpoint"))]
pub struct AetherCheckpointSpec {
    /// The session, of this namespace.
    #[schemars(length(min = 1))]
    pub session: String,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub message: Option<String>,
    /// What happens to it when its session is deleted.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
}

/// What happens to a checkpoint when its session is deleted.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq, JsonSchema)]
pub enum DeletionPolicy {
    /// It stays until somebody deletes it.
    #[default]
    Keep,
    /// It goes with the session.
    WithSession,
}

/// What became of a checkpoint.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AetherCheckpointStatus {
    /// The tree, once it is digested.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// The session's head when it was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Where the session started: what a diff compares with, also when the session is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
    /// The session's uid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_uid: Option<String>,
    /// The node that has the snapshot, until it is durable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The snapshot on that node, until it is durable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// `Local` at once, `Durable` when the tree is in the store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub durability: Option<Durability>,
    /// How much of a running writer it caught.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistency: Option<Consistency>,
    /// For how long the pods stood still, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_microseconds: Option<i64>,
    /// When it was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_time: Option<Time>,
    /// When it was in the store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub durable_time: Option<Time>,
    /// Paths that differ from the session's base.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_files: Option<i64>,
    /// Bytes that the session does not share with its base.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own_bytes: Option<i64>,
    /// `Ready`: taken. `Durable`: in the store. `Failed`: it will never be. `Intact`, where the store has lost contents
    /// of it: whether they are back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}
