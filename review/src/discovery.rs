//! What the API server and its clients are told of this API: discovery and a minimal OpenAPI, from one table.

use aether_api::names;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use crate::api::{FAST_IMPORT, Service};

/// A resource.
struct Resource {
    /// The plural of what it belongs to, and its own name; only its own of one that belongs to nothing, has no namespace and is
    /// created, not read.
    name: &'static str,
    kind: &'static str,
    description: &'static str,
    produces: &'static str,
    /// Query parameters: name, type, whether it must be given.
    query: &'static [(&'static str, &'static str, bool)],
}

const COMPARED: &[(&str, &str, bool)] = &[("against", "string", false), ("git", "boolean", false)];

const RESOURCES: &[Resource] = &[
    Resource {
        name: "checkpoints/changes",
        kind: "CheckpointChanges",
        description: "What changed up to a checkpoint, as a git fast-import stream with the branches base and head.",
        produces: FAST_IMPORT,
        query: COMPARED,
    },
    Resource {
        name: "checkpoints/file",
        kind: "CheckpointFile",
        description: "One file of a checkpoint: its digest, size, number of lines, and its text if it is one.",
        produces: "application/json",
        query: &[("path", "string", true)],
    },
    Resource {
        name: "commits/audit",
        kind: "CommitAudit",
        description: "The lines of the audit log on a commit and on what was said of it, oldest first.",
        produces: "application/json",
        query: &[],
    },
    Resource {
        name: "commits/changes",
        kind: "CommitChanges",
        description: "What a commit changes, by the tree that its status names, as a git fast-import stream with the branches base and head.",
        produces: FAST_IMPORT,
        query: COMPARED,
    },
    Resource {
        name: "selfsubjectreviews",
        kind: "SelfSubjectReview",
        description: "Who the API server takes the caller for.",
        produces: "application/json",
        query: &[],
    },
    Resource {
        name: "sessions/notes",
        kind: "SessionNotes",
        description: "Where the lines of all notes on a session's checkpoints are in its head.",
        produces: "application/json",
        query: &[],
    },
];

/// `/apis/review.aether.dev/v1alpha1`.
pub(crate) fn base() -> String {
    format!("/apis/{}", version())
}

/// `review.aether.dev/v1alpha1`.
pub(crate) fn version() -> String {
    format!("{}/{}", names::REVIEW_GROUP, names::VERSION)
}

/// The routes of discovery and OpenAPI.
pub(crate) fn routes() -> Router<Service> {
    Router::new()
        .route("/apis", get(async || Json(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": [group()]}))))
        .route(&format!("/apis/{}", names::REVIEW_GROUP), get(async || Json(group())))
        .route(&base(), get(async || Json(resources())))
        .route("/openapi/v2", get(async || Json(openapi_v2())))
        .route("/openapi/v3", get(async || Json(openapi_index())))
        .route(&format!("/openapi/v3{}", base()), get(async || Json(openapi_v3())))
}

fn group() -> Value {
    let version = json!({"groupVersion": version(), "version": names::VERSION});
    json!({"kind": "APIGroup", "apiVersion": "v1", "name": names::REVIEW_GROUP, "versions": [version], "preferredVersion": version})
}

fn resources() -> Value {
    let resources: Vec<Value> = RESOURCES
        .iter()
        .map(|it| {
            let verb = if it.owner().is_some() { "get" } else { "create" };
            json!({"name": it.name, "singularName": "", "namespaced": it.owner().is_some(), "kind": it.kind, "verbs": [verb]})
        })
        .collect();
    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version(), "resources": resources})
}

impl Resource {
    /// The plural of what it belongs to, and its own name.
    fn owner(&self) -> Option<(&'static str, &'static str)> {
        self.name.split_once('/')
    }

    fn path(&self) -> String {
        match self.owner() {
            Some((plural, sub)) => format!("{}/namespaces/{{namespace}}/{plural}/{{name}}/{sub}", base()),
            None => format!("{}/{}", base(), self.name),
        }
    }

    fn method(&self) -> &'static str {
        if self.owner().is_some() { "get" } else { "post" }
    }

    /// The code of success.
    fn code(&self) -> &'static str {
        if self.owner().is_some() { "200" } else { "201" }
    }

    fn operation(&self) -> String {
        match self.owner() {
            Some(_) => format!("readReviewAetherDevV1alpha1Namespaced{}", self.kind),
            None => format!("createReviewAetherDevV1alpha1{}", self.kind),
        }
    }

    /// Name, place, type, whether it must be given.
    fn parameters(&self) -> impl Iterator<Item = (&'static str, &'static str, &'static str, bool)> {
        let names = ["namespace", "name"].into_iter().filter(|_| self.owner().is_some());
        let path = names.map(|name| (name, "path", "string", true));
        path.chain(self.query.iter().map(|(name, type_, required)| (*name, "query", *type_, *required)))
    }
}

fn paths(operation: impl Fn(&Resource) -> Value) -> Value {
    RESOURCES
        .iter()
        .map(|resource| (resource.path(), json!({resource.method(): operation(resource)})))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// API servers up to 1.26 merge this into theirs.
fn openapi_v2() -> Value {
    let paths = paths(|it| {
        let parameters: Vec<Value> = it
            .parameters()
            .map(|(name, place, type_, required)| json!({"name": name, "in": place, "type": type_, "required": required, "uniqueItems": true}))
            .collect();
        json!({
            "description": it.description, "operationId": it.operation(), "produces": [it.produces],
            "parameters": parameters, "responses": {it.code(): {"description": "OK"}},
        })
    });
    let info = json!({"title": "Aether review", "version": names::VERSION});
    json!({"swagger": "2.0", "info": info, "paths": paths, "definitions": {}})
}

fn openapi_index() -> Value {
    let group = format!("apis/{}", version());
    // The hash lets the API server keep its copy; the document changes with the program only.
    let url = format!("/openapi/v3/{group}?hash={}", env!("CARGO_PKG_VERSION"));
    json!({"paths": {group: {"serverRelativeURL": url}}})
}

fn openapi_v3() -> Value {
    let paths = paths(|it| {
        let parameters: Vec<Value> = it
            .parameters()
            .map(|(name, place, type_, required)| json!({"name": name, "in": place, "required": required, "schema": {"type": type_}}))
            .collect();
        let schema = if it.produces == FAST_IMPORT {
            json!({"type": "string", "format": "binary"})
        } else {
            json!({"type": "object"})
        };
        json!({
            "description": it.description, "operationId": it.operation(), "parameters": parameters,
            "responses": {it.code(): {"description": "OK", "content": {it.produces: {"schema": schema}}}},
        })
    });
    json!({"openapi": "3.0.0", "info": {"title": "Aether review", "version": names::VERSION}, "paths": paths})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_document_names_every_resource() {
        let listed = resources();
        for (index, it) in RESOURCES.iter().enumerate() {
            assert_eq!(listed["resources"][index]["name"], it.name);
            for document in [openapi_v2(), openapi_v3()] {
                assert_eq!(document["paths"][it.path()][it.method()]["operationId"], it.operation());
            }
        }
        let file = &openapi_v3()["paths"][RESOURCES[1].path()]["get"]["parameters"][2];
        assert_eq!((&file["name"], &file["required"]), (&json!("path"), &json!(true)));
    }
}
