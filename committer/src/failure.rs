//! Why nothing was carried out, and whether the same may succeed later.

use std::fmt;

use aether_cas::StoreError;
use serde::Serialize;

/// Why, in one word. Displayed by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Reason {
    /// The URL leads nowhere.
    RepositoryNotFound,
    /// The repository refused the credentials, or wants some.
    AuthenticationFailed,
    /// The Secret lacks something or cannot be read as what it should be.
    SecretInvalid,
    /// What was asked for makes no sense.
    Invalid,
    /// The repository does not have the commit that the session started from.
    BaseNotFound,
    /// The branch is not where the session started from.
    BranchMoved,
    /// What the session changed was changed on the branch too.
    Conflict,
    /// The branch has all that the session changed.
    NothingToCommit,
    /// The server takes the push of nobody, or not this one: a hook, a protected branch.
    PushRejected,
    /// There is something else where the copy is to be.
    TargetExists,
    /// The bucket does not exist, or its service cannot be reached.
    BucketNotFound,
    /// The store does not have all of the tree.
    TreeIncomplete,
    /// Everything else.
    CommitFailed,
}

/// Whether the same may succeed later without anybody changing anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Kind {
    /// It will not.
    Permanent,
    /// It may.
    Temporary,
}

/// Why nothing was carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// For programs.
    pub reason: Reason,
    /// For the decision to try again.
    pub kind: Kind,
    /// For people.
    pub message: String,
    /// Where the branch is, when that is what is wrong.
    pub tip: Option<String>,
    /// Paths that conflict.
    pub conflicts: Vec<String>,
}

impl Failure {
    /// A failure of a reason's usual kind.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        let kind = match reason {
            // A server that is away looks so too.
            Reason::RepositoryNotFound | Reason::BucketNotFound | Reason::CommitFailed => Kind::Temporary,
            _ => Kind::Permanent,
        };
        Self { reason, kind, message: message.into(), tip: None, conflicts: Vec::new() }
    }

    /// A failure that has no reason of its own.
    pub fn other(action: &str, error: impl fmt::Display) -> Self {
        Self::new(Reason::CommitFailed, format!("cannot {action}: {error}"))
    }

    /// With the commit at which the branch is.
    pub(crate) fn at(self, tip: Option<&str>) -> Self {
        Self { tip: tip.map(Into::into), ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.reason, self.message)
    }
}

impl From<aether_git::Failure> for Failure {
    fn from(failure: aether_git::Failure) -> Self {
        use aether_git::Reason as Git;
        let reason = match failure.reason {
            Git::RepositoryNotFound => Reason::RepositoryNotFound,
            Git::AuthenticationFailed => Reason::AuthenticationFailed,
            Git::SecretInvalid => Reason::SecretInvalid,
            Git::Invalid => Reason::Invalid,
            Git::RefNotFound | Git::Failed => Reason::CommitFailed,
        };
        Self::new(reason, failure.message)
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let reason = if error.is_missing() { Reason::TreeIncomplete } else { Reason::CommitFailed };
        Self::new(reason, format!("cannot read the tree: {error}"))
    }
}
