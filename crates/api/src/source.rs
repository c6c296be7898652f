//! AetherSource: where the base of sessions comes from. Lives in a platform team's namespace, beside its Secret.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::core::Duration;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::review::ReviewRule;

/// Where the base of sessions comes from: exactly one of `git`, `s3`, `claim` and `empty`.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[kube(
    group = "aether.dev",
    version = "v1alpha1",
    kind = "AetherSource",
    plural = "aethersources",
    shortname = "asrc",
    category = "aether",
    namespaced,
    status = "AetherSourceStatus",
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Revision", type_ = "string", json_path = ".status.latest"),
    printcolumn(name = "Files", type_ = "integer", json_path = ".status.files"),
    printcolumn(name = "Bytes", type_ = "integer", json_path = ".status.bytes"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("[has(self.git), has(self.s3), has(self.claim), has(self.empty)].filter(x, x).size() == 1", "say exactly one of git, s3, claim and empty"))]
#[schemars(extend("oneOf" = [{"required": ["git"]}, {"required": ["s3"]}, {"required": ["claim"]}, {"required": ["empty"]}]))]
pub struct AetherSourceSpec {
    /// A git repository, fetched by the git program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub git: Option<GitSource>,
    /// The objects of an S3 bucket, as files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3Source>,
    /// A directory in an existing claim of the source's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<ClaimSource>,
    /// An empty directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub empty: Option<EmptySource>,
    /// Look for a new revision this often, such as `15m`. Never when absent; the annotation `aether.dev/refresh` asks once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refresh: Option<Duration>,
    /// How many revisions stay usable for new sessions; older ones leave the list. At least 1.
    #[serde(default = "default_revisions_to_keep")]
    #[schemars(range(min = 1, max = 100))]
    pub revisions_to_keep: u32,
    /// The namespaces whose sessions may start from this source, beside its own. `*` is every namespace.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed_namespaces: Vec<String>,
    /// When nodes fetch the contents of a revision. `OnDemand`: as sessions read them, and in the background from the first mount
    /// on a node on. `Eager`: as soon as the revision exists, on every node, and before a session is mounted.
    #[serde(default)]
    pub hydration: Hydration,
    /// What must be so before an AetherCommit of a session of this source runs. One approval when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub review: Option<ReviewRule>,
}

fn default_revisions_to_keep() -> u32 {
    3
}

impl AetherSourceSpec {
    /// The Secret that imports need, and the field that names it: `git` or `s3`.
    pub fn secret(&self) -> Option<(&'static str, &SecretReference)> {
        let git = self.git.as_ref().and_then(|git| Some(("git", git.secret_ref.as_ref()?)));
        git.or_else(|| Some(("s3", self.s3.as_ref()?.secret_ref.as_ref()?)))
    }
}

/// A git repository, fetched by the git program.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GitSource {
    /// `https://`, `http://`, `ssh://`, `git@host:path` or `file://`.
    #[schemars(length(min = 1))]
    pub url: String,
    /// A branch, a tag, a full ref or a commit id. The remote's HEAD when absent.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// How many commits of history sessions get. All of them when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub depth: Option<u32>,
    /// Fetch submodules too, recursively.
    #[serde(default)]
    pub submodules: bool,
    /// Fetch Git LFS contents too.
    #[serde(default)]
    pub lfs: bool,
    /// A Secret of the source's namespace: type `kubernetes.io/basic-auth` (`username`, `password`) or
    /// `kubernetes.io/ssh-auth` (`ssh-privatekey`, and `known_hosts`); `ca.crt` with either for a private authority.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretReference>,
    /// The Secret by which commits are pushed, of the same types; `secretRef` when absent. No import sees it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub push_secret_ref: Option<SecretReference>,
}

/// The objects of an S3 bucket, as files: `/` in a key makes a folder. Also where an export puts files as objects.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct S3Source {
    /// The bucket.
    #[schemars(length(min = 1))]
    pub bucket: String,
    /// A folder in the bucket; all of it when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
    /// The service, such as `https://s3.example.com`; AWS when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// The region; `us-east-1` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// A Secret of the source's namespace with `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and, where there is one,
    /// `AWS_SESSION_TOKEN`; `ca.crt` for a private authority. Without it requests are not signed: the bucket must be public.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretReference>,
}

/// A Secret by name.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
pub struct SecretReference {
    /// The Secret's name.
    pub name: String,
}

/// A directory in an existing claim of the source's namespace.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClaimSource {
    /// The claim's name.
    pub claim_name: String,
    /// The directory in the volume; its root when absent. Relative, without `..`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
}

/// An empty directory.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
pub struct EmptySource {}

/// When nodes fetch the contents of a revision.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq, JsonSchema)]
pub enum Hydration {
    /// As sessions on the node read them, and in the background from the first mount on. Where the lazy layer is not served,
    /// all of them before the first mount.
    #[default]
    OnDemand,
    /// As soon as the revision exists, on every node, and all of them before a session is mounted: no read waits for a network.
    /// Costs its size on every node.
    Eager,
}

/// What became of a source.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AetherSourceStatus {
    /// The generation that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Importing`, `Ready`, `Failed` or `Invalid`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// The name of the newest revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latest: Option<String>,
    /// Files of the newest revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<i64>,
    /// Bytes of the newest revision's files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<i64>,
    /// Usable revisions, newest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub revisions: Vec<Revision>,
    /// The import that runs, or the last one that ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub import: Option<Import>,
    /// `Ready`: a revision can be used. `Importing`: a Job is at work. `Intact`, where the store has lost contents of a
    /// revision: whether they are back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// An immutable state of a source.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Revision {
    /// `r1`, `r2`, … in the order of import.
    pub name: String,
    /// The tree: `<BLAKE3 in hex>/<bytes of the root directory message>`.
    pub root: String,
    /// Regular files.
    pub files: i64,
    /// Bytes of the regular files.
    pub bytes: i64,
    /// The git commit, for a git source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// Digest of the bucket's listing (keys, ETags, sizes), for an S3 source: while it is this, a refresh reads no object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listing: Option<String>,
    /// The AetherCommit that made it, for one that was promoted: `NAMESPACE/NAME (uid UID)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promoted: Option<String>,
    /// When the import ended.
    pub time: Time,
    /// How long the import took, from clone to last upload, in milliseconds.
    pub milliseconds: i64,
}

/// An import: one Job.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Import {
    /// The Job's name, in the source's namespace.
    pub job: String,
    /// Its uid: a later Job of that name is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_uid: Option<String>,
    /// The generation of the spec that is imported.
    pub generation: i64,
    /// The value of annotation `aether.dev/refresh` when it was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested: Option<String>,
    /// Digest of the part of the spec that says where from, so that only a change of that part asks for an import.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub origin: String,
    /// The resource version of the Secret that was used: a failed import is tried again when it changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_version: Option<String>,
    /// How many imports failed in a row, this one included. The pause before the next try grows with it.
    #[serde(default)]
    pub failures: u32,
    /// `Cloning`, `Scanning`, `Uploading`, `Done` or `Failed`.
    pub phase: String,
    /// Files dealt with in this phase so far.
    #[serde(default)]
    pub files: i64,
    /// Bytes dealt with in this phase so far.
    #[serde(default)]
    pub bytes: i64,
    /// When it was started.
    pub started: Time,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<Time>,
}
