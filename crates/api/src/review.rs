//! The review rule of a source: what must be so before something leaves by an AetherCommit.

use kube::KubeSchema;
use kube::core::Duration;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::command::Variable;

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
        }
    }
}

fn default_required() -> u32 {
    1
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
