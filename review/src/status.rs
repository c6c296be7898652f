//! Errors as Kubernetes says them: a `Status` in JSON, which kubectl and every client turn into a sentence.

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::json;

/// An error with its HTTP code and Kubernetes' one-word reason.
#[derive(Debug)]
pub struct ApiError {
    code: StatusCode,
    reason: &'static str,
    message: String,
    /// The plural of a kind, and the name of one.
    object: Option<(&'static str, String)>,
}

impl ApiError {
    fn new(code: StatusCode, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), object: None }
    }

    /// Nobody says who asks.
    pub fn unauthorized() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "Unauthorized", "only the API server may ask, on behalf of a user")
    }

    /// Whoever asks may not have it.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "Forbidden", message)
    }

    /// An object that is not there. Its name in the details tells clients that the API itself is.
    pub fn object_not_found(plural: &'static str, name: &str) -> Self {
        let message = format!("{plural}.aether.dev {name:?} not found");
        Self { object: Some((plural, name.into())), ..Self::new(StatusCode::NOT_FOUND, "NotFound", message) }
    }

    /// A file that is not in a checkpoint that is there.
    pub fn file_not_found(checkpoint: &str, path: &str) -> Self {
        let message = format!("checkpoint {checkpoint} has no file {path:?}");
        let object = Some(("aethercheckpoints", checkpoint.into()));
        Self { object, ..Self::new(StatusCode::NOT_FOUND, "NotFound", message) }
    }

    /// A path that is not served.
    pub fn no_such_path() -> Self {
        Self::new(StatusCode::NOT_FOUND, "NotFound", "the server could not find the requested resource")
    }

    /// The request itself is wrong.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequest", message)
    }

    /// The object is in a state in which it cannot be read.
    pub fn conflict(plural: &'static str, name: &str, message: impl Into<String>) -> Self {
        Self { object: Some((plural, name.into())), ..Self::new(StatusCode::CONFLICT, "Conflict", message) }
    }

    /// More than this program is willing to send.
    pub fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge", message)
    }

    /// Something that this program leans on does not answer.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", message)
    }

    /// Something is wrong that the user cannot mend.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", message)
    }

    /// The sentence.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The HTTP code.
    pub fn code(&self) -> StatusCode {
        self.code
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let details =
            self.object.map(|(plural, name)| json!({"name": name, "group": aether_api::names::GROUP, "kind": plural}));
        let body = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "details": details.unwrap_or_else(|| json!({})), "code": self.code.as_u16(),
        });
        (self.code, Json(body)).into_response()
    }
}
