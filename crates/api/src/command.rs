//! AetherCommand: a request, in the manner of a Job, to run one command in a session.

use k8s_openapi::api::core::v1::ResourceRequirements;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::core::Duration;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Runs one command in a session, once, in a pod of its own, as the session's owner. Its output is the pod's log.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[kube(
    group = "aether.dev",
    version = "v1alpha1",
    kind = "AetherCommand",
    plural = "aethercommands",
    shortname = "acmd",
    category = "aether",
    namespaced,
    status = "AetherCommandStatus",
    printcolumn(name = "Session", type_ = "string", json_path = ".spec.session"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Exit", type_ = "integer", json_path = ".status.exitCode"),
    printcolumn(name = "Pod", type_ = "string", json_path = ".status.podName", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self == oldSelf", "a command cannot be changed: make another one"))]
pub struct AetherCommandSpec {
    /// The session, of this namespace.
    #[schemars(length(min = 1))]
    pub session: String,
    /// The program and its arguments. Not a shell: say `["sh", "-c", "…"]` for one.
    #[schemars(length(min = 1))]
    pub command: Vec<String>,
    /// Literal environment variables.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<Variable>,
    /// The directory to run in, relative to the session's root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// The image to run in; the operator's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// What the pod asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
    /// End the command after this long, such as `10m`: TERM first, exit code 124, as timeout(1) does. No limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Duration>,
    /// How long the command has between TERM and KILL; 10s when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace: Option<Duration>,
    /// Take a checkpoint when the command has ended, named like this object.
    #[serde(default)]
    pub checkpoint_after: bool,
    /// Delete this object and its pod so many seconds after it finished. Never when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds_after_finished: Option<u32>,
}

/// A literal environment variable.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
pub struct Variable {
    /// Its name.
    #[schemars(length(min = 1))]
    pub name: String,
    /// Its value.
    pub value: String,
}

/// What became of a command.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AetherCommandStatus {
    /// `Pending`, `Running`, `Succeeded` or `Failed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// The pod that runs it; its log is the output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_name: Option<String>,
    /// As a shell would report it: 128+n for signal n, 124 for the time limit, 126 and 127 for what cannot be run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// When the command began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<Time>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<Time>,
    /// The checkpoint taken afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<String>,
    /// Its uid: a later checkpoint of that name says nothing of what the command left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_uid: Option<String>,
    /// `Complete` or `Failed`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

impl AetherCommand {
    /// Whether it ended, well or badly.
    pub fn finished(&self) -> bool {
        self.status.as_ref().is_some_and(|status| status.finished.is_some())
    }
}
