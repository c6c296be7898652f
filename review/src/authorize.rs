//! Whether a user may read something: the cluster's RBAC decides, by a SubjectAccessReview.

use aether_api::names;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::api::{Api, PostParams};

use crate::front_proxy::Identity;
use crate::status::ApiError;

/// The plural of AetherCheckpoint.
pub const CHECKPOINTS: &str = "aethercheckpoints";
/// The plural of AetherCommit.
pub const COMMITS: &str = "aethercommits";
/// The plural of AetherSession.
pub const SESSIONS: &str = "aethersessions";
/// The plural of AetherNote.
pub const NOTES: &str = "aethernotes";

/// Fails unless the user may `get` the object of this kind and name: who may see a checkpoint or a commit may see what is in it.
///
/// # Errors
/// Forbidden, or that the API server did not answer.
pub async fn may_read(
    client: &kube::Client,
    identity: &Identity,
    plural: &'static str,
    namespace: &str,
    name: &str,
) -> Result<(), ApiError> {
    // An empty name would ask for all of them, which is another question.
    if namespace.is_empty() || name.is_empty() {
        return Err(ApiError::bad_request("an object has a namespace and a name"));
    }
    ask(client, identity, "get", plural, namespace, Some(name)).await
}

/// Fails unless the user may `list` the objects of this kind in the namespace.
///
/// # Errors
/// Forbidden, or that the API server did not answer.
pub async fn may_list(
    client: &kube::Client,
    identity: &Identity,
    plural: &'static str,
    namespace: &str,
) -> Result<(), ApiError> {
    ask(client, identity, "list", plural, namespace, None).await
}

async fn ask(
    client: &kube::Client,
    identity: &Identity,
    verb: &str,
    plural: &'static str,
    namespace: &str,
    name: Option<&str>,
) -> Result<(), ApiError> {
    let question = SubjectAccessReviewSpec {
        user: Some(identity.user.clone()),
        uid: identity.uid.clone(),
        groups: Some(identity.groups.clone()),
        extra: (!identity.extra.is_empty()).then(|| identity.extra.clone()),
        resource_attributes: Some(ResourceAttributes {
            verb: Some(verb.into()),
            group: Some(names::GROUP.into()),
            version: Some(names::VERSION.into()),
            resource: Some(plural.into()),
            namespace: Some(namespace.into()),
            name: name.map(Into::into),
            ..Default::default()
        }),
        ..Default::default()
    };
    let object = name.map(|name| format!(" {name:?}")).unwrap_or_default();
    let review = SubjectAccessReview { spec: question, ..Default::default() };
    let answer = Api::all(client.clone()).create(&PostParams::default(), &review).await;
    let status = answer
        .map_err(|error| ApiError::unavailable(format!("cannot ask who may {verb} {plural}{object}: {error}")))?
        .status;
    match status {
        Some(status) if status.allowed => Ok(()),
        status => {
            let reason = status.and_then(|status| status.reason).filter(|reason| !reason.is_empty());
            Err(ApiError::forbidden(format!(
                "{plural}.{}{object} is forbidden: user {:?} cannot {verb} resource {plural:?} in API group {:?} in the namespace {namespace:?}{}",
                names::GROUP,
                identity.user,
                names::GROUP,
                reason.map(|reason| format!(": {reason}")).unwrap_or_default()
            )))
        }
    }
}
