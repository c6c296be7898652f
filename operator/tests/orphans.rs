//! Pins whose owner is gone, against an API server in memory and a store that only knows roots.

mod common;

use std::sync::Arc;
use std::time::Duration;

use aether_api::{AetherCheckpoint, AetherCheckpointSpec, AetherSession, AetherSource};
use aether_credentials::Credentials;
use aether_operator::config::Config;
use aether_operator::context::Context;
use aether_operator::orphans::Orphans;
use aether_operator::pins::{CHECKPOINT, Pins, SESSION_HEAD, SOURCE_REVISION};
use aether_operator::sweep::sweep;
use aether_proto::store::v1::Root;
use clap::Parser;
use common::store::{Roots, root};
use common::{NAMESPACE, Operator};
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

/// An operator that takes an owner for gone when two sweeps have missed it.
async fn operator(roots: Roots) -> (Operator, Arc<Context>) {
    let address = roots.serve().await;
    let operator = Operator::new();
    cluster_of_age(&operator, 120);
    let arguments =
        ["aether-operator", "--store", &address, "--importer-image=i", "--worker-image=w", "--command-image=c"];
    let pins = Pins::connect(&address, &Credentials::default()).unwrap();
    let mut context =
        Context::new(operator.api.client(), Config::parse_from(arguments), pins, common::audit(&operator.api));
    context.orphans = Orphans::new(Duration::from_millis(1));
    (operator, Arc::new(context))
}

fn cluster_of_age(operator: &Operator, minutes: i64) {
    let mut namespace = Namespace::default();
    namespace.metadata.name = Some("kube-system".into());
    namespace.metadata.creation_timestamp =
        Some(Time(jiff::Timestamp::now() - jiff::SignedDuration::from_mins(minutes)));
    operator.api.put(&namespace);
}

async fn sweep_twice(context: &Arc<Context>) {
    for _ in 0..2 {
        sweep(context).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn the_pins_of_whoever_is_gone_are_forgotten_at_the_second_sweep() {
    let roots = Roots::default();
    let (operator, context) = operator(roots.clone()).await;
    operator.put_source("linux");
    operator.put_session("fix", "linux");
    let session = operator.api.get::<AetherSession>(NAMESPACE, "fix").unwrap().uid().unwrap();
    let mut elsewhere = AetherCheckpoint::new("c", AetherCheckpointSpec::default());
    elsewhere.metadata.namespace = Some("other".into());
    operator.api.put(&elsewhere);
    let checkpoint = operator.api.get::<AetherCheckpoint>("other", "c").unwrap().uid().unwrap();
    roots.pin(&session, SESSION_HEAD);
    roots.pin(&checkpoint, CHECKPOINT);
    roots.pin("uid-gone", CHECKPOINT);
    roots.pin("uid-of-somebody", "SomethingElse");

    sweep(&context).await.unwrap();
    assert_eq!(roots.owners().len(), 4, "missed once");
    tokio::time::sleep(Duration::from_millis(5)).await;
    sweep(&context).await.unwrap();
    assert_eq!(roots.owners(), [&session, &checkpoint, "uid-of-somebody"]);
    operator.api.remove::<AetherSession>(NAMESPACE, "fix");
    sweep_twice(&context).await;
    assert_eq!(roots.owners(), [&checkpoint, "uid-of-somebody"]);
}

#[tokio::test]
async fn a_cluster_that_knows_no_owner_forgets_none() {
    let roots = Roots::default();
    let (operator, context) = operator(roots.clone()).await;
    operator.put_source("linux");
    roots.pin("uid-of-another-cluster", SOURCE_REVISION);
    roots.pin("uid-of-its-session", SESSION_HEAD);
    sweep_twice(&context).await;
    assert_eq!(roots.owners().len(), 2);
}

#[tokio::test]
async fn a_cluster_made_anew_forgets_nothing_when_its_first_objects_are_there() {
    let roots = Roots::default();
    let (operator, context) = operator(roots.clone()).await;
    operator.put_source("linux");
    let source = operator.api.get::<AetherSource>(NAMESPACE, "linux").unwrap().uid().unwrap();
    cluster_of_age(&operator, 30);
    roots.pin("uid-before", SOURCE_REVISION);
    roots.pin("uid-of-its-session", SESSION_HEAD);
    let now = jiff::Timestamp::now().as_second() - 1200;
    let since = |owner: &str, name: &str| Root { name: name.into(), pinned_at: now, ..root(owner, SOURCE_REVISION) };
    roots.0.lock().unwrap().push(since(&source, "r1"));
    sweep_twice(&context).await;
    assert_eq!(roots.owners().len(), 3);

    // Of the many that came and went since, nothing stays.
    (0..10).for_each(|n| roots.0.lock().unwrap().push(since(&format!("uid-gone-{n}"), "r1")));
    sweep_twice(&context).await;
    assert_eq!(roots.owners(), ["uid-before", "uid-of-its-session", &source]);
}
