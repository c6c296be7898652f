//! Whether a node that holds a session still lives. The judge is the node's own Lease, which its kubelet renews.
//!
//! A Lease counts as expired when it stayed the same for as long as it lasts by this process' own clock. The times in it
//! say nothing: after an outage of the API server those of all nodes are old, and clocks differ.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use aether_api::AetherSession;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::Client;

use crate::error::Result;
use crate::objects;

/// Where kubelets keep their Leases.
const LEASE_NAMESPACE: &str = "kube-node-lease";
/// How long a kubelet's Lease lasts when it does not say: the kubelet's default.
const DEFAULT_LEASE: Duration = Duration::from_secs(40);

/// What was seen of the nodes' Leases.
pub struct Nodes {
    client: Client,
    seen: Mutex<HashMap<String, Seen>>,
}

/// A Lease, and since when it has been like this.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    renewed: MicroTime,
    since: Instant,
}

impl Nodes {
    /// Has seen nothing yet.
    pub fn new(client: Client) -> Self {
        Self { client, seen: Mutex::default() }
    }

    /// Why the node counts as lost; `None` while it lives, and until it has been silent for long enough before our eyes.
    ///
    /// # Errors
    /// The read that failed.
    pub async fn lost(&self, name: &str) -> Result<Option<String>> {
        if objects::get::<Node>(&objects::cluster(&self.client), name).await?.is_none() {
            self.seen.lock().expect("no holder panics").remove(name);
            return Ok(Some(format!("node {name} does not exist any more")));
        }
        let lease = objects::get::<Lease>(&objects::namespaced(&self.client, LEASE_NAMESPACE), name).await?;
        let Some(lease) = lease else { return Ok(None) };
        let mut all = self.seen.lock().expect("no holder panics");
        let (seen, silent) = look(all.remove(name), &lease, Instant::now());
        all.extend(seen.map(|seen| (name.to_owned(), seen)));
        Ok(silent.map(|silent| format!("node {name} has not been heard of for {} s", silent.as_secs())))
    }

    /// Why the session's holder counts as lost; `None` while it lives, and when nobody holds the session.
    ///
    /// # Errors
    /// The read that failed.
    pub async fn lost_holder(&self, session: Option<&AetherSession>) -> Result<Option<String>> {
        match session.and_then(AetherSession::holder) {
            Some(node) => self.lost(node).await,
            None => Ok(None),
        }
    }
}

/// What is in the way while a lost node holds a session, and what a person can do about it.
pub fn way_out(why: &str, session: &str) -> String {
    format!(
        "AetherSession {session} is held by a node that is lost ({why}): mount the session in a pod to take it over"
    )
}

/// What is to be remembered of a Lease, and for how long it has not been renewed, if that is longer than it lasts. One
/// without a time (of a node that has just joined) never expires.
fn look(before: Option<Seen>, lease: &Lease, now: Instant) -> (Option<Seen>, Option<Duration>) {
    let Some(spec) = &lease.spec else { return (None, None) };
    let Some(renewed) = spec.renew_time.clone() else { return (None, None) };
    let seen = before.filter(|before| before.renewed == renewed).unwrap_or(Seen { renewed, since: now });
    let lasts = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    let silent = now.duration_since(seen.since);
    let expired = silent > lasts.map_or(DEFAULT_LEASE, Duration::from_secs);
    (Some(seen), expired.then_some(silent))
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::coordination::v1::LeaseSpec;

    #[test]
    fn a_lease_expires_when_it_was_seen_unchanged_for_as_long_as_it_lasts() {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let lease = |renewed: i64| Lease {
            spec: Some(LeaseSpec {
                renew_time: Some(MicroTime(jiff::Timestamp::from_second(renewed).unwrap())),
                lease_duration_seconds: Some(40),
                ..Default::default()
            }),
            ..Default::default()
        };
        // However old it is: the API server may have been away.
        let (seen, silent) = look(None, &lease(0), at(0));
        assert_eq!(silent, None);
        let (seen, silent) = look(seen, &lease(0), at(40));
        assert_eq!(silent, None);
        let (again, silent) = look(seen.clone(), &lease(0), at(50));
        assert_eq!((again.as_ref(), silent), (seen.as_ref(), Some(Duration::from_secs(50))));
        let (seen, silent) = look(again, &lease(1), at(50));
        assert_eq!(silent, None, "it was renewed");
        assert_eq!(look(seen, &lease(1), at(100)).1, Some(Duration::from_secs(50)));
        assert_eq!(look(None, &Lease::default(), at(0)), (None, None));
    }
}
