//! The one error type of the driver, and the one map from it to gRPC codes.

use aether_cas::StoreError;
use tonic::Status;

/// Result of the driver's operations.
pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

/// Why the driver could not do something. The text names the object and, where there is one, the way out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The call makes no sense as it is.
    #[error("{0}")]
    Invalid(String),
    /// What the call names does not exist.
    #[error("{0}")]
    NotFound(String),
    /// A rule forbids it.
    #[error("{0}")]
    Denied(String),
    /// It cannot be done yet; the same call may succeed later.
    #[error("{0}")]
    NotYet(String),
    /// Something else has the name.
    #[error("{0}")]
    Taken(String),
    /// It was begun and is not done in the caller's time; the same call goes on waiting.
    #[error("{0}")]
    TimedOut(String),
    /// Another call for the same thing is under way, or the caller went away.
    #[error("{0}")]
    Aborted(String),
    /// The Kubernetes API refused.
    #[error("cannot {action}: {source}")]
    Kubernetes {
        /// What was attempted, with the object's name.
        action: String,
        #[source]
        source: Box<kube::Error>,
    },
    /// The engine could not.
    #[error(transparent)]
    Engine(#[from] aether_engine::Error),
    /// A store could not.
    #[error("{}", chain(.0))]
    Store(#[from] StoreError),
    /// The node's own files.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which path.
        path: String,
        #[source]
        source: std::io::Error,
    },
    /// A task of ours ended in a panic.
    #[error("{0} ended unexpectedly")]
    Lost(&'static str),
}

impl Failure {
    /// For `map_err` on calls to the API server: `.map_err(Failure::api(|| format!("read session {name}")))`.
    pub(crate) fn api(action: impl FnOnce() -> String) -> impl FnOnce(kube::Error) -> Self {
        move |source| Self::Kubernetes { action: action(), source: Box::new(source) }
    }

    /// For `map_err` on file operations.
    pub(crate) fn io(action: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.display().to_string();
        move |source| Self::Io { action, path, source }
    }

    /// The API server says that the object does not exist.
    pub(crate) fn is_gone(&self) -> bool {
        match self {
            Self::NotFound(_) => true,
            Self::Kubernetes { source, .. } => status_code(source) == Some(404),
            _ => false,
        }
    }
}

/// The HTTP code with which the API server refused.
pub(crate) fn status_code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(response) => Some(response.code),
        _ => None,
    }
}

/// An error with its causes, each once.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        use aether_engine::Error as Engine;
        let text = chain(&failure);
        match failure {
            Failure::Invalid(_) => Self::invalid_argument(text),
            Failure::NotFound(_) => Self::not_found(text),
            Failure::Denied(_) => Self::permission_denied(text),
            Failure::NotYet(_) => Self::failed_precondition(text),
            Failure::Taken(_) => Self::already_exists(text),
            Failure::TimedOut(_) => Self::deadline_exceeded(text),
            Failure::Aborted(_) => Self::aborted(text),
            Failure::Kubernetes { source, .. } => match status_code(&source) {
                Some(404) => Self::not_found(text),
                Some(401 | 403) => Self::permission_denied(text),
                Some(409) => Self::aborted(text),
                Some(400 | 422) => Self::invalid_argument(text),
                _ => Self::unavailable(text),
            },
            Failure::Engine(error) => match error {
                Engine::NotFound { .. } => Self::not_found(text),
                Engine::AlreadyExists { .. } => Self::already_exists(text),
                Engine::Busy { .. } => Self::failed_precondition(text),
                Engine::Unsupported { .. } => Self::unimplemented(text),
                Engine::Invalid { .. } => Self::invalid_argument(text),
                Engine::Full { .. } => Self::resource_exhausted(text),
                Engine::Damaged { .. } => Self::data_loss(text),
                Engine::Store { .. } => Self::unavailable(text),
                Engine::Io { .. } => Self::internal(text),
            },
            Failure::Store(error) if error.is_transient() => Self::unavailable(text),
            Failure::Store(_) | Failure::Io { .. } | Failure::Lost(_) => Self::internal(text),
        }
    }
}
