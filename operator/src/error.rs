//! The one error of reconcilers: a read or write of the Kubernetes API that failed, named once.

use kube::core::response::reason;

/// Result of a reconcile step.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a step of a reconciler did not come to its end. The next activation is the retry.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused, or did not answer.
    #[error("cannot {action} {what}: {}", said(source))]
    Kube {
        /// A verb: `read`, `create`, `delete`.
        action: &'static str,
        /// Kind, namespace and name.
        what: String,
        /// What the server or the connection said.
        #[source]
        source: Box<kube::Error>,
    },
    /// Nobody can be told yet whom to believe to be the store.
    #[error("the store's authority is not there yet: cannot read {file} (--store-ca): {source}")]
    Authority {
        /// The file.
        file: String,
        /// Why it cannot be read.
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    fn reason(&self) -> Option<&str> {
        let Self::Kube { source, .. } = self else { return None };
        match source.as_ref() {
            kube::Error::Api(status) => Some(&status.reason),
            _ => None,
        }
    }

    /// The object changed since it was read: reading it again is all there is to do.
    pub fn is_conflict(&self) -> bool {
        self.reason() == Some(reason::CONFLICT)
    }

    /// An object of that name exists already.
    pub fn is_already_exists(&self) -> bool {
        self.reason() == Some(reason::ALREADY_EXISTS)
    }

    /// The object does not exist.
    pub fn is_not_found(&self) -> bool {
        self.reason() == Some(reason::NOT_FOUND)
    }

    /// The API server has read the request and will not do it, so it has not been done.
    pub fn is_refused(&self) -> bool {
        let Self::Kube { source, .. } = self else { return false };
        matches!(source.as_ref(), kube::Error::Api(status) if (400..500).contains(&status.code) && ![408, 429].contains(&status.code))
    }

    /// The namespace is being deleted and takes no new objects: ours will be deleted too, and nothing is wrong.
    pub fn is_terminating_namespace(&self) -> bool {
        let Self::Kube { source, .. } = self else { return false };
        match source.as_ref() {
            kube::Error::Api(status) => {
                status.reason == reason::FORBIDDEN
                    && (status.message.contains("being terminated")
                        || status.details.as_ref().is_some_and(|details| {
                            details.causes.iter().any(|cause| cause.reason == "NamespaceTerminating")
                        }))
            }
            _ => false,
        }
    }
}

/// What went wrong, without the client's debugging output.
fn said(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}
