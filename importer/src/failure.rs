//! Why an import failed, in the words of a source's conditions.

use std::fmt;

/// A reason of the `Importing` condition that an importer may give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The URL leads nowhere.
    RepositoryNotFound,
    /// The repository is there, the ref is not.
    RefNotFound,
    /// The bucket does not exist, or its service cannot be reached.
    BucketNotFound,
    /// The repository or bucket refused the credentials, or wants some.
    AuthenticationFailed,
    /// The Secret lacks something or cannot be read as what it should be.
    SecretInvalid,
    /// What was asked for makes no sense.
    Invalid,
    /// Everything else.
    ImportFailed,
}

impl Reason {
    /// Its name in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::RepositoryNotFound => "RepositoryNotFound",
            Self::RefNotFound => "RefNotFound",
            Self::BucketNotFound => "BucketNotFound",
            Self::AuthenticationFailed => "AuthenticationFailed",
            Self::SecretInvalid => "SecretInvalid",
            Self::Invalid => "Invalid",
            Self::ImportFailed => "ImportFailed",
        }
    }
}

/// Why an import failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// For programs.
    pub reason: Reason,
    /// For people.
    pub message: String,
}

impl Failure {
    /// A failure with a reason.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }

    /// A failure that has no reason of its own.
    pub fn other(action: &str, error: impl fmt::Display) -> Self {
        Self::new(Reason::ImportFailed, format!("cannot {action}: {error}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason.name(), self.message)
    }
}

impl From<aether_git::Failure> for Failure {
    fn from(failure: aether_git::Failure) -> Self {
        use aether_git::Reason as Git;
        let reason = match failure.reason {
            Git::RepositoryNotFound => Reason::RepositoryNotFound,
            Git::RefNotFound => Reason::RefNotFound,
            Git::AuthenticationFailed => Reason::AuthenticationFailed,
            Git::SecretInvalid => Reason::SecretInvalid,
            Git::Invalid => Reason::Invalid,
            Git::Failed => Reason::ImportFailed,
        };
        Self { reason, message: failure.message }
    }
}
