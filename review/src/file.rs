//! One file of a tree: found by its path, without following a symlink, and read if it is a text of reasonable size.

use aether_cas::tree::{Directory, Node};
use aether_cas::{Blob, Store, StoreError};
use axum::extract::{Path, Query, State};
use axum::{Extension, Json};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::api::{Service, tree_of, unreadable};
use crate::authorize::{CHECKPOINTS, may_read};
use crate::discovery;
use crate::follow;
use crate::front_proxy::Identity;
use crate::status::ApiError;

/// The largest file whose lines are looked at.
pub(crate) const TEXT: u64 = 1 << 20;

/// The regular file at `path` of the tree, from its root on: its contents, and whether it may be executed.
///
/// # Errors
/// Those of the store.
pub async fn find(store: &dyn Store, root: Blob, path: &str) -> Result<Option<(Blob, bool)>, StoreError> {
    let mut names: Vec<&[u8]> = path.split('/').map(str::as_bytes).collect();
    let Some(last) = names.pop() else { return Ok(None) };
    let mut blob = root;
    for name in names {
        match entry(store, blob, name).await? {
            Some(Node::Directory(below)) => blob = below,
            _ => return Ok(None),
        }
    }
    Ok(match entry(store, blob, last).await? {
        Some(Node::File { content, attributes, .. }) => Some((content, attributes.mode & 0o100 != 0)),
        _ => None,
    })
}

async fn entry(store: &dyn Store, blob: Blob, name: &[u8]) -> Result<Option<Node>, StoreError> {
    let data = store.read(blob).await?;
    let mut directory = Directory::decode(&data).map_err(|source| StoreError::NotADirectory { blob, source })?;
    let found = directory.entries.keys().find(|other| other.as_bytes() == name).cloned();
    Ok(found.and_then(|name| directory.entries.remove(&name)))
}

/// The contents, if they have lines: not too large, and without a NUL among the first bytes, where git looks for one.
///
/// # Errors
/// Those of the store.
pub(crate) async fn text(store: &dyn Store, content: Blob) -> Result<Option<Bytes>, StoreError> {
    if content.size > TEXT {
        return Ok(None);
    }
    let data = store.read(content).await?;
    Ok((!data[..data.len().min(8000)].contains(&0)).then_some(data))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Parameters {
    path: String,
}

pub(crate) async fn answer(
    State(service): State<Service>,
    Extension(identity): Extension<Identity>,
    Path((namespace, name)): Path<(String, String)>,
    parameters: Result<Query<Parameters>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<Value>, ApiError> {
    let Query(Parameters { path }) = parameters.map_err(|error| ApiError::bad_request(error.body_text()))?;
    may_read(&service.client, &identity, CHECKPOINTS, &namespace, &name).await?;
    let root = tree_of(&service.checkpoint(&namespace, &name).await?, &name)?;
    let unreadable = |error: StoreError| unreadable(CHECKPOINTS, &name, &format!("checkpoint {name}"), &error);
    let found = find(&*service.store, root, &path).await.map_err(unreadable)?;
    let Some((content, executable)) = found else { return Err(ApiError::file_not_found(&name, &path)) };
    let text = text(&*service.store, content).await.map_err(unreadable)?;
    Ok(Json(json!({
        "kind": "CheckpointFile", "apiVersion": discovery::version(), "metadata": {"name": name, "namespace": namespace},
        "path": path, "digest": content.digest.to_string(), "size": content.size, "executable": executable,
        "lines": text.as_ref().map(|text| follow::count(text)),
        "text": text.as_ref().and_then(|text| std::str::from_utf8(text).ok()),
    })))
}
