//! AdmissionReview, of admission.k8s.io/v1, as far as it is used here.

use aether_api::identity::Identity;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// What the API server asks.
#[derive(Debug, Deserialize)]
pub struct Question {
    /// The request.
    pub request: Request,
}

/// A request that somebody made of the API server.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Request {
    /// Names the question.
    pub uid: String,
    /// The kind of the object.
    pub kind: Kind,
    /// `CREATE`, `UPDATE` or `DELETE`.
    pub operation: String,
    /// Whether nothing is to come of it.
    pub dry_run: bool,
    /// The object's namespace.
    pub namespace: String,
    /// Who asked, as the API server had authenticated them.
    pub user_info: Identity,
    /// The object as it would be stored.
    pub object: Value,
    /// The object as it is.
    pub old_object: Value,
}

/// A kind.
#[derive(Debug, Default, Deserialize)]
pub struct Kind {
    /// Its name.
    pub kind: String,
}

/// A change of the object, of JSON Patch (RFC 6902). `add` puts a member in place of one that is there.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    op: &'static str,
    path: String,
    value: Value,
}

impl Change {
    /// Sets the member that this pointer (RFC 6901) names.
    pub fn set(path: impl Into<String>, value: impl Serialize) -> Self {
        Self { op: "add", path: path.into(), value: serde_json::to_value(value).expect("string keys only") }
    }

    /// Which member it changes.
    pub fn path(&self) -> &str {
        &self.path
    }
}

/// What is answered: what to change, or why not.
pub type Answer = Result<Vec<Change>, String>;

/// The answer to the question of this uid.
pub fn response(uid: &str, answer: &Answer) -> Value {
    let response = match answer {
        Ok(changes) if changes.is_empty() => json!({"uid": uid, "allowed": true}),
        Ok(changes) => {
            let patch = serde_json::to_vec(changes).expect("string keys only");
            json!({"uid": uid, "allowed": true, "patchType": "JSONPatch", "patch": BASE64_STANDARD.encode(patch)})
        }
        Err(message) => {
            let status = json!({"status": "Failure", "reason": "Forbidden", "code": 403, "message": message});
            json!({"uid": uid, "allowed": false, "status": status})
        }
    };
    json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response})
}
