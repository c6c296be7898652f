//! The API server's audit log: who wrote what, counted.

use std::{
    fs::File,
    io::{BufRead, BufReader, Seek, SeekFrom},
    path::PathBuf,
};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::paths::Paths;

/// A place in the log; what is written after it is counted.
#[derive(Debug, Clone)]
pub struct Mark {
    file: PathBuf,
    offset: u64,
}

/// One answered write request.
#[derive(Debug, Clone)]
pub struct Write {
    /// Who: `system:serviceaccount:aether-system:aether-operator`, `system:node:node-1`, ….
    pub user: String,
    /// The client's own name for itself.
    pub agent: String,
    /// `create`, `update`, `patch`, `delete`, `deletecollection`.
    pub verb: String,
    /// The kind's plural, with the subresource: `pods/status`.
    pub resource: String,
    /// Empty for what belongs to no namespace.
    pub namespace: String,
    /// Empty for a create with a generated name.
    pub name: String,
    /// The HTTP status it was answered with.
    pub code: u16,
}

impl Write {
    /// Whether it changed something.
    pub fn succeeded(&self) -> bool {
        (200..300).contains(&self.code)
    }

    /// Whether the user is a service account of a namespace.
    pub fn of_service_account_in(&self, namespace: &str) -> bool {
        self.user
            .strip_prefix("system:serviceaccount:")
            .and_then(|user| user.split_once(':'))
            .is_some_and(|(of, _)| of == namespace)
    }
}

impl Mark {
    /// The end of the log as it is now.
    pub fn now(paths: &Paths) -> Result<Self> {
        let file = paths.audit_log();
        let offset = file.metadata().with_context(|| format!("cannot read {}", file.display()))?.len();
        Ok(Self { file, offset })
    }

    /// The writes since. The server logs a request when its answer has been sent, so the very last may come a moment later.
    pub fn writes(&self) -> Result<Vec<Write>> {
        let mut file = File::open(&self.file)?;
        file.seek(SeekFrom::Start(self.offset))?;
        let mut writes = Vec::new();
        for line in BufReader::new(file).lines() {
            // The last line may be half written.
            let Ok(event) = serde_json::from_str::<Event>(&line?) else { continue };
            let object = event.object.unwrap_or_default();
            writes.push(Write {
                user: event.user.username,
                agent: event.user_agent,
                verb: event.verb,
                resource: if object.subresource.is_empty() {
                    object.resource
                } else {
                    format!("{}/{}", object.resource, object.subresource)
                },
                namespace: object.namespace,
                name: object.name,
                code: event.response.map_or(0, |response| response.code),
            });
        }
        Ok(writes)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Event {
    verb: String,
    user: User,
    #[serde(default)]
    user_agent: String,
    #[serde(rename = "objectRef")]
    object: Option<Object>,
    #[serde(rename = "responseStatus")]
    response: Option<Response>,
}

#[derive(Deserialize)]
struct User {
    #[serde(default)]
    username: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Object {
    resource: String,
    subresource: String,
    namespace: String,
    name: String,
}

#[derive(Deserialize)]
struct Response {
    #[serde(default)]
    code: u16,
}
