//! Where the lines of a session's notes are in its head. Found out when somebody asks, so that no controller reads contents.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use aether_api::session::Durability;
use aether_api::{AetherCheckpoint, AetherNote, AetherSession};
use aether_cas::{Blob, Store, StoreError};
use axum::extract::{Path, State};
use axum::{Extension, Json};
use bytes::Bytes;
use kube::ResourceExt;
use kube::api::{Api, ListParams};
use serde::Serialize;
use serde_json::{Value, json};

use crate::api::{Service, parse, tree_of};
use crate::authorize::{CHECKPOINTS, NOTES, SESSIONS, may_list, may_read};
use crate::discovery;
use crate::file::{find, text};
use crate::follow::{Place, follow};
use crate::front_proxy::Identity;
use crate::status::ApiError;

/// The most notes of a session that are looked at, the newest.
const MOST: usize = 500;
/// How long all comparisons of one answer may be fine; then they become coarse.
const FINE: Duration = Duration::from_secs(5);

/// Where the lines of one note are.
#[derive(Debug, Serialize, PartialEq, Eq)]
struct Placed {
    note: String,
    #[serde(flatten)]
    state: Whereabouts,
}

#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
#[serde(tag = "state")]
enum Whereabouts {
    /// Where they were.
    Same {
        #[serde(skip_serializing_if = "Option::is_none")]
        from: Option<u32>,
        #[serde(skip_serializing_if = "Option::is_none")]
        to: Option<u32>,
    },
    /// Elsewhere in the file.
    Moved { from: u32, to: u32 },
    /// The file is there, and is another; the note is on all of it.
    Changed,
    /// The lines, or the file, are not there any more.
    Gone,
    /// It cannot be said.
    Unknown { reason: String },
}

pub(crate) async fn answer(
    State(service): State<Service>,
    Extension(identity): Extension<Identity>,
    Path((namespace, name)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    may_read(&service.client, &identity, SESSIONS, &namespace, &name).await?;
    may_list(&service.client, &identity, NOTES, &namespace).await?;
    let session: AetherSession = service.object(SESSIONS, &namespace, &name).await?;
    let _permit =
        service.streams.acquire().await.map_err(|_| ApiError::unavailable("the review server is shutting down"))?;
    let mut notes: Vec<AetherNote> = list(&service.client, &namespace, "notes").await?;
    let named: HashSet<String> = notes.iter().map(|note| note.spec.checkpoint.clone()).collect();
    let checkpoints = Checkpoints::of(&service, &identity, &namespace, &session, &named).await?;
    notes.retain(|note| checkpoints.0.contains_key(&note.spec.checkpoint));
    notes.sort_by_key(|note| std::cmp::Reverse(note.metadata.creation_timestamp.clone().map(|time| time.0)));
    notes.truncate(MOST);
    let head = head(&session, &name)?;
    let mut items = Vec::with_capacity(notes.len());
    let mut search = Search { store: &*service.store, deadline: Instant::now() + FINE, seen: HashMap::new() };
    for note in &notes {
        let state = match (&head, &checkpoints.0[&note.spec.checkpoint]) {
            (Err(reason), _) | (_, Err(reason)) => Whereabouts::Unknown { reason: reason.clone() },
            (Ok(head), Ok(root)) => match search.place(note, *root, *head).await {
                Ok(state) => state,
                Err(error) if error.is_transient() => {
                    return Err(ApiError::unavailable(format!("session {name} cannot be read now: {error}")));
                }
                Err(error) => Whereabouts::Unknown { reason: error.to_string() },
            },
        };
        items.push(Placed { note: note.name_any(), state });
    }
    Ok(Json(json!({
        "kind": "SessionNotes", "apiVersion": discovery::version(), "metadata": {"name": name, "namespace": namespace},
        "root": head.ok().map(|root| root.to_string()), "items": items,
    })))
}

async fn list<K>(client: &kube::Client, namespace: &str, what: &str) -> Result<Vec<K>, ApiError>
where
    K: kube::Resource<Scope = kube::core::NamespaceResourceScope>
        + Clone
        + serde::de::DeserializeOwned
        + std::fmt::Debug,
    K::DynamicType: Default,
{
    let listed = Api::namespaced(client.clone(), namespace).list(&ListParams::default()).await;
    Ok(listed.map_err(|error| ApiError::unavailable(format!("cannot list {what}: {error}")))?.items)
}

/// The tree of the session's head, or why it cannot be looked at.
fn head(session: &AetherSession, name: &str) -> Result<Result<Blob, String>, ApiError> {
    let head = session.status.as_ref().and_then(|status| status.head.as_ref());
    Ok(match head {
        None => Err("the session has no head yet: take a checkpoint".into()),
        Some(head) if head.durability != Durability::Durable => {
            Err("the session's head is not in the store yet".into())
        }
        Some(head) => Ok(parse(&head.root, &format!("session {name}"))?),
    })
}

/// The checkpoints of a session that notes name, by name: the tree of each, or why the caller cannot have it.
struct Checkpoints(BTreeMap<String, Result<Blob, String>>);

impl Checkpoints {
    async fn of(
        service: &Service,
        identity: &Identity,
        namespace: &str,
        session: &AetherSession,
        named: &HashSet<String>,
    ) -> Result<Self, ApiError> {
        let (name, uid) = (session.name_any(), session.uid());
        let mut trees = BTreeMap::new();
        for checkpoint in list::<AetherCheckpoint>(&service.client, namespace, "checkpoints").await? {
            let of = checkpoint.status.as_ref().and_then(|status| status.session_uid.clone());
            // Another session may have had the name before.
            if !named.contains(&checkpoint.name_any()) || checkpoint.spec.session != name || (of.is_some() && of != uid)
            {
                continue;
            }
            let id = checkpoint.name_any();
            let tree = match may_read(&service.client, identity, CHECKPOINTS, namespace, &id).await {
                Ok(()) => tree_of(&checkpoint, &id).map_err(|error| error.message().to_owned()),
                Err(error) => Err(error.message().to_owned()),
            };
            trees.insert(id, tree);
        }
        Ok(Self(trees))
    }
}

/// One answer's look into the store. Notes are often on one file.
struct Search<'a> {
    store: &'a dyn Store,
    deadline: Instant,
    seen: HashMap<(Blob, String), Option<Blob>>,
}

impl Search<'_> {
    async fn find(&mut self, root: Blob, path: &str) -> Result<Option<Blob>, StoreError> {
        let key = (root, path.to_owned());
        if let Some(found) = self.seen.get(&key) {
            return Ok(*found);
        }
        let found = find(self.store, root, path).await?.map(|(content, _)| content);
        self.seen.insert(key, found);
        Ok(found)
    }

    async fn place(&mut self, note: &AetherNote, then: Blob, now: Blob) -> Result<Whereabouts, StoreError> {
        let (path, lines) = (&note.spec.path, note.spec.lines.as_ref());
        let Some(new) = self.find(now, path).await? else { return Ok(Whereabouts::Gone) };
        let (from, to) = (lines.map(|lines| lines.from), lines.map(|lines| lines.to));
        let Some(old) = self.find(then, path).await? else {
            return Ok(Whereabouts::Unknown { reason: "the file is not in the note's checkpoint".into() });
        };
        if old == new {
            return Ok(Whereabouts::Same { from, to });
        }
        let Some(lines) = lines else { return Ok(Whereabouts::Changed) };
        let (Some(old), Some(new)) = (text(self.store, old).await?, text(self.store, new).await?) else {
            return Ok(Whereabouts::Unknown { reason: "the file is no text of reasonable size".into() });
        };
        Ok(followed(old, new, lines.from, lines.to, self.deadline).await)
    }
}

/// Compares on a thread that may be busy.
async fn followed(old: Bytes, new: Bytes, from: u32, to: u32, deadline: Instant) -> Whereabouts {
    match tokio::task::spawn_blocking(move || follow(&old, &new, from, to, deadline)).await {
        Ok(Place::At { from: first, to: last }) if (first, last) == (from, to) => {
            Whereabouts::Same { from: Some(from), to: Some(to) }
        }
        Ok(Place::At { from, to }) => Whereabouts::Moved { from, to },
        Ok(Place::Gone) => Whereabouts::Gone,
        Err(error) => Whereabouts::Unknown { reason: error.to_string() },
    }
}
