//! The review rule of a source: what must be so before something leaves by an AetherCommit.

use kube::KubeSchema;
use kube::core::Duration;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::command::Variable;
use crate::source::S3Source;

/// What must be so before an AetherCommit of a session of the source runs.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReviewRule {
    /// How many people must approve. 0 lets commits run that nobody has looked at.
    #[serde(default = "default_required")]
    #[schemars(range(max = 100))]
    pub required: u32,
    /// Groups of which so many members must be among them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub groups: Vec<GroupRule>,
    /// Whether approvals count of who made the session, the checkpoint or the commit.
    #[serde(default)]
    pub allow_self: bool,
    /// An approval counts for this long, such as `72h`. For ever when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expire_after: Option<Duration>,
    /// Commands that must have succeeded on the same tree.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub checks: Vec<Check>,
    /// Branches that commits may go to, `*` for any part of a name without `/`, and `**` for any. All when absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub branches: Vec<String>,
    /// Whether commits that were made with git inside a session may be kept (`history: Keep`). Reviewers are shown what changed from
    /// the beginning to the end: contents that came and went in between are pushed without having been looked at.
    #[serde(default)]
    pub keep_history: bool,
    /// Places that commits may export to. None when absent: then no export is taken.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub exports: Vec<ExportPlace>,
}

impl Default for ReviewRule {
    fn default() -> Self {
        Self {
            required: default_required(),
            groups: Vec::new(),
            allow_self: false,
            expire_after: None,
            checks: Vec::new(),
            branches: Vec::new(),
            keep_history: false,
            exports: Vec::new(),
        }
    }
}

fn default_required() -> u32 {
    1
}

/// A place that commits may export to, each into a folder of its own: exactly one of `s3` and `claim`. Who asks for a commit
/// says only the name, so that what is reached by it, and with which Secret, is for those to say who keep the source.
#[derive(KubeSchema, Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[x_kube(validation = ("has(self.s3) != has(self.claim)", "say exactly one of s3 and claim"))]
#[schemars(extend("oneOf" = [{"required": ["s3"]}, {"required": ["claim"]}]))]
pub struct ExportPlace {
    /// What commits call it.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// A folder of an S3 bucket: an object for each file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3Source>,
    /// A directory in an existing claim of the source's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<ClaimPlace>,
}

/// A directory in an existing claim of the source's namespace.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
pub struct ClaimPlace {
    /// The claim's name.
    #[schemars(length(min = 1))]
    pub name: String,
    /// The directory in the volume, made when it is not there; its root when absent. Relative, without `..`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub path: Option<String>,
}

/// A group of which so many members must approve.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, JsonSchema)]
pub struct GroupRule {
    /// The group, as the API server's authenticator names it.
    #[schemars(length(min = 1))]
    pub name: String,
    /// How many of its members.
    #[serde(default = "default_required")]
    #[schemars(range(min = 1, max = 100))]
    pub required: u32,
}

/// A command that must have succeeded on the tree of the commit: an AetherCommand of the commit's namespace with this name, or
/// with it in label `aether.dev/check`, that ran with `checkpointAfter` and left exactly this tree.
#[derive(KubeSchema, Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.command) || !(has(self.image) || has(self.workingDir) || has(self.env))", "image, workingDir and env belong to a command: say command too"))]
pub struct Check {
    /// The name.
    #[schemars(length(min = 1))]
    pub name: String,
    /// What the command must have been, so that nobody passes by one that does nothing. Then image, directory and environment
    /// must be those that are said here too. Anything when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    /// The image it must have named; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// The directory it must have run in; the session's root when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// The environment it must have had; none when absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<Variable>,
}
