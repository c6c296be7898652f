//! Sources against an API server in memory: one Job per import, progress, revisions, and what a failure leaves.

mod common;

use std::sync::Arc;

use aether_api::conditions::{self, IMPORTING, READY, reason};
use aether_api::names::REFRESH_ANNOTATION;
use aether_api::source::{GitSource, SecretReference};
use aether_api::{AetherSource, AetherSourceSpec, AetherSourceStatus};
use common::{NAMESPACE, Operator, short};
use k8s_openapi::ByteString;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::ResourceExt;
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

/// What the kubelet says of the import's pod.
fn pod(operator: &Operator, state: serde_json::Value) {
    let job = job(operator);
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": format!("{job}-p"), "namespace": NAMESPACE, "labels": {"job-name": job}},
        "status": {"phase": "Running", "containerStatuses": [{"name": "importer", "image": "", "imageID": "", "ready": true, "restartCount": 0, "state": state}]}
    }))
    .unwrap();
    operator.api.put(&pod);
}

fn ends(operator: &Operator, message: serde_json::Value) {
    pod(
        operator,
        json!({"terminated": {"exitCode": if message["ok"] == true { 0 } else { 1 }, "message": message.to_string()}}),
    );
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
