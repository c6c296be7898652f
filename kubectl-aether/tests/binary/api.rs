//! As much of an API server as the program needs: a session, checkpoints, one command, and what reviewers write, over plain HTTP.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::io::Write;
use std::sync::{Arc, Mutex};

use axum::Json;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::sync::watch;

/// What the server does.
#[derive(Clone, Debug)]
pub(crate) struct Behaviour {
    /// Whether checkpoints become durable at once, or never.
    pub(crate) durable: bool,
    /// The answer to a request for changes.
    pub(crate) changes: Bytes,
    /// The exit code of commands, which end at once; without one they run until they are deleted.
    pub(crate) exit_code: Option<i32>,
    /// What commands say.
    pub(crate) log: &'static str,
    /// Commits that are there from the beginning.
    pub(crate) commits: Vec<Value>,
    /// Whether the user may list objects of all namespaces.
    pub(crate) everywhere: bool,
    /// The group that says who the user is: Kubernetes' own does since 1.28.
    pub(crate) says_who: Option<&'static str>,
}

/// What the server was asked to do so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) created: Vec<Value>,
    pub(crate) deleted: Vec<String>,
    pub(crate) patched: Vec<Value>,
    /// Paths of the aggregated API.
    pub(crate) reviewed: Vec<String>,
    pub(crate) followed: bool,
}

struct Shared {
    behaviour: Behaviour,
    checkpoints: Mutex<HashMap<String, Value>>,
    /// Commits, approvals and notes by plural and name.
    records: Mutex<BTreeMap<(String, String), Value>>,
    seen: watch::Sender<Seen>,
}

type Api = State<Arc<Shared>>;

/// A running server and the kubeconfig that leads to it.
pub(crate) struct Server {
    pub(crate) seen: watch::Receiver<Seen>,
    pub(crate) kubeconfig: tempfile::NamedTempFile,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    pub(crate) async fn start(behaviour: Behaviour) -> Self {
        let (sender, seen) = watch::channel(Seen::default());
        let commits = behaviour.commits.iter().map(|commit| {
            (("aethercommits".to_owned(), commit["metadata"]["name"].as_str().unwrap().to_owned()), commit.clone())
        });
        let kept = Mutex::new(commits.collect());
        let shared = Arc::new(Shared { behaviour, checkpoints: Mutex::default(), records: kept, seen: sender });
        let aether = "/apis/aether.dev/v1alpha1/namespaces/demo";
        let app = Router::new()
            .route(&format!("{aether}/aethersessions/{{name}}"), get(session))
            .route(&format!("{aether}/aethersessions"), get(async || Json(list(vec![session_object()]))))
            .route("/apis/aether.dev/v1alpha1/aethersessions", get(async || Json(list(vec![]))))
            .route(&format!("{aether}/aethercheckpoints"), get(checkpoints).post(create_checkpoint))
            .route(&format!("{aether}/aethercheckpoints/{{name}}"), get(checkpoint).delete(delete_checkpoint))
            .route(&format!("{aether}/aethercommands"), get(commands).post(create_command))
            .route(&format!("{aether}/aethercommands/{{name}}"), axum::routing::delete(delete_command))
            .route("/api/v1/namespaces/demo/pods", get(pods))
            .route("/api/v1/namespaces/demo/pods/{name}", get(pod))
            .route("/api/v1/namespaces/demo/pods/{name}/log", get(log))
            .route("/apis/aether.dev/v1alpha1/{plural}", get(everywhere))
            .route(&format!("{aether}/{{plural}}"), get(records).post(create_record))
            .route(&format!("{aether}/{{plural}}/{{name}}"), get(record).patch(patch_record).delete(delete_record))
            .route("/apis/{group}/{version}/selfsubjectreviews", post(who))
            .route("/apis/review.aether.dev/v1alpha1", get(async || Json(json!({"kind": "APIResourceList"}))))
            .route("/apis/review.aether.dev/v1alpha1/namespaces/demo/{resource}/{name}/changes", get(changes))
            .route("/apis/review.aether.dev/v1alpha1/namespaces/demo/checkpoints/{name}/file", get(file))
            .route("/apis/review.aether.dev/v1alpha1/namespaces/demo/sessions/{name}/notes", get(notes))
            .fallback(async |uri: Uri| not_found(&uri.to_string()))
            .with_state(shared);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        let mut kubeconfig = tempfile::NamedTempFile::new().unwrap();
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://{address}")}}],
            "users": [{"name": "c", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c", "namespace": "demo"}}],
        });
        kubeconfig.write_all(config.to_string().as_bytes()).unwrap();
        Self { seen, kubeconfig, task }
    }

    /// Waits until the server has seen that.
    pub(crate) async fn until(&mut self, what: &str, is: impl Fn(&Seen) -> bool) {
        let waited = tokio::time::timeout(std::time::Duration::from_secs(60), self.seen.wait_for(is)).await;
        waited.unwrap_or_else(|_| panic!("waited in vain for {what}")).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn list(items: Vec<Value>) -> Value {
    json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "7"}, "items": items})
}

fn not_found(what: &str) -> Response {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404, "message": format!("{what} not found"), "reason": "NotFound", "details": {"name": what}});
    (StatusCode::NOT_FOUND, Json(status)).into_response()
}

/// A list, or a watch that never shows anything.
fn listed(query: &HashMap<String, String>, items: Vec<Value>) -> Response {
    if query.contains_key("watch") {
        return Body::from_stream(stream::pending::<Result<Bytes, Infallible>>()).into_response();
    }
    let name = query.get("fieldSelector").and_then(|selector| selector.strip_prefix("metadata.name="));
    Json(list(items.into_iter().filter(|item| name.is_none_or(|name| item["metadata"]["name"] == name)).collect()))
        .into_response()
}

fn session_object() -> Value {
    let condition = json!({"type": "Ready", "status": "True", "reason": "Ready", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"});
    json!({
        "apiVersion": "aether.dev/v1alpha1", "kind": "AetherSession",
        "metadata": {"name": "fix-login", "namespace": "demo", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"source": {"name": "linux"}}, "status": {"phase": "Bound", "conditions": [condition]},
    })
}

async fn session(Path(name): Path<String>) -> Response {
    if name == "fix-login" { Json(session_object()).into_response() } else { not_found(&name) }
}

async fn create_checkpoint(State(shared): Api, Json(mut object): Json<Value>) -> Response {
    let name = object["metadata"]["name"].as_str().unwrap().to_owned();
    object["metadata"]["uid"] = json!("k");
    if shared.behaviour.durable {
        object["status"] = json!({"durability": "Durable", "root": "r"});
    }
    shared.checkpoints.lock().unwrap().insert(name, object.clone());
    shared.seen.send_modify(|seen| seen.created.push(object.clone()));
    (StatusCode::CREATED, Json(object)).into_response()
}

async fn checkpoints(State(shared): Api, Query(query): Query<HashMap<String, String>>) -> Response {
    listed(&query, shared.checkpoints.lock().unwrap().values().cloned().collect())
}

async fn checkpoint(State(shared): Api, Path(name): Path<String>) -> Response {
    match shared.checkpoints.lock().unwrap().get(&name) {
        Some(object) => Json(object.clone()).into_response(),
        None => not_found(&name),
    }
}

async fn delete_checkpoint(State(shared): Api, Path(name): Path<String>) -> Response {
    let Some(object) = shared.checkpoints.lock().unwrap().remove(&name) else { return not_found(&name) };
    shared.seen.send_modify(|seen| seen.deleted.push(name));
    Json(object).into_response()
}

async fn changes(State(shared): Api, uri: Uri) -> Response {
    shared.seen.send_modify(|seen| seen.reviewed.push(uri.to_string()));
    shared.behaviour.changes.clone().into_response()
}

async fn file(State(shared): Api, uri: Uri) -> Response {
    shared.seen.send_modify(|seen| seen.reviewed.push(uri.to_string()));
    Json(json!({"kind": "CheckpointFile", "path": "src/a", "digest": "d1", "size": 20, "lines": 9})).into_response()
}

async fn notes(State(shared): Api) -> Response {
    let records = shared.records.lock().unwrap();
    let notes = records.keys().filter(|(plural, _)| plural == "aethernotes");
    let items: Vec<Value> =
        notes.map(|(_, name)| json!({"note": name, "state": "Moved", "from": 20, "to": 22})).collect();
    Json(json!({"kind": "SessionNotes", "items": items})).into_response()
}

async fn who(
    State(shared): Api,
    Path((group, version)): Path<(String, String)>,
    Json(mut object): Json<Value>,
) -> Response {
    if shared.behaviour.says_who != Some(&group) || object["apiVersion"] != format!("{group}/{version}") {
        return not_found("selfsubjectreviews");
    }
    object["status"] = json!({"userInfo": {"username": "ada"}});
    (StatusCode::CREATED, Json(object)).into_response()
}

async fn everywhere(State(shared): Api, Path(plural): Path<String>) -> Response {
    if !shared.behaviour.everywhere {
        let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 403, "message": "no", "reason": "Forbidden"});
        return (StatusCode::FORBIDDEN, Json(status)).into_response();
    }
    records(State(shared), Path(plural), Query(HashMap::new())).await
}

async fn records(
    State(shared): Api,
    Path(plural): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    let records = shared.records.lock().unwrap();
    listed(&query, records.iter().filter(|((of, _), _)| *of == plural).map(|(_, object)| object.clone()).collect())
}

/// What the webhook would do: a name, and who it was.
async fn create_record(State(shared): Api, Path(plural): Path<String>, Json(mut object): Json<Value>) -> Response {
    let stem = object["metadata"]["generateName"].as_str().map(|stem| format!("{stem}x"));
    // As the API server has it, also when the webhook has made a name of its own.
    if object["metadata"]["generateName"].as_str().is_some_and(|stem| stem.ends_with('.')) {
        let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 422, "message": "metadata.generateName: Invalid value", "reason": "Invalid"});
        return (StatusCode::UNPROCESSABLE_ENTITY, Json(status)).into_response();
    }
    let name = object["metadata"]["name"].as_str().map(ToOwned::to_owned).or(stem).unwrap();
    object["metadata"]["name"] = json!(name);
    object["metadata"]["namespace"] = json!("demo");
    object["metadata"]["uid"] = json!(format!("uid-{name}"));
    object["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:09Z");
    let identity = match plural.as_str() {
        "aetherapprovals" => "reviewer",
        "aethernotes" => "author",
        _ => "requestedBy",
    };
    object["spec"][identity] = json!({"username": "ada"});
    shared.records.lock().unwrap().insert((plural, name), object.clone());
    shared.seen.send_modify(|seen| seen.created.push(object.clone()));
    (StatusCode::CREATED, Json(object)).into_response()
}

async fn record(State(shared): Api, Path(key): Path<(String, String)>) -> Response {
    match shared.records.lock().unwrap().get(&key) {
        Some(object) => Json(object.clone()).into_response(),
        None => not_found(&key.1),
    }
}

async fn patch_record(State(shared): Api, Path(key): Path<(String, String)>, body: Bytes) -> Response {
    let patch: Value = serde_json::from_slice(&body).unwrap();
    shared.seen.send_modify(|seen| seen.patched.push(patch.clone()));
    match shared.records.lock().unwrap().get_mut(&key) {
        Some(object) => {
            object["spec"]["resolved"] = patch["spec"]["resolved"].clone();
            Json(object.clone()).into_response()
        }
        None => not_found(&key.1),
    }
}

async fn delete_record(State(shared): Api, Path(key): Path<(String, String)>) -> Response {
    let Some(object) = shared.records.lock().unwrap().remove(&key) else { return not_found(&key.1) };
    shared.seen.send_modify(|seen| seen.deleted.push(key.1));
    Json(object).into_response()
}

/// A commit of session `fix-login` that somebody asked for.
pub(crate) fn commit(name: &str, by: &str, status: Value) -> Value {
    json!({
        "apiVersion": "aether.dev/v1alpha1", "kind": "AetherCommit",
        "metadata": {"name": name, "namespace": "demo", "uid": format!("uid-{name}"), "creationTimestamp": "2026-01-01T00:00:05Z"},
        "spec": {
            "session": "fix-login", "target": {"git": {"branch": "agents/x", "message": "why\n\nmore"}},
            "requestedBy": {"username": by},
        },
        "status": status,
    })
}

fn command_object(behaviour: &Behaviour) -> Value {
    let mut status = json!({"phase": "Running", "podName": "fix-login-x-pod"});
    if let Some(code) = behaviour.exit_code {
        status = json!({"phase": "Succeeded", "podName": "fix-login-x-pod", "exitCode": code, "finished": "2026-01-01T00:00:00Z"});
    }
    json!({
        "apiVersion": "aether.dev/v1alpha1", "kind": "AetherCommand", "metadata": {"name": "fix-login-x", "namespace": "demo", "uid": "c"},
        "spec": {"session": "fix-login", "command": ["true"]}, "status": status,
    })
}

async fn create_command(State(shared): Api, Json(object): Json<Value>) -> Response {
    shared.seen.send_modify(|seen| seen.created.push(object));
    (StatusCode::CREATED, Json(command_object(&shared.behaviour))).into_response()
}

async fn commands(State(shared): Api, Query(query): Query<HashMap<String, String>>) -> Response {
    let gone = !shared.seen.borrow().deleted.is_empty();
    listed(&query, if gone { vec![] } else { vec![command_object(&shared.behaviour)] })
}

async fn delete_command(State(shared): Api, Path(name): Path<String>) -> Response {
    shared.seen.send_modify(|seen| seen.deleted.push(name));
    Json(command_object(&shared.behaviour)).into_response()
}

fn pod_object(behaviour: &Behaviour) -> Value {
    let state = match behaviour.exit_code {
        Some(code) => json!({"terminated": {"exitCode": code}}),
        None => json!({"running": {}}),
    };
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "fix-login-x-pod", "namespace": "demo"}, "spec": {"containers": [{"name": "command"}]},
        "status": {"containerStatuses": [{"name": "command", "state": state, "ready": false, "restartCount": 0, "image": "i", "imageID": "i"}]},
    })
}

async fn pods(State(shared): Api, Query(query): Query<HashMap<String, String>>) -> Response {
    listed(&query, vec![pod_object(&shared.behaviour)])
}

async fn pod(State(shared): Api, Path(name): Path<String>) -> Response {
    if shared.seen.borrow().deleted.is_empty() {
        Json(pod_object(&shared.behaviour)).into_response()
    } else {
        not_found(&name)
    }
}

/// The log; one that is followed ends with the command.
async fn log(State(shared): Api, Query(query): Query<HashMap<String, String>>) -> Response {
    let said = Ok::<_, Infallible>(Bytes::from_static(shared.behaviour.log.as_bytes()));
    if !query.contains_key("follow") {
        return Body::from_stream(stream::iter([said])).into_response();
    }
    let mut seen = shared.seen.subscribe();
    shared.seen.send_modify(|seen| seen.followed = true);
    let end = stream::once(async move {
        let _ = seen.wait_for(|seen| !seen.deleted.is_empty()).await;
        Ok(Bytes::from_static(b"ended\n"))
    });
    Body::from_stream(stream::iter([said]).chain(end)).into_response()
}
