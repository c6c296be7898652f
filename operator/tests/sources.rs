//! Sources against an API server in memory: one Job per import, progress, revisions, and what a failure leaves.

mod common;

use std::sync::Arc;

use aether_api::conditions::{self, IMPORTING, INTACT, READY, Wanted, reason};
use aether_api::names::REFRESH_ANNOTATION;
use aether_api::source::{GitSource, S3Source, SecretReference};
use aether_api::{AetherSource, AetherSourceSpec, AetherSourceStatus};
use aether_operator::config::Config;
use aether_operator::context::Context;
use aether_operator::pins::Pins;
use clap::Parser;
use common::{NAMESPACE, Operator, short};
use k8s_openapi::ByteString;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, Secret};
use kube::{Resource, ResourceExt};
use serde_json::json;

async fn reconcile(operator: &Operator) -> AetherSourceStatus {
    let source: AetherSource = operator.api.get(NAMESPACE, "linux").unwrap();
    aether_operator::source::reconcile(Arc::new(source), operator.context.clone()).await.unwrap();
    operator.api.get::<AetherSource>(NAMESPACE, "linux").unwrap().status.unwrap()
}

fn put(operator: &Operator, secret: Option<&str>) {
    let git = GitSource {
        url: "https://example.org/linux".into(),
        secret_ref: secret.map(|name| SecretReference { name: name.into() }),
        ..Default::default()
    };
    let mut source =
        AetherSource::new("linux", AetherSourceSpec { git: Some(git), revisions_to_keep: 3, ..Default::default() });
    source.metadata.namespace = Some(NAMESPACE.into());
    operator.api.put(&source);
}

fn job(operator: &Operator) -> String {
    let source: AetherSource = operator.api.get(NAMESPACE, "linux").unwrap();
    source.status.unwrap().import.unwrap().job
}

/// The pod that the Job controller makes of the import's Job, with what the kubelet says of it.
fn genuine(operator: &Operator, state: serde_json::Value) -> Pod {
    let name = job(operator);
    let job: Job = operator.api.get(NAMESPACE, &name).unwrap();
    let template = job.spec.as_ref().unwrap().template.clone();
    let mut pod: Pod = serde_json::from_value(json!({
        "metadata": template.metadata,
        "spec": template.spec,
        "status": {"phase": "Running", "containerStatuses": [{"name": "importer", "image": "", "imageID": "", "ready": true, "restartCount": 0, "state": state}]}
    }))
    .unwrap();
    pod.metadata.name = Some(format!("{name}-p"));
    pod.metadata.namespace = Some(NAMESPACE.into());
    pod.metadata.owner_references = Some(vec![job.controller_owner_ref(&()).unwrap()]);
    pod.labels_mut().insert("job-name".into(), name);
    pod.spec.as_mut().unwrap().dns_policy = Some("ClusterFirst".into());
    pod
}

fn pod(operator: &Operator, state: serde_json::Value) {
    operator.api.put(&genuine(operator, state));
}

fn ended(message: &serde_json::Value) -> serde_json::Value {
    json!({"terminated": {"exitCode": if message["ok"] == true { 0 } else { 1 }, "message": message.to_string()}})
}

fn ends(operator: &Operator, message: serde_json::Value) {
    pod(operator, ended(&message));
}

fn importing(status: &AetherSourceStatus) -> &str {
    &conditions::get(&status.conditions, IMPORTING).unwrap().reason
}

#[tokio::test]
async fn an_import_is_one_job_and_one_revision() {
    let operator = Operator::new();
    put(&operator, None);
    let status = reconcile(&operator).await;
    assert_eq!(short(&operator.api.take_writes()), ["POST jobs", "PATCH aethersources/status"]);
    assert_eq!((status.phase.as_deref(), importing(&status)), (Some("Importing"), reason::IN_PROGRESS));
    reconcile(&operator).await;
    assert!(operator.api.take_writes().is_empty(), "nothing to tell yet");

    pod(&operator, json!({"running": {}}));
    operator.api.set_log(
        NAMESPACE,
        &format!("{}-p", job(&operator)),
        "{\"phase\":\"Scanning\",\"files\":5,\"bytes\":9}\n",
    );
    let status = reconcile(&operator).await;
    let import = status.import.unwrap();
    assert_eq!((import.phase.as_str(), import.files, import.bytes), ("Scanning", 5, 9));
    operator.api.set_log(
        NAMESPACE,
        &format!("{}-p", job(&operator)),
        "{\"phase\":\"Scanning\",\"files\":6,\"bytes\":10}\n",
    );
    operator.api.take_writes();
    reconcile(&operator).await;
    assert!(operator.api.take_writes().is_empty(), "progress is written at most once a second");

    ends(
        &operator,
        json!({"ok": true, "root": "aa/1", "files": 7, "bytes": 11, "commit": "c0ffee", "milliseconds": 12}),
    );
    let status = reconcile(&operator).await;
    assert_eq!((status.phase.as_deref(), status.latest.as_deref(), status.files), (Some("Ready"), Some("r1"), Some(7)));
    assert_eq!(status.revisions[0].commit.as_deref(), Some("c0ffee"));
    operator.api.take_writes();
    for _ in 0..3 {
        reconcile(&operator).await;
    }
    assert!(operator.api.take_writes().is_empty());
}

#[tokio::test]
async fn a_refresh_that_finds_nothing_new_makes_no_revision() {
    let operator = Operator::new();
    put(&operator, None);
    for (value, root, expected) in [("1", "aa/1", 1), ("2", "aa/1", 1), ("3", "bb/1", 2)] {
        operator.api.change::<AetherSource>(NAMESPACE, "linux", |source| {
            source.annotations_mut().insert(REFRESH_ANNOTATION.into(), value.into());
        });
        reconcile(&operator).await;
        ends(&operator, json!({"ok": true, "root": root, "files": 1, "bytes": 1}));
        let status = reconcile(&operator).await;
        assert_eq!(status.revisions.len(), expected, "after refresh {value}");
        assert_eq!(operator.api.all::<Job>().len(), 1, "the Job before is removed");
    }
}

#[tokio::test]
async fn a_known_commit_is_not_imported_again() {
    let operator = Operator::new();
    put(&operator, None);
    reconcile(&operator).await;
    ends(&operator, json!({"ok": true, "root": "aa/1", "files": 1, "bytes": 1, "commit": "c0ffee"}));
    reconcile(&operator).await;
    operator.api.change::<AetherSource>(NAMESPACE, "linux", |source| {
        source.annotations_mut().insert(REFRESH_ANNOTATION.into(), "now".into());
    });
    reconcile(&operator).await;
    let arguments = |operator: &Operator| {
        let job: Job = operator.api.get(NAMESPACE, &job(operator)).unwrap();
        job.spec.unwrap().template.spec.unwrap().containers[0].args.clone().unwrap().join(" ")
    };
    assert!(arguments(&operator).contains("--unless-commit c0ffee"));
    ends(&operator, json!({"ok": true, "unchanged": true, "files": 0, "bytes": 0, "commit": "c0ffee"}));
    reconcile(&operator).await;
    for (status, known) in [("False", false), ("True", true)] {
        operator.api.change::<AetherSource>(NAMESPACE, "linux", |source| {
            let wanted = Wanted { status: status == "True", ..Wanted::no(INTACT, reason::CONTENTS_LOST, "1 path") };
            conditions::set(&mut source.status.as_mut().unwrap().conditions, wanted, None);
            source.annotations_mut().insert(REFRESH_ANNOTATION.into(), status.into());
        });
        reconcile(&operator).await;
        assert_eq!(arguments(&operator).contains("--unless-commit"), known, "Intact is {status}");
        ends(&operator, json!({"ok": true, "root": "aa/1", "files": 1, "bytes": 1, "commit": "c0ffee"}));
        reconcile(&operator).await;
    }
    operator.api.change::<AetherSource>(NAMESPACE, "linux", |source| {
        source.annotations_mut().insert(REFRESH_ANNOTATION.into(), "once more".into());
    });
    reconcile(&operator).await;
    ends(
        &operator,
        json!({"ok": true, "unchanged": true, "files": 0, "bytes": 0, "commit": "c0ffee", "milliseconds": 1}),
    );
    let status = reconcile(&operator).await;
    assert_eq!((status.revisions.len(), status.phase.as_deref(), importing(&status)), (1, Some("Ready"), reason::DONE));
    operator
        .api
        .change::<AetherSource>(NAMESPACE, "linux", |source| source.spec.git.as_mut().unwrap().submodules = true);
    reconcile(&operator).await;
    assert!(!arguments(&operator).contains("--unless-commit"), "the same commit, but more of it");
}

#[tokio::test]
async fn a_known_listing_is_not_imported_again() {
    let operator = Operator::new();
    let s3 = S3Source {
        bucket: "models".into(),
        secret_ref: Some(SecretReference { name: "key".into() }),
        ..Default::default()
    };
    let spec = AetherSourceSpec { s3: Some(s3), revisions_to_keep: 2, ..Default::default() };
    let mut source = AetherSource::new("linux", spec);
    source.metadata.namespace = Some(NAMESPACE.into());
    operator.api.put(&source);
    assert_eq!(importing(&reconcile(&operator).await), reason::SECRET_NOT_FOUND);
    let mut secret = Secret::default();
    secret.metadata.name = Some("key".into());
    secret.metadata.namespace = Some(NAMESPACE.into());
    operator.api.put(&secret);
    let status = reconcile(&operator).await;
    assert_eq!(importing(&status), reason::SECRET_INVALID);
    operator.api.change::<Secret>(NAMESPACE, "key", |secret| {
        let keys = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"];
        secret.data = Some(keys.map(|key| (key.into(), ByteString(b"x".to_vec()))).into())
    });

    // What each import finds, what it is told to know, and which revisions there are then.
    let imported =
        |root: &str, listing: &str| json!({"ok": true, "root": root, "files": 1, "bytes": 1, "listing": listing});
    let unchanged = json!({"ok": true, "unchanged": true, "files": 0, "bytes": 0, "listing": "l2"});
    for (number, (said, known, names)) in [
        (imported("aa/1", "l1"), None, vec!["r1"]),
        // Objects that were written again as they were.
        (imported("aa/1", "l2"), Some("l1"), vec!["r1"]),
        (unchanged, Some("l2"), vec!["r1"]),
        (imported("bb/1", "l3"), Some("l2"), vec!["r2", "r1"]),
        (imported("cc/1", "l4"), Some("l3"), vec!["r3", "r2"]),
    ]
    .into_iter()
    .enumerate()
    {
        operator.api.change::<AetherSource>(NAMESPACE, "linux", |source| {
            source.annotations_mut().insert(REFRESH_ANNOTATION.into(), number.to_string());
        });
        reconcile(&operator).await;
        let made: Job = operator.api.get(NAMESPACE, &job(&operator)).unwrap();
        let arguments = made.spec.unwrap().template.spec.unwrap().containers[0].args.clone().unwrap();
        let at = arguments.iter().position(|argument| argument == "--unless-listing");
        assert_eq!(at.map(|at| arguments[at + 1].as_str()), known, "import {number}");
        ends(&operator, said);
        let status = reconcile(&operator).await;
        assert_eq!(importing(&status), reason::DONE);
        let revisions: Vec<&str> = status.revisions.iter().map(|revision| revision.name.as_str()).collect();
        assert_eq!(revisions, names, "import {number}");
    }
    operator.api.change::<AetherSource>(NAMESPACE, "linux", |source| {
        source.spec.s3.as_mut().unwrap().prefix = Some("other".into())
    });
    reconcile(&operator).await;
    ends(&operator, json!({"ok": false, "reason": "BucketNotFound", "message": "no bucket models"}));
    let status = reconcile(&operator).await;
    assert_eq!((importing(&status), status.latest.as_deref()), (reason::BUCKET_NOT_FOUND, Some("r3")));
}

#[tokio::test]
async fn a_failed_import_says_why_and_leaves_old_revisions_usable() {
    let operator = Operator::new();
    put(&operator, None);
    reconcile(&operator).await;
    ends(&operator, json!({"ok": true, "root": "aa/1", "files": 1, "bytes": 1}));
    reconcile(&operator).await;
    operator.api.change::<AetherSource>(NAMESPACE, "linux", |source| {
        source.spec.git.as_mut().unwrap().reference = Some("nosuch".into())
    });
    reconcile(&operator).await;
    ends(&operator, json!({"ok": false, "reason": "RefNotFound", "message": "no ref nosuch"}));
    let status = reconcile(&operator).await;
    assert_eq!(importing(&status), reason::REF_NOT_FOUND);
    assert!(conditions::is_true(&status.conditions, READY));
    assert_eq!((status.latest.as_deref(), status.import.unwrap().failures), (Some("r1"), 1));

    operator.api.take_writes();
    reconcile(&operator).await;
    assert!(operator.api.take_writes().is_empty(), "it pauses before it tries again");
    operator.api.change::<AetherSource>(NAMESPACE, "linux", |source| {
        source.spec.git.as_mut().unwrap().reference = Some("main".into())
    });
    let status = reconcile(&operator).await;
    assert_eq!(importing(&status), reason::IN_PROGRESS, "a changed spec is tried at once");
}

#[tokio::test]
async fn a_missing_or_wrong_secret_is_told_before_any_job_is_made() {
    let operator = Operator::new();
    put(&operator, Some("key"));
    let status = reconcile(&operator).await;
    assert_eq!((status.phase.as_deref(), importing(&status)), (Some("Failed"), reason::SECRET_NOT_FOUND));
    let mut secret = Secret::default();
    secret.metadata.name = Some("key".into());
    secret.metadata.namespace = Some(NAMESPACE.into());
    operator.api.put(&secret);
    assert_eq!(importing(&reconcile(&operator).await), reason::SECRET_INVALID);
    assert!(operator.api.all::<Job>().is_empty());
    operator.api.change::<Secret>(NAMESPACE, "key", |secret| {
        secret.data = Some([("password".into(), ByteString(b"x".to_vec()))].into())
    });
    assert_eq!(importing(&reconcile(&operator).await), reason::IN_PROGRESS);

    ends(&operator, json!({"ok": false, "reason": "AuthenticationFailed", "message": "denied"}));
    assert_eq!(importing(&reconcile(&operator).await), reason::AUTHENTICATION_FAILED);
    assert_eq!(importing(&reconcile(&operator).await), reason::AUTHENTICATION_FAILED, "it pauses");
    operator.api.change::<Secret>(NAMESPACE, "key", |secret| {
        secret.data = Some([("password".into(), ByteString(b"y".to_vec()))].into())
    });
    assert_eq!(importing(&reconcile(&operator).await), reason::IN_PROGRESS, "a changed Secret is tried at once");
}

#[tokio::test]
async fn an_invalid_spec_starts_nothing() {
    let operator = Operator::new();
    put(&operator, None);
    operator
        .api
        .change::<AetherSource>(NAMESPACE, "linux", |source| source.spec.git.as_mut().unwrap().url = "nowhere".into());
    let status = reconcile(&operator).await;
    assert_eq!((status.phase.as_deref(), importing(&status)), (Some("Invalid"), reason::INVALID));
    assert!(operator.api.all::<Job>().is_empty());
}

/// What somebody writes who wants a tree of others to become a revision.
fn forged() -> serde_json::Value {
    ended(&json!({"ok": true, "root": "victim/1", "files": 1, "bytes": 1}))
}

#[tokio::test]
async fn only_a_pod_that_runs_what_the_operator_asked_for_is_believed() {
    let operator = Operator::new();
    put(&operator, None);
    reconcile(&operator).await;
    let mut labelled = genuine(&operator, forged());
    labelled.metadata.name = Some("labelled".into());
    labelled.metadata.owner_references = None;
    operator.api.put(&labelled);
    let mut of_another_job = genuine(&operator, forged());
    of_another_job.metadata.name = Some("of-another-job".into());
    of_another_job.owner_references_mut()[0].uid = "another".into();
    operator.api.put(&of_another_job);
    let forge = |name: &str, change: fn(&mut PodSpec)| {
        let mut pod = genuine(&operator, forged());
        pod.metadata.name = Some(name.into());
        change(pod.spec.as_mut().unwrap());
        operator.api.put(&pod);
    };
    forge("with-arguments", |pod| pod.containers[0].args.as_mut().unwrap().push("--more".into()));
    forge("with-command", |pod| pod.containers[0].command = Some(vec!["sh".into()]));
    forge("with-image", |pod| pod.containers[0].image = Some("mine".into()));
    forge("with-account", |pod| pod.service_account_name = Some("other".into()));
    forge("with-company", |pod| pod.containers.push(Container { name: "x".into(), ..Container::default() }));
    let status = reconcile(&operator).await;
    assert_eq!((status.revisions.len(), importing(&status)), (0, reason::IN_PROGRESS));
    let said = &conditions::get(&status.conditions, IMPORTING).unwrap().message;
    assert!(said.contains("is not believed"), "{said}");

    ends(&operator, json!({"ok": true, "root": "aa/1", "files": 1, "bytes": 1}));
    let status = reconcile(&operator).await;
    assert_eq!(status.revisions[0].root, "aa/1");
    assert_eq!(status.revisions.len(), 1);
}

#[tokio::test]
async fn a_job_that_took_the_place_of_the_operators_fails_the_import() {
    let operator = Operator::new();
    put(&operator, None);
    let first = reconcile(&operator).await.import.unwrap().job;
    operator.api.change::<Job>(NAMESPACE, &first, |job| {
        let pod = job.spec.as_mut().unwrap().template.spec.as_mut().unwrap();
        pod.containers[0].command = Some(vec!["sh".into()]);
    });
    ends(&operator, json!({"ok": true, "root": "victim/1", "files": 1, "bytes": 1}));
    let status = reconcile(&operator).await;
    assert_eq!((status.revisions.len(), importing(&status)), (0, reason::IMPORT_FAILED));
    let said = &conditions::get(&status.conditions, IMPORTING).unwrap().message;
    assert!(said.contains("in command"), "{said}");
}

#[tokio::test]
async fn a_job_that_is_the_same_but_not_the_operators_fails_the_import() {
    let operator = Operator::new();
    put(&operator, None);
    let first = reconcile(&operator).await.import.unwrap();
    let mut again: Job = operator.api.get(NAMESPACE, &first.job).unwrap();
    assert_eq!(first.job_uid, again.metadata.uid);
    operator.api.remove::<Job>(NAMESPACE, &first.job);
    again.metadata.uid = None;
    again.metadata.resource_version = None;
    operator.api.put(&again);
    ends(&operator, json!({"ok": true, "root": "old/1", "files": 1, "bytes": 1}));
    let status = reconcile(&operator).await;
    assert_eq!((status.revisions.len(), importing(&status)), (0, reason::IMPORT_FAILED));
}

#[tokio::test]
async fn an_import_with_a_token_for_the_store_is_believed() {
    let authority = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(authority.path(), "authority").unwrap();
    let mut operator = Operator::new();
    let arguments =
        ["aether-operator", "--store=https://store", "--importer-image=i", "--worker-image=w", "--command-image=c"];
    let mut config = Config::parse_from(arguments);
    config.credentials.authority = Some(authority.path().into());
    operator.context =
        Arc::new(Context::new(operator.api.client(), config, Pins::nowhere(), common::audit(&operator.api)));
    put(&operator, None);
    reconcile(&operator).await;
    ends(&operator, json!({"ok": true, "root": "aa/1", "files": 1, "bytes": 1}));
    assert_eq!(reconcile(&operator).await.latest.as_deref(), Some("r1"));
}
