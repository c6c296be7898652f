//! The lines of the audit log that are of one commit: what became of it, and what was said of it, also what was withdrawn.
//!
//! Lines since the commit was made are read and checked to be a chain that ends where the cluster says; whether the log is
//! whole from its beginning on says `aether-operator audit verify`.

use aether_api::AetherCommit;
use aether_audit::{Error, Held, Log, Seen};
use axum::extract::{Path, State};
use axum::{Extension, Json};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::Api;
use serde_json::{Value, json};

use crate::api::Service;
use crate::authorize::{COMMITS, may_read};
use crate::discovery;
use crate::front_proxy::Identity;
use crate::status::ApiError;

/// What the operator keeps the end of the log in.
const END: &str = "aether-audit";
/// By how much clocks may differ.
const SKEW: SignedDuration = SignedDuration::from_hours(1);

pub(crate) async fn answer(
    State(service): State<Service>,
    Extension(identity): Extension<Identity>,
    Path((namespace, name)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    may_read(&service.client, &identity, COMMITS, &namespace, &name).await?;
    let commit: AetherCommit = service.object(COMMITS, &namespace, &name).await?;
    let _permit =
        service.streams.acquire().await.map_err(|_| ApiError::unavailable("the review server is shutting down"))?;
    let maps: Api<ConfigMap> = Api::namespaced(service.client.clone(), &service.namespace);
    let map = maps.get_opt(END).await;
    let map =
        map.map_err(|error| ApiError::unavailable(format!("the end of the audit log cannot be read: {error}")))?;
    // The first line of a commit is written before it is known what it is of.
    let told = commit.status.as_ref().is_some_and(|status| status.root.is_some() || status.finished.is_some());
    let held = match map {
        None if told => {
            return Err(ApiError::unavailable(format!(
                "the audit log has lines on this commit, and nothing says where it ends: ConfigMap {END} is not in namespace {}; the operator writes it again with the next line",
                service.namespace
            )));
        }
        None => Held::NOTHING,
        Some(map) => Held::read(&map.data.unwrap_or_default(), None)
            .ok_or_else(|| ApiError::internal("the cluster does not say where the audit log ends"))?,
    };
    let made = commit.metadata.creation_timestamp.map_or(Timestamp::UNIX_EPOCH, |time| time.0);
    let (end, seen) = (held.head.to_string(), Seen(held));
    let mut items = Vec::new();
    let log = Log { store: &*service.store, anchor: &seen };
    let read = log.since(made - SKEW, |entry| {
        // An earlier commit may have had the name.
        if entry.object.namespace == namespace && entry.object.is_of("AetherCommit", &name) && entry.time >= made {
            items.push(json!({
                "time": entry.time, "actor": entry.actor, "verb": entry.verb, "object": entry.object, "root": entry.root,
            }));
        }
    });
    read.await.map_err(|error| match error {
        Error::Store(error) if error.is_transient() => {
            ApiError::unavailable(format!("the audit log cannot be read now: {error}"))
        }
        error => ApiError::internal(format!("the audit log cannot be read: {error}")),
    })?;
    Ok(Json(json!({
        "kind": "CommitAudit", "apiVersion": discovery::version(), "metadata": {"name": name, "namespace": namespace},
        "end": end, "items": items,
    })))
}
