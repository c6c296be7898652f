//! The webhook as the API server asks it: AdmissionReviews over HTTP.

mod common;

use aether_api::commit::{AetherCommitStatus, CommitSource};
use aether_api::{AetherApprovalSpec, AetherCommit};
use aether_operator::admission::{Admission, router};
use aether_operator::events::Events;
use aether_operator::signature::{self, Keyring, Keys, Statement};
use aether_testkit::ApiServer;
use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

struct Webhook {
    api: ApiServer,
    keyring: Keyring,
    router: Router,
}

async fn webhook() -> Webhook {
    let api = ApiServer::new();
    signature::rotate(&api.client(), "aether-system", jiff::Timestamp::now()).await.unwrap();
    let keyring = Keyring::default();
    keyring.set(Keys::read(&api.get("aether-system", signature::SECRET).unwrap()));
    let events = Events::new(&api.client(), "operator");
    let router =
        router(Admission { client: api.client(), keyring: keyring.clone(), audit: common::audit(&api), events });
    let mut commit = AetherCommit::new("fix", Default::default());
    commit.metadata.namespace = Some("agents".into());
    let source = CommitSource { namespace: "platform".into(), name: "linux".into(), uid: "u".into() };
    commit.status = Some(AetherCommitStatus { source: Some(source), ..Default::default() });
    api.put(&commit);
    api.set_right("jane", "approve", "aethersources", "platform", "linux", true);
    Webhook { api, keyring, router }
}

impl Webhook {
    async fn post(&self, path: &str, request: &Value) -> (StatusCode, Value) {
        let review = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request});
        let request = Request::post(path).header("content-type", "application/json");
        let request = request.body(Body::from(review.to_string())).unwrap();
        let response = self.router.clone().oneshot(request).await.unwrap();
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&body).unwrap_or_default())
    }

    async fn ask(&self, request: &Value) -> Value {
        let path = format!("/mutate/{}", self.keyring.keys().unwrap().word());
        let (status, answer) = self.post(&path, request).await;
        assert_eq!((status, &answer["kind"]), (StatusCode::OK, &json!("AdmissionReview")));
        assert_eq!(answer["response"]["uid"], request["uid"]);
        answer["response"].clone()
    }
}

/// As API server 1.20 sends it, with all that is not looked at.
fn create(kind: &str, user: &str, object: &Value) -> Value {
    json!({
        "uid": "705ab4f5-6393-11e8-b7cc-42010a800002", "operation": "CREATE", "namespace": "agents", "dryRun": false,
        "kind": {"group": "aether.dev", "version": "v1alpha1", "kind": kind},
        "resource": {"group": "aether.dev", "version": "v1alpha1", "resource": format!("{}s", kind.to_lowercase())},
        "userInfo": {"username": user, "uid": "7", "groups": ["dev", "system:authenticated"], "extra": {"scopes": ["a"]}},
        "object": object, "oldObject": null, "options": {"kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1"},
    })
}

fn approval() -> Value {
    json!({"apiVersion": "aether.dev/v1alpha1", "kind": "AetherApproval",
        "metadata": {"generateName": "fix-", "namespace": "agents"},
        "spec": {"commit": "fix", "root": "aa/1", "decision": "Approve", "reviewer": {"username": "root"}}})
}

#[tokio::test]
async fn an_approval_is_stamped_and_signed() {
    let webhook = webhook().await;
    let response = webhook.ask(&create("AetherApproval", "jane", &approval())).await;
    assert_eq!((&response["allowed"], &response["patchType"]), (&json!(true), &json!("JSONPatch")));
    let patch = BASE64_STANDARD.decode(response["patch"].as_str().unwrap()).unwrap();
    let patch: Vec<Value> = serde_json::from_slice(&patch).unwrap();
    let at = |path: &str| {
        let mut changes = patch.iter().filter(|change| change["path"] == path);
        let change = changes.next().expect(path);
        assert!(changes.next().is_none() && change["op"] == "add");
        change["value"].clone()
    };
    assert_eq!(at("/metadata/name"), "fix.81f8f6dde88365f3");
    let mut spec: AetherApprovalSpec = serde_json::from_value(approval()["spec"].clone()).unwrap();
    spec.reviewer = serde_json::from_value(at("/spec/reviewer")).unwrap();
    let reviewer = spec.reviewer.clone().unwrap();
    assert_eq!((reviewer.username.as_str(), &reviewer.extra["scopes"][..]), ("jane", &["a".to_owned()][..]));
    let commit: AetherCommit = webhook.api.get("agents", "fix").unwrap();
    let statement = Statement::approval("agents", "fix.81f8f6dde88365f3", &spec, &commit.metadata.uid.unwrap());
    let signature = serde_json::from_value(at("/spec/signature")).unwrap();
    assert_eq!(webhook.keyring.keys().unwrap().verify(&statement, Some(&signature), None), Ok(()));
}

#[tokio::test]
async fn a_refusal_is_told_in_words() {
    let webhook = webhook().await;
    let refused = async |request: &Value| {
        let response = webhook.ask(request).await;
        assert_eq!((&response["allowed"], &response["status"]["code"]), (&json!(false), &json!(403)));
        assert!(response["patch"].is_null());
        response["status"]["message"].as_str().unwrap().to_owned()
    };
    let said = refused(&create("AetherApproval", "joe", &approval())).await;
    assert!(said.contains("joe may not decide on commits of AetherSource platform/linux"), "{said}");
    let mut of_none = approval();
    of_none["spec"]["commit"] = json!("nosuch");
    assert!(refused(&create("AetherApproval", "jane", &of_none)).await.contains("AetherCommit nosuch does not exist"));
    let commit =
        json!({"metadata": {"name": "c"}, "spec": {"checkpoint": "a", "session": "b", "target": {"promote": {}}}});
    assert!(refused(&create("AetherCommit", "jane", &commit)).await.contains("exactly one of"));
    let note = json!({"metadata": {"name": "n"}, "spec": {"checkpoint": "a", "path": "b", "text": " "}});
    assert!(refused(&create("AetherNote", "jane", &note)).await.contains("spec.text is empty"));
    let nonsense = json!({"metadata": {"name": "c"}, "spec": {"target": 7}});
    assert!(refused(&create("AetherCommit", "jane", &nonsense)).await.starts_with("spec: "));
}

#[tokio::test]
async fn only_the_api_server_is_answered() {
    let (webhook, request) = (webhook().await, create("AetherApproval", "jane", &approval()));
    let other = self::webhook().await.keyring.keys().unwrap().word();
    for word in ["", "x", "00", &"0".repeat(64), &other] {
        for verb in ["mutate", "validate"] {
            let (status, answer) = webhook.post(&format!("/{verb}/{word}"), &request).await;
            assert_eq!((status, answer), (StatusCode::NOT_FOUND, Value::Null), "{verb} {word:?}");
        }
    }
}

#[tokio::test]
async fn who_makes_a_session_is_written_into_it() {
    let webhook = webhook().await;
    let session =
        json!({"metadata": {"name": "fix", "annotations": {"a": "b", "aether.dev/created-by": "jane"}}, "spec": {}});
    let response = webhook.ask(&create("AetherSession", "agent", &session)).await;
    let patch = BASE64_STANDARD.decode(response["patch"].as_str().unwrap()).unwrap();
    let patch: Value = serde_json::from_slice(&patch).unwrap();
    assert_eq!(patch.as_array().unwrap().len(), 1, "its other annotations stay");
    assert_eq!(patch[0]["path"], "/metadata/annotations/aether.dev~1created-by");
    assert!(patch[0]["value"].as_str().unwrap().contains(r#""username":"agent""#));
}
