//! AetherApproval: what a reviewer says of a commit, for exactly one tree. Withdrawn by deleting it.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::identity::{Identity, Signature};

/// What a reviewer says of a commit. Who says it is written by the operator, and so is the name: `<commit>.<hash of the user's
/// name>`, so that everybody has one voice.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[kube(
    group = "aether.dev",
    version = "v1alpha1",
    kind = "AetherApproval",
    plural = "aetherapprovals",
    shortname = "aappr",
    category = "aether",
    namespaced,
    status = "AetherApprovalStatus",
    printcolumn(name = "Commit", type_ = "string", json_path = ".spec.commit"),
    printcolumn(name = "Decision", type_ = "string", json_path = ".spec.decision"),
    printcolumn(name = "Reviewer", type_ = "string", json_path = ".spec.reviewer.username"),
    printcolumn(name = "Counts", type_ = "boolean", json_path = ".status.counts"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.reason"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self == oldSelf", "an approval cannot be changed: delete it and make another one"))]
pub struct AetherApprovalSpec {
    /// The commit, of this namespace.
    #[schemars(length(min = 1))]
    pub commit: String,
    /// The tree that was looked at: `status.root` of the commit.
    #[schemars(length(min = 1, max = 128))]
    pub root: String,
    /// What is said of it.
    pub decision: Decision,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16384))]
    pub text: Option<String>,
    /// Who says it. Written by the operator when the object is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reviewer: Option<Identity>,
    /// The operator's proof of that. Written by the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<Signature>,
}

/// What is said of a commit.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq, JsonSchema)]
pub enum Decision {
    /// It may go.
    #[default]
    Approve,
    /// It must not go, for as long as this object exists.
    Reject,
}

/// Whether an approval counts.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
pub struct AetherApprovalStatus {
    /// Whether it counts.
    pub counts: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}
