//! Who the API server takes the caller for, in the shape of `authentication.k8s.io` SelfSubjectReview, which API servers before
//! 1.28 do not have.

use axum::http::StatusCode;
use axum::{Extension, Json};
use serde_json::{Value, json};

use crate::discovery;
use crate::front_proxy::Identity;

/// Needs no right but to ask, and says nothing that is not about the caller.
pub(crate) async fn answer(Extension(identity): Extension<Identity>) -> (StatusCode, Json<Value>) {
    let Identity { user, uid, groups, extra } = identity;
    let info = json!({"username": user, "uid": uid, "groups": groups, "extra": extra});
    let review = json!({
        "kind": "SelfSubjectReview", "apiVersion": discovery::version(), "metadata": {}, "status": {"userInfo": info},
    });
    (StatusCode::CREATED, Json(review))
}
