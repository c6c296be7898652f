//! Whether a node that holds a session still lives. The judge is the node's own Lease, which its kubelet renews.

use aether_api::AetherSession;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use kube::Client;

use crate::error::Result;
use crate::objects;

/// Where kubelets keep their Leases.
const LEASE_NAMESPACE: &str = "kube-node-lease";
/// How long a kubelet's Lease lasts when it does not say, in seconds: the kubelet's default.
const DEFAULT_LEASE_SECONDS: i32 = 40;

/// Why the node counts as lost; `None` while it lives.
pub async fn lost(client: &Client, name: &str) -> Result<Option<String>> {
    if objects::get::<Node>(&objects::cluster(client), name).await?.is_none() {
        return Ok(Some(format!("node {name} does not exist any more")));
    }
    let lease = objects::get::<Lease>(&objects::namespaced(client, LEASE_NAMESPACE), name).await?;
    Ok(lease
        .and_then(|lease| expired(&lease, jiff::Timestamp::now()))
        .map(|seconds| format!("node {name} has not been heard of for {seconds} s")))
}

/// What is in the way while a lost node holds a session, and what a person can do about it.
pub fn way_out(why: &str, session: &str) -> String {
    format!(
        "AetherSession {session} is held by a node that is lost ({why}): mount the session in a pod to take it over"
    )
}

/// Why the session's holder counts as lost; `None` while it lives, and when nobody holds the session.
pub async fn lost_holder(client: &Client, session: Option<&AetherSession>) -> Result<Option<String>> {
    match session.and_then(AetherSession::holder) {
        Some(node) => lost(client, node).await,
        None => Ok(None),
    }
}

/// For how many seconds a Lease has not been renewed, if that is longer than it lasts. A Lease without a time (a
/// node that has just joined) has not expired.
fn expired(lease: &Lease, now: jiff::Timestamp) -> Option<i64> {
    let spec = lease.spec.as_ref()?;
    let silent = now.duration_since(spec.renew_time.as_ref()?.0).as_secs();
    (silent > i64::from(spec.lease_duration_seconds.unwrap_or(DEFAULT_LEASE_SECONDS))).then_some(silent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::coordination::v1::LeaseSpec;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;

    #[test]
    fn a_lease_expires_after_its_own_duration() {
        let now = jiff::Timestamp::from_second(1_000).unwrap();
        let lease = |renewed: i64| Lease {
            spec: Some(LeaseSpec {
                renew_time: Some(MicroTime(jiff::Timestamp::from_second(renewed).unwrap())),
                lease_duration_seconds: Some(40),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(expired(&lease(970), now), None);
        assert_eq!(expired(&lease(950), now), Some(50));
        assert_eq!(expired(&Lease::default(), now), None);
    }
}
