//! Who may talk to the store: a node behind TLS and tokens, an API server that vouches for some, and callers of all kinds.

#[path = "../common/mod.rs"]
mod common;
mod world;

use std::time::Duration;

use aether_cas::{Blob, RemoteStore, Store, StoreError};
use aether_proto::store::v1::{
    FsckRequest, GetIntegrityRequest, GetStatisticsRequest, ListRootsRequest, PinRootRequest, Root, UnpinRootsRequest,
    store_admin_client::StoreAdminClient,
};
use aether_testkit::Fate;
use bazel_remote_apis::build::bazel::remote::execution::v2::{
    GetCapabilitiesRequest, capabilities_client::CapabilitiesClient,
};
use bytes::Bytes;
use tonic::{Code, Status};

use crate::world::{DRIVER, IMPORTER, OPERATOR, World, token, token_for};

/// What the store says to a call that needs no permission.
async fn greet(world: &World, token: Option<&str>) -> Result<(), Status> {
    let mut client = CapabilitiesClient::new(world.connection(token));
    client.get_capabilities(GetCapabilitiesRequest::default()).await.map(drop)
}

fn refused(result: Result<(), Status>, code: Code, words: &[&str]) {
    let status = result.expect_err("the call must be refused");
    assert_eq!(status.code(), code, "{status}");
    for word in words {
        assert!(status.message().contains(word), "{word}: {status}");
    }
}

/// The code and the message of an error of the store's client.
fn said<T>(result: Result<T, StoreError>) -> (Code, String) {
    match result.err().expect("the call must fail") {
        StoreError::Remote { code, message, .. } => (code, message),
        other => panic!("{other}"),
    }
}

fn blob(text: &str) -> (Blob, Bytes) {
    let data = Bytes::copy_from_slice(text.as_bytes());
    (Blob::of(&data), data)
}

#[tokio::test]
async fn who_does_not_say_who_he_is_is_refused_and_told_why() {
    let world = World::start().await;
    refused(greet(&world, None).await, Code::Unauthenticated, &["shows no token", "--store-token"]);
    for (bad, words) in [
        ("garbage".to_owned(), &["not a token"][..]),
        (token_for(&["aether-store"], -60), &["expired 6"]),
        (token_for(&["https://kubernetes.default.svc"], 3600), &["kubernetes.default.svc", "aether-store"]),
    ] {
        refused(greet(&world, Some(&bad)).await, Code::Unauthenticated, words);
    }
    assert_eq!(world.api.take_writes().len(), 0, "none of them is worth a question");

    // Looks right, and nobody vouches for it.
    let forged = token(1);
    refused(greet(&world, Some(&forged)).await, Code::Unauthenticated, &["invalid bearer token"]);
    refused(greet(&world, Some(&forged)).await, Code::Unauthenticated, &["invalid bearer token"]);
    assert_eq!(world.api.take_writes().len(), 1, "the second refusal is remembered");

    // An API server that knows nothing of audiences, and a user that is no service account.
    world.api.know_token(&token(2), DRIVER, &[]);
    refused(greet(&world, Some(&token(2))).await, Code::Unauthenticated, &["for audience aether-store"]);
    world.api.know_token(&token(3), "alice", &["aether-store"]);
    refused(greet(&world, Some(&token(3))).await, Code::Unauthenticated, &["alice"]);
    assert_eq!(world.refused("unauthenticated"), 8);
    world.stop().await;
}

#[tokio::test]
async fn an_account_may_do_what_it_was_granted_and_nothing_else() {
    let world = World::start().await;
    let (content, data) = blob("a content that somebody else knows the digest of");
    let large = Bytes::from(vec![7; 5 << 20]);
    let big = Blob::of(&large);
    let driver = world.store(&world.account(DRIVER));
    driver.write_batch(vec![(content, data.clone()), (big, large.clone())]).await.unwrap();
    assert_eq!(driver.read(content).await.unwrap(), data);
    assert_eq!(driver.read(big).await.unwrap(), large);

    // An import brings what is missing, and reads nothing, not even what it has brought itself.
    let importer = world.store(&world.account(IMPORTER));
    let (own, own_data) = blob("from an import");
    assert_eq!(importer.find_missing(&[content, own]).await.unwrap(), [own]);
    importer.write_batch(vec![(own, own_data)]).await.unwrap();
    for stolen in [content, own, big] {
        let (code, message) = said(importer.read(stolen).await);
        assert_eq!(code, Code::PermissionDenied);
        assert!(message.contains(IMPORTER) && message.contains("permission read"), "{message}");
    }
    let (code, message) = said(importer.read_tree(content).await);
    assert!(code == Code::PermissionDenied && message.contains("GetTree"), "{message}");

    // An agent's pod: its account is good, and on no list.
    let agent = "system:serviceaccount:agents:default";
    let stranger = world.account(agent);
    greet(&world, Some(&stranger)).await.unwrap();
    let pod = world.store(&stranger);
    let (new, new_data) = blob("new");
    for (code, message) in [
        said(pod.read(content).await),
        said(pod.find_missing(&[content]).await),
        said(pod.write_batch(vec![(new, new_data)]).await),
        said(pod.read(big).await),
        said(pod.write_batch(vec![(Blob::of(&vec![8; 5 << 20]), vec![8; 5 << 20].into())]).await),
    ] {
        assert_eq!(code, Code::PermissionDenied);
        assert!(message.contains(agent) && message.contains("--allow"), "{message}");
    }
    assert!(!world.node.store.contains(&new).unwrap());
    world.stop().await;
}

#[tokio::test]
async fn pins_and_administration_are_apart() {
    let world = World::start().await;
    let operator = StoreAdminClient::new(world.connection(Some(&world.account(OPERATOR))));
    let driver = StoreAdminClient::new(world.connection(Some(&world.account(DRIVER))));
    let root = |tree: &str| Root {
        owner_uid: "u".into(),
        kind: "Checkpoint".into(),
        name: String::new(),
        tree: tree.into(),
        pinned_at: 0,
    };
    let missing = Blob::of(b"no such tree").to_string();
    let pin = PinRootRequest { root: Some(root(&missing)) };
    // Let through, and answered by the store itself.
    assert_eq!(operator.clone().pin_root(pin.clone()).await.unwrap_err().code(), Code::NotFound);
    operator.clone().list_roots(ListRootsRequest::default()).await.unwrap();
    let all = UnpinRootsRequest { owner_uid: "u".into(), ..Default::default() };
    operator.clone().unpin_roots(all.clone()).await.unwrap();
    // Whose work is lost is told to whoever pinned it.
    operator.clone().get_integrity(GetIntegrityRequest::default()).await.unwrap();
    let denied = |status: Status, needed: &str| {
        assert_eq!(status.code(), Code::PermissionDenied);
        assert!(status.message().contains(&format!("no permission {needed}")), "{status}");
    };
    denied(operator.clone().fsck(FsckRequest { repair: false }).await.unwrap_err(), "admin");
    denied(operator.clone().get_statistics(GetStatisticsRequest {}).await.unwrap_err(), "admin");
    denied(driver.clone().get_integrity(GetIntegrityRequest::default()).await.unwrap_err(), "admin");
    denied(driver.clone().pin_root(pin).await.unwrap_err(), "pin");
    denied(driver.clone().unpin_roots(all).await.unwrap_err(), "pin");
    denied(driver.clone().list_roots(ListRootsRequest::default()).await.unwrap_err(), "pin");
    let admin = world.account("system:serviceaccount:aether-system:admin");
    let admin = StoreAdminClient::new(world.connection(Some(&admin)));
    assert!(admin.clone().fsck(FsckRequest { repair: false }).await.unwrap().into_inner().damaged.is_empty());
    admin.clone().get_integrity(GetIntegrityRequest::default()).await.unwrap();
    assert_eq!(world.refused("denied"), 6);
    world.stop().await;
}

#[tokio::test]
async fn a_token_that_is_withdrawn_is_refused_when_its_answer_is_old() {
    let world = World::start().await;
    let known = world.account(DRIVER);
    greet(&world, Some(&known)).await.unwrap();
    world.api.forget_token(&known);
    greet(&world, Some(&known)).await.expect("what is remembered counts");
    tokio::time::sleep(world.times.believed).await;
    refused(greet(&world, Some(&known)).await, Code::Unauthenticated, &["pod or service account gone"]);
    // And one that comes to be accepted is, when the refusal is old.
    world.api.know_token(&known, DRIVER, &["aether-store"]);
    tokio::time::sleep(world.times.refused).await;
    greet(&world, Some(&known)).await.unwrap();

    // Nothing counts beyond the token's own end.
    let short = token_for(&["aether-store"], 2);
    world.api.know_token(&short, DRIVER, &["aether-store"]);
    greet(&world, Some(&short)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(2100)).await;
    refused(greet(&world, Some(&short)).await, Code::Unauthenticated, &["expired"]);
    world.stop().await;
}

#[tokio::test]
async fn while_the_api_server_is_away_what_is_known_counts_and_the_rest_waits() {
    let world = World::start().await;
    let (known, unknown) = (world.account(DRIVER), world.account(DRIVER));
    greet(&world, Some(&known)).await.unwrap();
    world.api.before_writes(|_| Fate::AnswerLost);
    greet(&world, Some(&known)).await.expect("what is remembered counts");
    refused(greet(&world, Some(&unknown)).await, Code::Unavailable, &["cannot ask Kubernetes", "try again"]);
    tokio::time::sleep(world.times.believed).await;
    refused(greet(&world, Some(&known)).await, Code::Unavailable, &["cannot ask Kubernetes"]);
    world.api.before_writes(|_| Fate::Answered);
    greet(&world, Some(&unknown)).await.expect("that there was no answer is not remembered");
    greet(&world, Some(&known)).await.unwrap();
    world.stop().await;
}

#[tokio::test]
async fn many_calls_with_one_token_are_few_questions() {
    let world = World::start().await;
    let store = world.store(&world.account(DRIVER));
    world.api.take_writes();
    let blobs: Vec<_> = (0..200).map(|number| blob(&format!("blob {number}")).0).collect();
    futures::future::try_join_all(blobs.iter().map(|blob| store.find_missing(std::slice::from_ref(blob))))
        .await
        .unwrap();
    // Those that came before the first answer.
    assert!(world.api.take_writes().len() <= 16);
    store.find_missing(&blobs).await.unwrap();
    assert_eq!(world.api.take_writes(), []);
    world.stop().await;
}

#[tokio::test]
async fn a_renewed_token_is_shown_without_a_new_start() {
    let world = World::start().await;
    let first = world.account(DRIVER);
    world.write_token(&first);
    let store = world.store_with(|_| {});
    let (content, data) = blob("kept");
    store.write_batch(vec![(content, data)]).await.unwrap();
    // As the kubelet does: the new token is in the file long before the old one ends.
    world.write_token(&world.account(DRIVER));
    world.api.forget_token(&first);
    tokio::time::sleep(world.times.believed).await;
    // The store no longer remembers the first one; the client reads the file every ten seconds.
    let shown = async {
        while let Err(error) = store.read(content).await {
            assert_eq!(said::<()>(Err(error)).0, Code::Unauthenticated);
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(15), shown).await.expect("the new token is shown");
    world.stop().await;
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_to_new_connections_and_drops_none() {
    let world = World::start().await;
    let old = world.store(&world.account(DRIVER));
    let (content, data) = blob("across");
    old.write_batch(vec![(content, data.clone())]).await.unwrap();
    let before = world.shown().await;

    // A key alone, as between two writes: the old certificate goes on.
    world.write_key_only();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(world.shown().await, before);

    // Another authority, so that who connected under the old one could not connect again.
    world.renew_under_another_authority();
    world.until_shown_is_not(&before).await;
    assert_eq!(old.read(content).await.unwrap(), data, "the connection there is goes on");
    let (code, message) = said(world.store_with_old_authority(&world.account(DRIVER)).read(content).await);
    assert_eq!(code, Code::Unavailable);
    assert!(message.contains("invalid peer certificate"), "{message}");
    // The client reads the authority for each connection.
    assert_eq!(world.store(&world.account(DRIVER)).read(content).await.unwrap(), data);
    world.stop().await;
}

#[tokio::test]
async fn one_of_several_addresses_of_a_name_must_have_a_certificate_for_the_name() {
    let world = World::start().await;
    let greet = async |name: &str| {
        let connection = world.connection_at(&format!("https://{name}:1"), &world.account(DRIVER));
        CapabilitiesClient::new(connection).get_capabilities(GetCapabilitiesRequest::default()).await.map(drop)
    };
    // Nobody listens at port 1 of anything: it is the address that counts, and the name that must be right.
    greet("localhost").await.unwrap();
    refused(greet("store.example").await, Code::Unavailable, &["store.example"]);
    world.stop().await;
}

#[tokio::test]
async fn what_the_client_lacks_is_named() {
    let world = World::start().await;
    let (content, _) = blob("x");
    world.write_token(&world.account(DRIVER));
    let store = world.store_with(|credentials| credentials.authority = Some("/nonexistent/ca.crt".into()));
    let (_, message) = said(store.read(content).await);
    assert!(message.contains("/nonexistent/ca.crt") && message.contains("--store-ca"), "{message}");
    let store = world.store_with(|credentials| credentials.token = Some("/nonexistent/token".into()));
    let (code, message) = said(store.read(content).await);
    assert!(code == Code::Unauthenticated && message.contains("--store-token"), "{message}");
    world.write_token(&token_for(&["aether-store"], -5));
    let (code, message) = said(world.store_with(|_| {}).read(content).await);
    assert!(code == Code::Unauthenticated && message.contains("expired"), "{message}");
    // In the clear there is no answer at all.
    let config = world.config(&format!("http://{}", world.node.address), Default::default());
    assert_eq!(said(RemoteStore::lazy(&config).unwrap().read(content).await).0, Code::Unavailable);
    world.stop().await;
}

#[tokio::test]
async fn handshakes_that_stand_still_keep_nobody_else_waiting() {
    use tokio::io::AsyncReadExt;
    let world = World::start().await;
    let driver = world.account(DRIVER);
    // More than there may be of one address; loopback has many addresses.
    let mut still = Vec::new();
    for _ in 0..400 {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        still.push(socket.connect(world.node.address).await.unwrap());
    }
    let greeted = tokio::time::timeout(Duration::from_secs(5), greet(&world, Some(&driver))).await;
    greeted.expect("a handshake takes ten seconds at most, and others need not wait for that").unwrap();
    // All but a few were hung up on, long before their time was over.
    let mut open = 0;
    for mut stream in still {
        let read = tokio::time::timeout(Duration::from_millis(20), stream.read(&mut [0])).await;
        open += usize::from(read.is_err());
    }
    assert!((1..=32).contains(&open), "{open} of 400 are open");
    world.stop().await;
}
