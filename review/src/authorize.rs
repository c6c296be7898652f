//! Whether a user may read a checkpoint: the cluster's RBAC decides, by a SubjectAccessReview.

use aether_api::names;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::api::{Api, PostParams};

use crate::front_proxy::Identity;
use crate::status::ApiError;

/// Fails unless the user may `get` the AetherCheckpoint of this name: who may see a checkpoint may see what is in it.
///
/// # Errors
/// Forbidden, or that the API server did not answer.
pub async fn may_read(
    client: &kube::Client,
    identity: &Identity,
    namespace: &str,
    checkpoint: &str,
) -> Result<(), ApiError> {
    // An empty name would ask for all checkpoints, which is another question.
    if namespace.is_empty() || checkpoint.is_empty() {
        return Err(ApiError::bad_request("a checkpoint has a namespace and a name"));
    }
    let review = SubjectAccessReview { spec: question(identity, namespace, checkpoint), ..Default::default() };
    let answer = Api::all(client.clone()).create(&PostParams::default(), &review).await;
    let status = answer
        .map_err(|error| ApiError::unavailable(format!("cannot ask who may read checkpoint {checkpoint}: {error}")))?
        .status;
    match status {
        Some(status) if status.allowed => Ok(()),
        status => {
            let reason = status.and_then(|status| status.reason).filter(|reason| !reason.is_empty());
            Err(ApiError::forbidden(format!(
                "aethercheckpoints.{} {checkpoint:?} is forbidden: user {:?} cannot get resource \"aethercheckpoints\" in API group {:?} in the namespace {namespace:?}{}",
                names::GROUP,
                identity.user,
                names::GROUP,
                reason.map(|reason| format!(": {reason}")).unwrap_or_default()
            )))
        }
    }
}

fn question(identity: &Identity, namespace: &str, checkpoint: &str) -> SubjectAccessReviewSpec {
    SubjectAccessReviewSpec {
        user: Some(identity.user.clone()),
        uid: identity.uid.clone(),
        groups: Some(identity.groups.clone()),
        extra: (!identity.extra.is_empty()).then(|| identity.extra.clone()),
        resource_attributes: Some(ResourceAttributes {
            verb: Some("get".into()),
            group: Some(names::GROUP.into()),
            version: Some(names::VERSION.into()),
            resource: Some("aethercheckpoints".into()),
            namespace: Some(namespace.into()),
            name: Some(checkpoint.into()),
            ..Default::default()
        }),
        ..Default::default()
    }
}
