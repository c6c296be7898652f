//! The one error type of the engine: names the action and the thing, once, and the way out where there is one.

use std::io;
use std::path::{Path, PathBuf};

/// Result of an engine operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the engine could not do something.
///
/// Callers map the variants to their own boundary: `NotFound`, `AlreadyExists`, `Busy`, `Unsupported`, `Invalid`,
/// `Full` and `Damaged` say what is the matter; `Io` and `Store` carry what the kernel or the store said.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused an action on a path.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was attempted, as a verb ("mount overlay at").
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The content-addressed store refused.
    #[error("{action}: {source}")]
    Store {
        /// What was attempted.
        action: String,
        /// What the store said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// There is no such thing on this node.
    #[error("{kind} {name} is not on this node")]
    NotFound {
        /// "session", "snapshot", "image".
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// The name is taken by something else.
    #[error("{kind} {name} exists already: {detail}")]
    AlreadyExists {
        /// "session", "snapshot", "mount".
        kind: &'static str,
        /// Its name.
        name: String,
        /// In what it differs from what was asked for.
        detail: String,
    },
    /// The thing is in use; the same call works once it no longer is.
    #[error("{what} is in use: {by}")]
    Busy {
        /// What is in use.
        what: String,
        /// By whom, as far as it can be known.
        by: String,
    },
    /// The node cannot do this.
    #[error("{what} is not possible on this node: {remedy}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// The reason, and what to change.
        remedy: String,
    },
    /// The caller asked for something that makes no sense.
    #[error("{what}: {reason}")]
    Invalid {
        /// The offending value, named.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no room left; what there was is kept.
    #[error("{what} is full: {remedy}")]
    Full {
        /// What has a limit.
        what: String,
        /// By how much, and what helps.
        remedy: String,
    },
    /// Something on this node is not what it must be.
    #[error("{what} is damaged: {detail}")]
    Damaged {
        /// What.
        what: String,
        /// How, and what to do.
        detail: String,
    },
}

impl Error {
    /// An `Io` error.
    pub fn io(action: &'static str, path: impl AsRef<Path>, source: impl Into<io::Error>) -> Self {
        Self::Io { action, path: path.as_ref().to_owned(), source: source.into() }
    }

    /// A `Store` error.
    pub fn store(action: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Store { action: action.into(), source: source.into() }
    }

    /// What the kernel said, if it was the kernel.
    pub fn io_kind(&self) -> Option<io::ErrorKind> {
        match self {
            Self::Io { source, .. } => Some(source.kind()),
            _ => None,
        }
    }

    /// The thing does not exist, whether a record or a path.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. }) || self.io_kind() == Some(io::ErrorKind::NotFound)
    }
}

/// Adds the action and the path to a system call's error.
pub trait Context<T> {
    /// `rename(..).at("rename", path)?`
    fn at(self, action: &'static str, path: impl AsRef<Path>) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn at(self, action: &'static str, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|source| Error::io(action, path, source))
    }
}
