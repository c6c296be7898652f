//! Whether somebody may do something with an AetherSource: the cluster's authorizers decide, by a SubjectAccessReview.

use aether_api::identity::Identity;
use aether_api::names;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::api::PostParams;
use kube::{Api, Client};

/// The verb that approves and rejects what leaves a source's sessions.
pub const APPROVE: &str = "approve";
/// The verb that takes back what others have said.
pub const WITHDRAW: &str = "withdraw";

/// Whether the user may do this to the source of this name.
///
/// # Errors
/// The API server did not answer.
pub async fn may(
    client: &Client,
    who: &Identity,
    verb: &str,
    namespace: &str,
    source: &str,
) -> Result<bool, kube::Error> {
    // An empty name asks about all sources, which is another question; and nobody has an empty name.
    if namespace.is_empty() || source.is_empty() || who.username.is_empty() {
        return Ok(false);
    }
    let spec = SubjectAccessReviewSpec {
        user: Some(who.username.clone()),
        uid: (!who.uid.is_empty()).then(|| who.uid.clone()),
        groups: Some(who.groups.clone()),
        extra: (!who.extra.is_empty()).then(|| who.extra.clone()),
        resource_attributes: Some(ResourceAttributes {
            verb: Some(verb.into()),
            group: Some(names::GROUP.into()),
            version: Some(names::VERSION.into()),
            resource: Some("aethersources".into()),
            namespace: Some(namespace.into()),
            name: Some(source.into()),
            ..ResourceAttributes::default()
        }),
        ..SubjectAccessReviewSpec::default()
    };
    let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
    let answer = Api::all(client.clone()).create(&PostParams::default(), &review).await?;
    Ok(answer.status.is_some_and(|status| status.allowed && status.denied != Some(true)))
}
