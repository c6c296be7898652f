//! AetherCommit: a request, in the manner of a Job, to take what a session has made out of the cluster. It runs when the
//! review rule of the source is satisfied, once, and stays as the record.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::identity::{Identity, Signature};

/// Takes a checkpoint to a target, once, when enough reviewers have approved exactly its tree.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[kube(
    group = "aether.dev",
    version = "v1alpha1",
    kind = "AetherCommit",
    plural = "aethercommits",
    shortname = "acmt",
    category = "aether",
    namespaced,
    status = "AetherCommitStatus",
    printcolumn(name = "Checkpoint", type_ = "string", json_path = ".status.checkpoint"),
    printcolumn(name = "Branch", type_ = "string", json_path = ".spec.target.git.branch"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Have", type_ = "integer", json_path = ".status.approvals.have"),
    printcolumn(name = "Need", type_ = "integer", json_path = ".status.approvals.need"),
    printcolumn(name = "By", type_ = "string", json_path = ".spec.requestedBy.username", priority = 1),
    printcolumn(name = "Commit", type_ = "string", json_path = ".status.commit"),
    printcolumn(name = "Place", type_ = "string", json_path = ".status.place", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self == oldSelf", "a commit cannot be changed: make another one"))]
#[x_kube(validation = ("has(self.checkpoint) != has(self.session)", "say exactly one of checkpoint and session"))]
#[schemars(extend("oneOf" = [{"required": ["checkpoint"]}, {"required": ["session"]}]))]
pub struct AetherCommitSpec {
    /// The checkpoint, of this namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub checkpoint: Option<String>,
    /// A session of this namespace: a checkpoint of it is taken first, named like this object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub session: Option<String>,
    /// Where to.
    pub target: Target,
    /// Delete this object so many seconds after it finished. Never when absent: it is the record of who approved what.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds_after_finished: Option<u32>,
    /// Who asked for it. Written by the operator when the object is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested_by: Option<Identity>,
    /// The operator's proof of that. Written by the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<Signature>,
}

/// Where a commit goes: exactly one of `git`, `promote` and `export`.
#[derive(KubeSchema, Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("[has(self.git), has(self.promote), has(self.export)].filter(x, x).size() == 1", "say exactly one of git, promote and export"))]
#[schemars(extend("oneOf" = [{"required": ["git"]}, {"required": ["promote"]}, {"required": ["export"]}]))]
pub struct Target {
    /// A commit on a branch of the source's repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub git: Option<GitTarget>,
    /// A new revision of the source, at once usable by new sessions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promote: Option<PromoteTarget>,
    /// A copy of the tree in a place that the source names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub export: Option<ExportTarget>,
}

/// A commit on a branch of the source's repository, on top of the revision that the session started from.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GitTarget {
    /// The branch, without `refs/heads/`; made when there is none of that name.
    #[schemars(length(min = 1, max = 255))]
    pub branch: String,
    /// The message. Lines that name session, checkpoint, tree and approvers are added to its end.
    #[schemars(length(min = 1, max = 65536))]
    pub message: String,
    /// Whose work it is; the one who asked for the commit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<Author>,
    /// When the branch has moved on: put the change on top of what is there, if nobody else has changed the same paths. When
    /// false a branch that moved is reported and left alone.
    #[serde(default)]
    pub rebase: bool,
    /// What becomes of commits that were made with git inside the session.
    #[serde(default)]
    pub history: History,
}

/// Whose work a commit is.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
pub struct Author {
    /// The name.
    #[schemars(length(min = 1, max = 255))]
    pub name: String,
    /// The address.
    #[schemars(length(min = 1, max = 255))]
    pub email: String,
}

/// What becomes of commits that were made with git inside the session.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq, JsonSchema)]
pub enum History {
    /// All that the session has changed becomes one commit.
    #[default]
    Squash,
    /// They stay, and what is not in them becomes one more. They must be one straight line from the revision on that the session
    /// started from, and the source must allow it (`spec.review.keepHistory`).
    Keep,
}

/// A new revision of the source.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
pub struct PromoteTarget {}

/// A copy of the tree in one of the places that the source has for it (`spec.review.exports`).
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
pub struct ExportTarget {
    /// The place, by its name in the source.
    #[schemars(length(min = 1, max = 63))]
    pub to: String,
    /// A folder in it, which must not exist yet: relative, without `..`. The commit's name when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub path: Option<String>,
}

/// How far a commit is.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq, JsonSchema)]
pub enum CommitPhase {
    /// What it names is not there or not ready yet.
    Pending,
    /// Approvals or checks are missing.
    AwaitingApproval,
    /// A reviewer rejects it. It goes on when the rejection is withdrawn.
    Rejected,
    /// It was released and is on its way.
    Running,
    /// It is at its target.
    Succeeded,
    /// It will never be; the condition says why.
    Failed,
}

/// What became of a commit.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AetherCommitStatus {
    /// How far it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<CommitPhase>,
    /// The checkpoint that is committed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<String>,
    /// The session that the checkpoint is of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// The tree: what an approval must name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// What the session started from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<CommitBase>,
    /// The source whose review rule decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<CommitSource>,
    /// Who made the session, the checkpoint and this object: their approvals count only where the rule says `allowSelf`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub makers: Vec<String>,
    /// What nobody knows the maker of. Then no approval can be told from one's own, and none counts, unless the rule says
    /// `allowSelf`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unknown_makers: Vec<String>,
    /// Who has approved, and what is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approvals: Option<Approvals>,
    /// The Job that takes it to its target, in the source's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<String>,
    /// Its uid: another Job of that name is not believed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_uid: Option<String>,
    /// How often it was released: again, when it was rejected before anything was done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub releases: Option<u32>,
    /// How many Jobs were made for it before this one, and came to nothing by no fault of the commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retries: Option<u32>,
    /// When the next one is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<Time>,
    /// The id of the resulting git commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// The name of the resulting revision of the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Where the copy is, for an export: `s3://BUCKET/FOLDER/` or `CLAIM/FOLDER`, of the source's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
    /// Paths that others have changed too, so that it could not be rebased.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conflicts: Vec<String>,
    /// What the target cannot hold, such as empty folders in git.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// When it was released.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<Time>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<Time>,
    /// `Approved`: whether the review rule is satisfied. `Complete` or `Failed`: how it ended.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// What the session of a commit started from.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CommitBase {
    /// The revision's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Its tree.
    pub root: String,
    /// Its git commit, for a git source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
}

/// The source of a commit.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
pub struct CommitSource {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
}

/// Who has approved a commit, and what is missing.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
pub struct Approvals {
    /// How many approvals count.
    pub have: u32,
    /// How many must.
    pub need: u32,
    /// Whose approvals count.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub by: Vec<String>,
    /// Who rejects it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rejected: Vec<String>,
    /// What is missing, a sentence for each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
    /// AetherApprovals that name another tree than the commit's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stale: Vec<String>,
}

impl AetherCommit {
    /// Whether it ended, well or badly.
    pub fn finished(&self) -> bool {
        self.status.as_ref().is_some_and(|status| status.finished.is_some())
    }

    /// Whether it has not ended and commits this checkpoint, of its own namespace: then no controller deletes that.
    pub fn needs(&self, checkpoint: &str) -> bool {
        let taken = self.status.as_ref().and_then(|status| status.checkpoint.as_deref());
        !self.finished() && [self.spec.checkpoint.as_deref(), taken].contains(&Some(checkpoint))
    }
}
