//! Leader election against an API server in memory: one leads, the other waits, and takes over.

use std::time::Duration;

use aether_operator::leader::{Candidate, LEASE, Times};
use aether_testkit::ApiServer;
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use tokio::time::timeout;

/// A Lease counts in whole seconds; the rest is as short as a test wants it.
const TIMES: Times =
    Times { lease: Duration::from_secs(1), deadline: Duration::from_millis(700), retry: Duration::from_millis(50) };
const LONG: Duration = Duration::from_secs(30);

fn candidate(server: &ApiServer, identity: &str) -> Candidate {
    Candidate::new(Api::namespaced(server.client(), "aether-system"), identity.into(), TIMES)
}

fn holder(server: &ApiServer) -> Option<String> {
    server.get::<Lease>("aether-system", LEASE)?.spec?.holder_identity
}

#[tokio::test]
async fn the_second_waits_until_the_first_gives_back() {
    let server = ApiServer::new();
    let (mut first, mut second) = (candidate(&server, "a"), candidate(&server, "b"));
    timeout(LONG, first.acquire()).await.unwrap();
    assert_eq!(holder(&server).as_deref(), Some("a"));
    tokio::select! {
        lost = first.hold() => panic!("{lost:?}"),
        () = second.acquire() => panic!("two lead"),
        () = tokio::time::sleep(TIMES.lease * 2) => {}
    }
    first.release().await.unwrap();
    assert_eq!(holder(&server), None);
    timeout(LONG, second.acquire()).await.unwrap();
    assert_eq!(holder(&server).as_deref(), Some("b"));
    let error = timeout(LONG, first.hold()).await.unwrap().unwrap_err().to_string();
    assert!(error.contains("taken by b"), "{error}");
}

#[tokio::test]
async fn a_lease_that_nobody_renews_is_taken() {
    let server = ApiServer::new();
    timeout(LONG, candidate(&server, "dead").acquire()).await.unwrap();
    let mut heir = candidate(&server, "heir");
    timeout(LONG, heir.acquire()).await.unwrap();
    assert_eq!(holder(&server).as_deref(), Some("heir"));
    let transitions = server.get::<Lease>("aether-system", LEASE).unwrap().spec.unwrap().lease_transitions;
    assert_eq!(transitions, Some(1));
}

#[tokio::test]
async fn a_restarted_replica_goes_on_at_once() {
    let server = ApiServer::new();
    timeout(LONG, candidate(&server, "a").acquire()).await.unwrap();
    let mut again = Candidate::new(
        Api::namespaced(server.client(), "aether-system"),
        "a".into(),
        Times { lease: LONG * 100, ..TIMES },
    );
    timeout(LONG, again.acquire()).await.unwrap();
}
