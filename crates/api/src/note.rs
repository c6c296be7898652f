//! AetherNote: a reviewer's remark on lines of a file of a checkpoint.

use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::identity::Identity;

/// A remark on lines of a file of a checkpoint. Who made it is written by the operator; only `resolved` can be changed.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[kube(
    group = "aether.dev",
    version = "v1alpha1",
    kind = "AetherNote",
    plural = "aethernotes",
    shortname = "anote",
    category = "aether",
    namespaced,
    printcolumn(name = "Checkpoint", type_ = "string", json_path = ".spec.checkpoint"),
    printcolumn(name = "Path", type_ = "string", json_path = ".spec.path"),
    printcolumn(name = "From", type_ = "integer", json_path = ".spec.lines.from"),
    printcolumn(name = "To", type_ = "integer", json_path = ".spec.lines.to", priority = 1),
    printcolumn(name = "Author", type_ = "string", json_path = ".spec.author.username"),
    printcolumn(name = "Resolved", type_ = "boolean", json_path = ".spec.resolved"),
    printcolumn(name = "Text", type_ = "string", json_path = ".spec.text"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self.checkpoint == oldSelf.checkpoint && self.path == oldSelf.path && self.text == oldSelf.text", "only resolved can be changed: make another note"))]
#[x_kube(validation = ("has(self.lines) == has(oldSelf.lines) && (!has(self.lines) || self.lines == oldSelf.lines)", "lines cannot be changed: make another note"))]
#[x_kube(validation = ("has(self.digest) == has(oldSelf.digest) && (!has(self.digest) || self.digest == oldSelf.digest)", "digest cannot be changed: make another note"))]
#[x_kube(validation = ("has(self.author) == has(oldSelf.author) && (!has(self.author) || self.author == oldSelf.author)", "author cannot be changed: make another note"))]
pub struct AetherNoteSpec {
    /// The checkpoint, of this namespace.
    #[schemars(length(min = 1))]
    pub checkpoint: String,
    /// The file, from the tree's root on.
    #[schemars(length(min = 1, max = 4096))]
    pub path: String,
    /// The lines; the whole file when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lines: Option<Lines>,
    /// The digest of the file's contents: while it is the same, the lines are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// The remark.
    #[schemars(length(min = 1, max = 16384))]
    pub text: String,
    /// Whether it has been dealt with.
    #[serde(default)]
    pub resolved: bool,
    /// Who made it. Written by the operator when the object is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<Identity>,
}

/// Lines of a file; the first one is 1.
#[derive(KubeSchema, Clone, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
#[x_kube(validation = ("self.from <= self.to", "from must not be behind to"))]
pub struct Lines {
    /// The first line.
    #[schemars(range(min = 1, max = 2147483647))]
    pub from: u32,
    /// The last line.
    #[schemars(range(min = 1, max = 2147483647))]
    pub to: u32,
}
