//! AetherSession: a writable copy-on-write view of an immutable tree, mounted by claim.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::core::Duration;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A writable copy-on-write view of exactly one of: a `source`, a `checkpoint`, or another `session` (a fork).
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[kube(
    group = "aether.dev",
    version = "v1alpha1",
    kind = "AetherSession",
    plural = "aethersessions",
    shortname = "asess",
    category = "aether",
    namespaced,
    status = "AetherSessionStatus",
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Node", type_ = "string", json_path = ".status.attachment.node"),
    printcolumn(name = "Changed", type_ = "integer", json_path = ".status.changedFiles"),
    printcolumn(name = "Own-Bytes", type_ = "integer", json_path = ".status.ownBytes"),
    printcolumn(name = "Head", type_ = "string", json_path = ".status.head.durability"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("[has(self.source), has(self.checkpoint), has(self.session)].filter(x, x).size() == 1", "say exactly one of source, checkpoint and session"))]
#[x_kube(validation = ("has(self.source) == has(oldSelf.source) && (!has(self.source) || self.source == oldSelf.source)", "source cannot be changed: make another session"))]
#[x_kube(validation = ("has(self.checkpoint) == has(oldSelf.checkpoint) && (!has(self.checkpoint) || self.checkpoint == oldSelf.checkpoint)", "checkpoint cannot be changed: make another session"))]
#[x_kube(validation = ("has(self.session) == has(oldSelf.session) && (!has(self.session) || self.session == oldSelf.session)", "session cannot be changed: make another session"))]
#[x_kube(validation = ("has(self.owner) == has(oldSelf.owner) && (!has(self.owner) || self.owner == oldSelf.owner)", "owner cannot be changed: make another session"))]
#[x_kube(validation = ("has(self.medium) == has(oldSelf.medium) && (!has(self.medium) || self.medium == oldSelf.medium)", "medium cannot be changed: make another session"))]
#[schemars(extend("oneOf" = [{"required": ["source"]}, {"required": ["checkpoint"]}, {"required": ["session"]}]))]
pub struct AetherSessionSpec {
    /// Start from a revision of a source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceReference>,
    /// Start from a checkpoint of this namespace, by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub checkpoint: Option<String>,
    /// Fork a session of this namespace, by name, at the moment this object is first seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub session: Option<String>,
    /// Who owns the files. A fork has its parent's owner unless it says otherwise; else 1000:1000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
    /// What the session's changes are kept on while a node holds it: `Disk` when absent, and its parent's for a fork. What is in
    /// `Memory` is gone with its node, except for checkpoints that are durable, and takes the node's memory twice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub medium: Option<Medium>,
    /// The most that the session may write. May be raised and lowered while it is in use. A fork has limits of its own;
    /// `kubectl aether fork` gives it those of its parent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// Automatic checkpoints while a node holds the session. None when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoints: Option<AutomaticCheckpoints>,
    /// Delete the session this long after it was created, such as `8h`. Never when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_to_live: Option<Duration>,
    /// How pods reach the session.
    #[serde(default)]
    pub claim: ClaimPolicy,
}

/// A source, wherever its team keeps it.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SourceReference {
    /// The source's namespace; the session's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The source's name.
    #[schemars(length(min = 1))]
    pub name: String,
    /// One of the source's revisions; the newest when absent. Stamped once: a session never moves to another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
}

/// The numeric owner of files.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq, JsonSchema)]
pub struct Owner {
    /// User id.
    #[schemars(range(max = 4294967294i64))]
    pub uid: u32,
    /// Group id.
    #[schemars(range(max = 4294967294i64))]
    pub gid: u32,
}

impl std::str::FromStr for Owner {
    type Err = String;

    /// `UID:GID`.
    fn from_str(text: &str) -> Result<Self, String> {
        text.split_once(':')
            .and_then(|(uid, gid)| Some(Self { uid: uid.parse().ok()?, gid: gid.parse().ok()? }))
            // The kernel means "do not change" by the greatest id.
            .filter(|owner| owner.uid != u32::MAX && owner.gid != u32::MAX)
            .ok_or_else(|| format!("owner {text:?} is not of the form UID:GID, such as 1000:1000"))
    }
}

/// What a session's changes are kept on.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq, JsonSchema)]
pub enum Medium {
    /// The node's pool on disk.
    #[default]
    Disk,
    /// The node's memory.
    Memory,
}

/// The most that a session may write. A writer gets EDQUOT (some file systems say ENOSPC); nobody else is bothered. Its
/// base does not count, nor what a fork inherited, nor what only checkpoints and forks still keep.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, Eq, JsonSchema)]
pub struct Limits {
    /// Bytes on disk, such as `10Gi`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = crate::quantity::PATTERN))]
    pub bytes: Option<String>,
    /// Files, directories, symbolic links and fifos. On btrfs they are counted every few seconds; until then more can be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub inodes: Option<i64>,
}

impl Limits {
    /// The limit of bytes as a number.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parsed_bytes(&self) -> Result<Option<u64>, String> {
        self.bytes.as_deref().map(crate::quantity::parse).transpose()
    }
}

/// Checkpoints that nobody has to ask for.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, JsonSchema)]
pub struct AutomaticCheckpoints {
    /// Take one this often while the session is mounted, such as `5m`. It bounds what the loss of a node can cost.
    pub interval: Duration,
    /// How many automatic checkpoints stay; older ones are deleted.
    #[serde(default = "default_keep")]
    #[schemars(range(min = 1, max = 1000))]
    pub keep: u32,
}

fn default_keep() -> u32 {
    3
}

/// How pods reach a session.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq, JsonSchema)]
pub enum ClaimPolicy {
    /// By a PersistentVolumeClaim of the session's name, which the operator makes.
    #[default]
    Create,
    /// By the PersistentVolumeClaim of the session's name that asked for it through StorageClass `aether`.
    Existing,
    /// By an inline volume only.
    None,
}

/// What became of a session. `attachment`, `head`, `forkedFrom`, `changedFiles`, `ownBytes` and `sharedBytes` are
/// the node driver's; the rest is the operator's (and `head` of a session that no node holds).
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AetherSessionStatus {
    /// The generation that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Pending`, `Bound` or `Failed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// Where the session started. Stamped once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
    /// The newest tree of the session that is in the store; its base until there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<Head>,
    /// The moment of the fork. Stamped once, never evaluated again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forked_from: Option<ForkedFrom>,
    /// Which node holds the writer's lease, and the lease's epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attachment: Option<Attachment>,
    /// The PersistentVolumeClaim that pods mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim_name: Option<String>,
    /// Paths that differ from the base, at the last digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_files: Option<i64>,
    /// Bytes that only this session has, at the last digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own_bytes: Option<i64>,
    /// Bytes that the session shares with its base.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_bytes: Option<i64>,
    /// `Ready`: a pod can mount it. `Intact`, where the store has lost contents of it: whether they are back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Where a session started.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Base {
    /// The tree. Absent for a fork whose moment is not digested yet: see `forkedFrom`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// The source's namespace, of the session or of the ancestor that started from a source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_namespace: Option<String>,
    /// The source's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_name: Option<String>,
    /// The source's revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// The root of that revision: what `kubectl aether diff` compares with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision_root: Option<String>,
    /// The git commit of that revision: what a commit to git goes on top of, also when the source keeps the revision no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// Who owns the files.
    pub owner: Owner,
}

/// The newest tree of a session that is in the store.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Head {
    /// The tree.
    pub root: String,
    /// Whether it survives the loss of its node.
    pub durability: Durability,
    /// When it was taken.
    pub time: Time,
}

/// Whether a tree survives the loss of its node.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq, JsonSchema)]
pub enum Durability {
    /// On its node only.
    Local,
    /// In the store.
    Durable,
}

/// How much of a running writer a snapshot caught.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq, JsonSchema)]
pub enum Consistency {
    /// All of it as it was at one moment: the pods were frozen, or nobody wrote.
    PointInTime,
    /// Each file as it was at one moment, not all files at the same one.
    PerFile,
}

/// The moment of a fork.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ForkedFrom {
    /// The parent's name.
    pub session: String,
    /// The parent's uid.
    pub uid: String,
    /// The node that has the snapshot; absent when the parent was held by no node and its head was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The snapshot on that node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// When.
    pub time: Time,
    /// How much of a running writer it caught.
    pub consistency: Consistency,
    /// For how long the parent's pods stood still, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_microseconds: Option<i64>,
    /// Whether the moment is in the store, so that any node can mount the fork.
    pub durable: bool,
}

/// The writer's lease.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// The node that holds it; absent when nobody does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Grows with each taking. A node that comes back with an older one has lost the session.
    pub epoch: i64,
    /// Since when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
}

impl AetherSession {
    /// The node that holds the writer's lease now.
    pub fn holder(&self) -> Option<&str> {
        self.status.as_ref()?.attachment.as_ref()?.node.as_deref()
    }

    /// The newest tree of the session that is in the store.
    pub fn head_root(&self) -> Option<&str> {
        let status = self.status.as_ref()?;
        status.head.as_ref().map(|head| head.root.as_str()).or_else(|| status.base.as_ref()?.root.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_two_numbers_that_the_kernel_takes() {
        assert_eq!("1000:5".parse(), Ok(Owner { uid: 1000, gid: 5 }));
        for text in ["", "1000", "root:root", "-1:0", "1:2:3", "1000:4294967295", "4294967295:0"] {
            let said = text.parse::<Owner>().unwrap_err();
            assert!(said.contains("UID:GID") && said.contains(text), "{said}");
        }
    }
}
