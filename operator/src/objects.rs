//! Reads and writes of API objects, each with an error that names the object.
//!
//! The objects that the operator makes (claims, volumes, Jobs, pods, checkpoints) never change once made, so they
//! are created rather than applied: a create cannot take over an object of that name that belongs to somebody else.
//! A status is written as a merge patch of just the fields that differ, with the resource version that was read:
//! fields of other writers are left alone, and a write based on old knowledge is refused.

use std::fmt::Debug;

use aether_api::names;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use k8s_openapi::{ClusterResourceScope, NamespaceResourceScope};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions, PropagationPolicy};
use kube::core::object::HasStatus;
use kube::{Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// What every object here can do.
pub trait Object:
    Resource<DynamicType = ()> + Clone + DeserializeOwned + Serialize + Debug + Send + Sync + 'static
{
}

impl<K> Object for K where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Serialize + Debug + Send + Sync + 'static
{
}

/// `Kind namespace/name`, for messages.
pub fn describe<K: Object>(namespace: Option<&str>, name: &str) -> String {
    match namespace {
        Some(namespace) => format!("{} {namespace}/{name}", K::kind(&())),
        None => format!("{} {name}", K::kind(&())),
    }
}

fn failed<K: Object>(action: &'static str, namespace: Option<&str>, name: &str) -> impl FnOnce(kube::Error) -> Error {
    let what = describe::<K>(namespace, name);
    move |source| Error::Kube { action, what, source: Box::new(source) }
}

/// The objects of one kind in one namespace.
pub fn namespaced<K>(client: &Client, namespace: &str) -> Api<K>
where
    K: Object + Resource<Scope = NamespaceResourceScope>,
{
    Api::namespaced(client.clone(), namespace)
}

/// The objects of one kind that has no namespaces.
pub fn cluster<K>(client: &Client) -> Api<K>
where
    K: Object + Resource<Scope = ClusterResourceScope>,
{
    Api::all(client.clone())
}

/// The object, if it exists.
pub async fn get<K: Object>(api: &Api<K>, name: &str) -> Result<Option<K>> {
    api.get_opt(name).await.map_err(failed::<K>("read", api.namespace(), name))
}

/// The objects that a label selector selects.
pub async fn list<K: Object>(api: &Api<K>, labels: &str) -> Result<Vec<K>> {
    let parameters = if labels.is_empty() { ListParams::default() } else { ListParams::default().labels(labels) };
    let list = api.list(&parameters).await.map_err(failed::<K>("list", api.namespace(), labels))?;
    Ok(list.items)
}

/// The object, if the API server lists it. Unlike the absence that [`get`] reports, that of a list is an answer about this
/// kind: a server that does not know the kind at this moment says so.
pub async fn find<K: Object>(api: &Api<K>, name: &str) -> Result<Option<K>> {
    let parameters = ListParams::default().fields(&format!("metadata.name={name}"));
    let list = api.list(&parameters).await.map_err(failed::<K>("look for", api.namespace(), name))?;
    Ok(list.items.into_iter().find(|object| object.name_any() == name))
}

/// Creates the object. `None` when one of that name exists.
pub async fn create<K: Object>(api: &Api<K>, object: &K) -> Result<Option<K>> {
    let parameters = PostParams { field_manager: Some(names::OPERATOR_MANAGER.into()), ..PostParams::default() };
    match api.create(&parameters, object).await.map_err(failed::<K>("create", api.namespace(), &object.name_any())) {
        Ok(created) => Ok(Some(created)),
        Err(error) if error.is_already_exists() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes fields of an object as a merge patch, if it is still as it was read.
///
/// # Errors
/// The refused write.
pub async fn merge<K: Object>(api: &Api<K>, object: &K, change: &Value) -> Result<()> {
    let mut change = change.clone();
    change["metadata"] = json!({"resourceVersion": object.resource_version()});
    let parameters = PatchParams { field_manager: Some(names::OPERATOR_MANAGER.into()), ..PatchParams::default() };
    api.patch(&object.name_any(), &parameters, &Patch::Merge(&change)).await.map(drop).map_err(failed::<K>(
        "change",
        object.meta().namespace.as_deref(),
        &object.name_any(),
    ))
}

/// Deletes exactly this object, not a later one of the same name. Being gone already is no error.
pub async fn delete<K: Object>(api: &Api<K>, object: &K) -> Result<()> {
    let name = object.name_any();
    let parameters = DeleteParams {
        preconditions: Some(Preconditions { uid: object.uid(), ..Preconditions::default() }),
        propagation_policy: Some(PropagationPolicy::Background),
        ..DeleteParams::default()
    };
    match api.delete(&name, &parameters).await.map_err(failed::<K>("delete", api.namespace(), &name)) {
        Ok(_) => Ok(()),
        // A conflict says that the uid is another one: ours is gone.
        Err(error) if error.is_not_found() || error.is_conflict() => Ok(()),
        Err(error) => Err(error),
    }
}

/// Writes what differs between the object's status and `wanted`, provided that the object did not change since it
/// was read. `None` when nothing differs, and then nothing is written.
pub async fn write_status<K>(api: &Api<K>, object: &K, wanted: &K::Status) -> Result<Option<K>>
where
    K: Object + HasStatus,
    K::Status: Serialize + Default,
{
    let encode = |status: &K::Status| serde_json::to_value(status).expect("a status has string keys only");
    let now = object.status().map_or(Value::Object(Map::new()), encode);
    let Some(difference) = difference(&now, &encode(wanted)) else { return Ok(None) };
    let name = object.name_any();
    let patch = json!({"metadata": {"resourceVersion": object.resource_version()}, "status": difference});
    api.patch_status(&name, &PatchParams::apply(names::OPERATOR_MANAGER), &Patch::Merge(patch))
        .await
        .map(Some)
        .map_err(failed::<K>("write the status of", api.namespace(), &name))
}

/// The merge patch (RFC 7386) that turns `from` into `to`; `None` when they are equal.
fn difference(from: &Value, to: &Value) -> Option<Value> {
    match (from, to) {
        _ if from == to => None,
        (Value::Object(from), Value::Object(to)) => {
            let gone = from.keys().filter(|key| !to.contains_key(*key)).map(|key| (key.clone(), Value::Null));
            let changed = to.iter().filter_map(|(key, value)| {
                let difference = match from.get(key) {
                    Some(old) => difference(old, value),
                    None => Some(value.clone()),
                };
                Some((key.clone(), difference?))
            });
            Some(Value::Object(gone.chain(changed).collect()))
        }
        _ => Some(to.clone()),
    }
}

/// The reference that makes `owner` the controller of an object: it goes when the owner goes.
pub fn owned_by<K: Object>(owner: &K) -> Vec<OwnerReference> {
    owner.controller_owner_ref(&()).into_iter().collect()
}

/// Whether `owner` is the controller of `object`.
pub fn is_owned_by<K: Object, O: Object>(object: &K, owner: &O) -> bool {
    owner.uid().is_some()
        && object
            .owner_references()
            .iter()
            .any(|reference| reference.controller == Some(true) && Some(&reference.uid) == owner.meta().uid.as_ref())
}

/// How long ago the object was created; nothing for an object whose clock is ahead of ours.
pub fn age<K: Object>(object: &K) -> std::time::Duration {
    object.creation_timestamp().map_or(std::time::Duration::ZERO, |created| since(&created))
}

/// How long ago that was; nothing for a time to come.
pub fn since(time: &Time) -> std::time::Duration {
    std::time::Duration::try_from(jiff::Timestamp::now().duration_since(time.0)).unwrap_or_default()
}

/// Now, in whole seconds, as the API keeps times.
pub fn now() -> Time {
    let now = jiff::Timestamp::now();
    Time(jiff::Timestamp::from_second(now.as_second()).unwrap_or(now))
}

/// A name derived from `stem` that is the same for the same `parts`: at most 63 characters, so that it can also be
/// a label's value.
pub fn derived_name(stem: &str, infix: &str, parts: &[&str]) -> String {
    let hash = short_hash(parts);
    let room = 63 - infix.len() - hash.len() - 2;
    let stem = stem.get(..room).unwrap_or(stem).trim_end_matches(['-', '.']);
    format!("{stem}-{infix}-{hash}")
}

/// Ten hexadecimal digits that stand for `parts`.
pub fn short_hash(parts: &[&str]) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hex::encode(&hasher.finalize()[..5])
}

/// A label's value for a name that may be longer than a label may be.
pub fn label_value(name: &str) -> String {
    if name.len() <= 63 { name.into() } else { derived_name(name, "x", &[name]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_difference_names_only_what_differs() {
        let from = json!({"a": 1, "b": {"c": 1, "d": 2}, "gone": true, "list": [1, 2]});
        let to = json!({"a": 1, "b": {"c": 1, "d": 3}, "list": [1], "new": {"x": 1}});
        let expected = json!({"b": {"d": 3}, "gone": null, "list": [1], "new": {"x": 1}});
        assert_eq!(difference(&from, &to), Some(expected));
        assert_eq!(difference(&to, &to), None);
    }

    #[test]
    fn derived_names_fit_a_label_and_differ_by_their_parts() {
        let long = "x".repeat(253);
        let name = derived_name(&long, "import", &["1"]);
        assert_eq!(name.len(), 63);
        assert_ne!(name, derived_name(&long, "import", &["2"]));
        assert_eq!(derived_name("linux", "import", &["1"]), derived_name("linux", "import", &["1"]));
        assert_ne!(short_hash(&["a", "bc"]), short_hash(&["ab", "c"]));
        let dotted = format!("{}.{}", "x".repeat(44), "y".repeat(10));
        assert!(!derived_name(&dotted, "import", &["1"]).contains(".-"));
    }
}
