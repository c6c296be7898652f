//! What is served, and the changes of checkpoints and commits: two trees, and a stream of what differs.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use aether_api::session::Durability;
use aether_api::{AetherCheckpoint, AetherCommit, conditions};
use aether_cas::{Blob, Store};
use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use http::header;
use kube::api::Api;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tracing::{info, warn};

use crate::authorize::{CHECKPOINTS, COMMITS, may_read};
use crate::changes::{self, Changes, Options};
use crate::fast_import::{self, Titles, Transfer};
use crate::front_proxy::{Identity, Trust};
use crate::metrics::{Metrics, Outcome};
use crate::status::ApiError;
use crate::{audit, discovery, file, notes, subject};

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
    /// The namespace of this program and of the operator.
    pub namespace: String,
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
    let of = |rest: &str| format!("{}/namespaces/{{namespace}}/{rest}", discovery::base());
    discovery::routes()
        .route(&of("checkpoints/{name}/changes"), get(changes_of_checkpoint))
        .route(&of("checkpoints/{name}/file"), get(file::answer))
        .route(&of("commits/{name}/audit"), get(audit::answer))
        .route(&of("commits/{name}/changes"), get(changes_of_commit))
        .route(&of("sessions/{name}/notes"), get(notes::answer))
        .route(&format!("{}/selfsubjectreviews", discovery::base()), post(subject::answer))
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

async fn changes_of_checkpoint(
    state: State<Service>,
    identity: Extension<Identity>,
    path: Path<(String, String)>,
    parameters: AskedFor,
) -> Result<Response, ApiError> {
    changes(state, identity, Of::Checkpoint, path, parameters).await
}

async fn changes_of_commit(
    state: State<Service>,
    identity: Extension<Identity>,
    path: Path<(String, String)>,
    parameters: AskedFor,
) -> Result<Response, ApiError> {
    changes(state, identity, Of::Commit, path, parameters).await
}

/// Whose changes are asked for.
#[derive(Clone, Copy)]
enum Of {
    Checkpoint,
    /// By the tree that the commit's own status names, because that is what approvals name.
    Commit,
}

impl Of {
    fn plural(self) -> &'static str {
        match self {
            Self::Checkpoint => CHECKPOINTS,
            Self::Commit => COMMITS,
        }
    }
}

async fn changes(
    State(service): State<Service>,
    Extension(identity): Extension<Identity>,
    of: Of,
    Path((namespace, name)): Path<(String, String)>,
    parameters: AskedFor,
) -> Result<Response, ApiError> {
    let requests = service.metrics.requests.clone();
    let answer = begin(service, identity, of, (namespace, name), parameters).await;
    if let Err(error) = &answer {
        requests.of((Outcome::of_answer(error),)).inc();
    }
    answer
}

/// Compares the trees and begins to send what differs; the rest goes on by itself, and is counted when it ends.
async fn begin(
    service: Service,
    identity: Identity,
    of: Of,
    (namespace, name): (String, String),
    parameters: AskedFor,
) -> Result<Response, ApiError> {
    let Query(parameters) = parameters.map_err(|error| ApiError::bad_request(error.body_text()))?;
    // Whoever may not read it does not learn whether it is there.
    may_read(&service.client, &identity, of.plural(), &namespace, &name).await?;
    if let Some(against) = &parameters.against {
        may_read(&service.client, &identity, CHECKPOINTS, &namespace, against).await?;
    }
    let asked = match of {
        Of::Checkpoint => Asked::checkpoint(&service.checkpoint(&namespace, &name).await?, &name)?,
        Of::Commit => Asked::commit(&service.object(COMMITS, &namespace, &name).await?, &name)?,
    };
    let head = asked.head;
    let (base, base_title) = match &parameters.against {
        Some(against) => {
            (tree_of(&service.checkpoint(&namespace, against).await?, against)?, format!("checkpoint {against}"))
        }
        None => asked.base?,
    };
    let noun = asked.title;
    let titles = Titles { base: base_title, head: noun.clone() };
    let permit = service
        .streams
        .clone()
        .acquire_owned()
        .await
        .map_err(|_| ApiError::unavailable("the review server is shutting down"))?;
    let under_way = service.metrics.under_way();
    let options = Options { git: parameters.git, directory_bytes: service.directory_bytes };
    let changes = Changes::between(&*service.store, base, head, options).await.map_err(|error| match error {
        changes::Error::TooLarge { .. } => ApiError::too_large(format!("{noun}: {error}")),
        changes::Error::Store(error) => unreadable(of.plural(), &name, &noun, &error),
    })?;
    fast_import::require(&*service.store, &changes.contents())
        .await
        .map_err(|error| unreadable(of.plural(), &name, &noun, &error))?;
    info!(
        user = identity.user,
        namespace,
        of = noun,
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
            warn!(namespace, of = noun, "changes not sent to their end: {error}");
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

/// What cannot be read of the object `noun`.
pub(crate) fn unreadable(plural: &'static str, name: &str, noun: &str, error: &aether_cas::StoreError) -> ApiError {
    warn!(of = noun, "the store: {error}");
    match error {
        error if error.is_transient() => ApiError::unavailable(format!("{noun} cannot be read now: {error}")),
        error if error.is_missing() => {
            ApiError::conflict(plural, name, format!("{noun} is not complete in the store: {error}"))
        }
        error => ApiError::internal(format!("{noun} cannot be read: {error}")),
    }
}

impl Service {
    pub(crate) async fn checkpoint(&self, namespace: &str, name: &str) -> Result<AetherCheckpoint, ApiError> {
        self.object(CHECKPOINTS, namespace, name).await
    }

    pub(crate) async fn object<K>(&self, plural: &'static str, namespace: &str, name: &str) -> Result<K, ApiError>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug,
        K::DynamicType: Default,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        match api.get_opt(name).await {
            Ok(Some(object)) => Ok(object),
            Ok(None) => Err(ApiError::object_not_found(plural, name)),
            Err(error) => Err(ApiError::unavailable(format!("cannot read {plural} {name}: {error}"))),
        }
    }
}

/// What an object says of itself.
struct Asked {
    head: Blob,
    title: String,
    /// Where its session started, or why that is not known; matters only without another base.
    base: Result<(Blob, String), ApiError>,
}

impl Asked {
    fn checkpoint(checkpoint: &AetherCheckpoint, name: &str) -> Result<Self, ApiError> {
        let (head, base) = (tree_of(checkpoint, name)?, start_of(checkpoint, name));
        Ok(Self { head, title: format!("checkpoint {name}"), base })
    }

    fn commit(commit: &AetherCommit, name: &str) -> Result<Self, ApiError> {
        let status = commit.status.clone().unwrap_or_default();
        let root = status.root.ok_or_else(|| {
            ApiError::conflict(
                COMMITS,
                name,
                format!("commit {name} has no tree yet: its checkpoint is on its way to the store"),
            )
        })?;
        let title = format!("commit {name}");
        let base = match status.base {
            Some(base) => {
                let from = match (&status.source, &base.revision) {
                    (Some(source), Some(revision)) => format!("source {}, revision {revision}", source.name),
                    _ => "the session's start".into(),
                };
                parse(&base.root, &title).map(|root| (root, from))
            }
            None => Err(ApiError::conflict(
                COMMITS,
                name,
                format!(
                    "commit {name} does not say where its session started: compare it with a checkpoint (against=NAME)"
                ),
            )),
        };
        Ok(Self { head: parse(&root, &title)?, title, base })
    }
}

/// The checkpoint's tree, once the store has it.
pub(crate) fn tree_of(checkpoint: &AetherCheckpoint, name: &str) -> Result<Blob, ApiError> {
    let status = checkpoint.status.as_ref();
    let conditions = status.map(|status| status.conditions.as_slice()).unwrap_or_default();
    if let Some(failed) = conditions::get(conditions, conditions::FAILED).filter(|failed| failed.status == "True") {
        return Err(ApiError::conflict(CHECKPOINTS, name, format!("checkpoint {name} failed: {}", failed.message)));
    }
    match status {
        Some(status) if status.durability == Some(Durability::Durable) => match &status.root {
            Some(root) => parse(root, &format!("checkpoint {name}")),
            None => Err(ApiError::internal(format!("checkpoint {name} is durable but has no root"))),
        },
        _ => Err(ApiError::conflict(
            CHECKPOINTS,
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
            CHECKPOINTS,
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
    Ok((parse(root, &format!("checkpoint {name}"))?, title))
}

/// The tree that `noun` names.
pub(crate) fn parse(root: &str, noun: &str) -> Result<Blob, ApiError> {
    fast_import::root(root).map_err(|problem| ApiError::internal(format!("{noun} names no tree: {problem}")))
}
