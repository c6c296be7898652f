//! What is served: discovery, a minimal OpenAPI, and the changes of checkpoints.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use aether_api::session::Durability;
use aether_api::{AetherCheckpoint, conditions, names};
use aether_cas::{Blob, Store};
use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Json, Router};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use http::header;
use kube::api::Api;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tracing::{info, warn};

use crate::authorize::may_read;
use crate::changes::{self, Changes, Options};
use crate::fast_import::{self, Titles, Transfer};
use crate::front_proxy::{Identity, Trust};
use crate::metrics::{Metrics, Outcome};
use crate::status::ApiError;

/// Media type of the stream.
pub const FAST_IMPORT: &str = "application/vnd.git.fast-import";
/// Pieces of a stream that may wait for the network.
const PIECES: usize = 4;

/// What a connection proved. Every request of it carries this.
#[derive(Clone, Debug)]
pub struct Peer {
    /// What headers to believe.
    pub trust: Arc<Trust>,
    /// Whether the other end is the API server's front proxy.
    pub front_proxy: bool,
}

/// What requests are answered with.
#[derive(Clone)]
pub struct Service {
    /// The API server, as this program.
    pub client: kube::Client,
    /// The contents.
    pub store: Arc<dyn Store>,
    /// Bounds the diffs sent at one time.
    pub streams: Arc<Semaphore>,
    /// The most bytes of directory messages of one diff.
    pub directory_bytes: u64,
    /// Where large contents pass through.
    pub spool: Option<PathBuf>,
    /// How long one piece of a diff may wait for its reader.
    pub patience: Duration,
    /// What is counted.
    pub metrics: Metrics,
}

/// All routes. Each wants a [`Peer`] among the request's extensions and answers 401 without one that is trusted.
pub fn router(service: Service) -> Router {
    let base = format!("/apis/{}/{}", names::REVIEW_GROUP, names::VERSION);
    Router::new()
        .route("/apis", get(async || Json(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": [group()]}))))
        .route(&format!("/apis/{}", names::REVIEW_GROUP), get(async || Json(group())))
        .route(&base, get(async || Json(resources())))
        .route(&format!("{base}/namespaces/{{namespace}}/checkpoints/{{name}}/changes"), get(changes))
        .route("/openapi/v2", get(async || Json(openapi_v2())))
        .route("/openapi/v3", get(async || Json(openapi_index())))
        .route(&format!("/openapi/v3{base}"), get(async || Json(openapi_v3())))
        .fallback(async || ApiError::no_such_path())
        .layer(from_fn(authenticate))
        .with_state(service)
}

/// Lets through what the front proxy asks on behalf of a user.
async fn authenticate(mut request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<Peer>().filter(|peer| peer.front_proxy);
    match peer.and_then(|peer| peer.trust.identity(request.headers())) {
        Some(identity) => {
            request.extensions_mut().insert(identity);
            next.run(request).await
        }
        None => ApiError::unauthorized().into_response(),
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    /// The checkpoint to compare with, instead of where the session started.
    against: Option<String>,
    /// Whether to compare `.git` too.
    #[serde(default)]
    git: bool,
}

type AskedFor = Result<Query<Parameters>, axum::extract::rejection::QueryRejection>;

async fn changes(
    State(service): State<Service>,
    Extension(identity): Extension<Identity>,
    Path((namespace, name)): Path<(String, String)>,
    parameters: AskedFor,
) -> Result<Response, ApiError> {
    let requests = service.metrics.requests.clone();
    let answer = begin(service, identity, (namespace, name), parameters).await;
    if let Err(error) = &answer {
        requests.of((Outcome::of_answer(error),)).inc();
    }
    answer
}

/// Compares the trees and begins to send what differs; the rest goes on by itself, and is counted when it ends.
async fn begin(
    service: Service,
    identity: Identity,
    (namespace, name): (String, String),
    parameters: AskedFor,
) -> Result<Response, ApiError> {
    let Query(parameters) = parameters.map_err(|error| ApiError::bad_request(error.body_text()))?;
    // Whoever may not read it does not learn whether it is there.
    may_read(&service.client, &identity, &namespace, &name).await?;
    if let Some(against) = &parameters.against {
        may_read(&service.client, &identity, &namespace, against).await?;
    }
    let checkpoint = service.checkpoint(&namespace, &name).await?;
    let head = tree_of(&checkpoint, &name)?;
    let (base, base_title) = match &parameters.against {
        Some(against) => {
            (tree_of(&service.checkpoint(&namespace, against).await?, against)?, format!("checkpoint {against}"))
        }
        None => start_of(&checkpoint, &name)?,
    };
    let titles = Titles { base: base_title, head: format!("checkpoint {name}") };
    let permit = service
        .streams
        .clone()
        .acquire_owned()
        .await
        .map_err(|_| ApiError::unavailable("the review server is shutting down"))?;
    let under_way = service.metrics.under_way();
    let options = Options { git: parameters.git, directory_bytes: service.directory_bytes };
    let changes = Changes::between(&*service.store, base, head, options).await.map_err(|error| match error {
        changes::Error::TooLarge { .. } => ApiError::too_large(format!("checkpoint {name}: {error}")),
        changes::Error::Store(error) => unreadable(&name, &error),
    })?;
    fast_import::require(&*service.store, &changes.contents()).await.map_err(|error| unreadable(&name, &error))?;
    info!(
        user = identity.user,
        namespace,
        checkpoint = name,
        base = changes.base.len(),
        head = changes.head.len(),
        "sending changes"
    );

    let (sender, receiver) = mpsc::channel(PIECES);
    let (last_word, end) = oneshot::channel();
    let bytes = service.metrics.sent.clone();
    tokio::spawn(async move {
        let transfer = Transfer { spool: service.spool.as_deref(), patience: service.patience };
        let written = fast_import::write(service.store, &changes, &titles, transfer, &sender).await;
        service.metrics.requests.of((Outcome::of_stream(&written),)).inc();
        if let Err(error) = &written {
            warn!(namespace, checkpoint = name, "changes not sent to their end: {error}");
        }
        // Nothing here waits for the reader any more: a stalled one keeps the pieces that it did not take, and this.
        drop((changes, under_way, permit));
        let _ = last_word.send(written);
    });
    let pieces = ReceiverStream::new(receiver).map(Ok).inspect_ok(move |piece: &Bytes| {
        bytes.inc_by(piece.len() as u64);
    });
    // Anything but a whole stream breaks the connection, so that nobody takes the part for the whole.
    let end = stream::once(end).filter_map(async |end| match end {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(Err(std::io::Error::other(error))),
        Err(_) => Some(Err(std::io::Error::other("the stream broke off"))),
    });
    let headers = [
        (header::CONTENT_TYPE, FAST_IMPORT),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    Ok((headers, Body::from_stream(pieces.chain(end))).into_response())
}

fn unreadable(name: &str, error: &aether_cas::StoreError) -> ApiError {
    warn!(checkpoint = name, "the store: {error}");
    match error {
        error if error.is_transient() => {
            ApiError::unavailable(format!("checkpoint {name} cannot be read now: {error}"))
        }
        error if error.is_missing() => {
            ApiError::conflict(name, format!("checkpoint {name} is not complete in the store: {error}"))
        }
        error => ApiError::internal(format!("checkpoint {name} cannot be read: {error}")),
    }
}

impl Service {
    async fn checkpoint(&self, namespace: &str, name: &str) -> Result<AetherCheckpoint, ApiError> {
        let api: Api<AetherCheckpoint> = Api::namespaced(self.client.clone(), namespace);
        match api.get_opt(name).await {
            Ok(Some(checkpoint)) => Ok(checkpoint),
            Ok(None) => Err(ApiError::checkpoint_not_found(name)),
            Err(error) => Err(ApiError::unavailable(format!("cannot read checkpoint {name}: {error}"))),
        }
    }
}

/// The checkpoint's tree, once the store has it.
fn tree_of(checkpoint: &AetherCheckpoint, name: &str) -> Result<Blob, ApiError> {
    let status = checkpoint.status.as_ref();
    let conditions = status.map(|status| status.conditions.as_slice()).unwrap_or_default();
    if let Some(failed) = conditions::get(conditions, conditions::FAILED).filter(|failed| failed.status == "True") {
        return Err(ApiError::conflict(name, format!("checkpoint {name} failed: {}", failed.message)));
    }
    match status {
        Some(status) if status.durability == Some(Durability::Durable) => match &status.root {
            Some(root) => parse(root, name),
            None => Err(ApiError::internal(format!("checkpoint {name} is durable but has no root"))),
        },
        _ => Err(ApiError::conflict(
            name,
            format!("checkpoint {name} is not in the store yet: wait for its condition Durable"),
        )),
    }
}

/// Where the checkpoint's session started: the source's revision, also for forks; else the tree it was made from.
fn start_of(checkpoint: &AetherCheckpoint, name: &str) -> Result<(Blob, String), ApiError> {
    let base = checkpoint.status.as_ref().and_then(|status| status.base.as_ref());
    let unknown = || {
        ApiError::conflict(
            name,
            format!(
                "checkpoint {name} does not say where its session started: compare it with another checkpoint (against=NAME)"
            ),
        )
    };
    let base = base.ok_or_else(unknown)?;
    let root = base.revision_root.as_ref().or(base.root.as_ref()).ok_or_else(unknown)?;
    let title = match (&base.source_name, &base.revision) {
        (Some(source), Some(revision)) => format!("source {source}, revision {revision}"),
        _ => "the session's start".into(),
    };
    Ok((parse(root, name)?, title))
}

fn parse(root: &str, name: &str) -> Result<Blob, ApiError> {
    fast_import::root(root).map_err(|problem| ApiError::internal(format!("checkpoint {name} names no tree: {problem}")))
}

fn group() -> serde_json::Value {
    let version =
        json!({"groupVersion": format!("{}/{}", names::REVIEW_GROUP, names::VERSION), "version": names::VERSION});
    json!({"kind": "APIGroup", "apiVersion": "v1", "name": names::REVIEW_GROUP, "versions": [version], "preferredVersion": version})
}

fn resources() -> serde_json::Value {
    json!({
        "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": format!("{}/{}", names::REVIEW_GROUP, names::VERSION),
        "resources": [{"name": "checkpoints/changes", "singularName": "", "namespaced": true, "kind": "CheckpointChanges", "verbs": ["get"]}],
    })
}

fn path() -> String {
    format!("/apis/{}/{}/namespaces/{{namespace}}/checkpoints/{{name}}/changes", names::REVIEW_GROUP, names::VERSION)
}

const DESCRIPTION: &str =
    "What changed up to a checkpoint, as a git fast-import stream with the branches base and head.";

/// API servers up to 1.26 merge this into theirs.
fn openapi_v2() -> serde_json::Value {
    let parameter = |name: &str, place: &str, type_: &str| json!({"name": name, "in": place, "type": type_, "required": place == "path", "uniqueItems": true});
    json!({
        "swagger": "2.0",
        "info": {"title": "Aether review", "version": names::VERSION},
        "paths": {path(): {"get": {
            "description": DESCRIPTION,
            "operationId": "readReviewAetherDevV1alpha1NamespacedCheckpointChanges",
            "produces": [FAST_IMPORT],
            "parameters": [parameter("namespace", "path", "string"), parameter("name", "path", "string"),
                parameter("against", "query", "string"), parameter("git", "query", "boolean")],
            "responses": {"200": {"description": "OK"}},
        }}},
        "definitions": {},
    })
}

fn openapi_index() -> serde_json::Value {
    let group = format!("apis/{}/{}", names::REVIEW_GROUP, names::VERSION);
    // The hash lets the API server keep its copy; the document changes with the program only.
    let url = format!("/openapi/v3/{group}?hash={}", env!("CARGO_PKG_VERSION"));
    json!({"paths": {group: {"serverRelativeURL": url}}})
}

fn openapi_v3() -> serde_json::Value {
    let parameter = |name: &str, place: &str, type_: &str| json!({"name": name, "in": place, "required": place == "path", "schema": {"type": type_}});
    json!({
        "openapi": "3.0.0",
        "info": {"title": "Aether review", "version": names::VERSION},
        "paths": {path(): {"get": {
            "description": DESCRIPTION,
            "operationId": "readReviewAetherDevV1alpha1NamespacedCheckpointChanges",
            "parameters": [parameter("namespace", "path", "string"), parameter("name", "path", "string"),
                parameter("against", "query", "string"), parameter("git", "query", "boolean")],
            "responses": {"200": {"description": "OK", "content": {FAST_IMPORT: {"schema": {"type": "string", "format": "binary"}}}}},
        }}},
    })
}
