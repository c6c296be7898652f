//! A cluster in memory: checkpoints and what else there is, and who may read it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use aether_api::session::{Base, Durability, Owner};
use aether_api::{AetherCheckpoint, AetherCheckpointSpec, AetherCheckpointStatus};
use aether_cas::{Blob, MemoryStore};
use aether_review::api::Service;
use http::{Request, Response};
use http_body_util::BodyExt;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

/// What the API server was asked about users.
pub(crate) type Reviews = Arc<Mutex<Vec<Value>>>;

/// A durable checkpoint of a session that started at `base`.
pub(crate) fn checkpoint(name: &str, base: Blob, root: Blob) -> AetherCheckpoint {
    let mut checkpoint =
        AetherCheckpoint::new(name, AetherCheckpointSpec { session: "s".into(), ..Default::default() });
    checkpoint.metadata.namespace = Some("demo".into());
    checkpoint.status = Some(AetherCheckpointStatus {
        root: Some(root.to_string()),
        durability: Some(Durability::Durable),
        base: Some(Base {
            root: None,
            source_namespace: None,
            source_name: Some("linux".into()),
            revision: Some("r1".into()),
            revision_root: Some(base.to_string()),
            commit: None,
            owner: Owner { uid: 1000, gid: 1000 },
        }),
        ..Default::default()
    });
    checkpoint
}

/// A service over `store` in a cluster with these checkpoints, where user `ada` may read all but the one named `hidden`.
pub(crate) fn service(store: &MemoryStore, checkpoints: Vec<AetherCheckpoint>) -> (Service, Reviews) {
    service_with(store, checkpoints, vec![])
}

fn not_found() -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404, "message": "not found", "reason": "NotFound"})
}

/// The same with objects of other kinds, by plural.
pub(crate) fn service_with(
    store: &MemoryStore,
    checkpoints: Vec<AetherCheckpoint>,
    others: Vec<(&str, Value)>,
) -> (Service, Reviews) {
    let checkpoints = checkpoints.into_iter().map(|it| ("aethercheckpoints", serde_json::to_value(it).unwrap()));
    let objects: BTreeMap<(String, String), Value> = checkpoints
        .chain(others)
        .map(|(plural, it)| ((plural.to_owned(), it["metadata"]["name"].as_str().unwrap().to_owned()), it))
        .collect();
    let objects = Arc::new(objects);
    let reviews = Reviews::default();
    let seen = reviews.clone();
    let answer = tower::service_fn(move |request: Request<Body>| {
        let (objects, seen) = (objects.clone(), seen.clone());
        async move {
            let path = request.uri().path().to_owned();
            let (code, body) = if path.ends_with("/subjectaccessreviews") {
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let mut review: Value = serde_json::from_slice(&body).unwrap();
                seen.lock().unwrap().push(review["spec"].clone());
                let allowed =
                    review["spec"]["user"] == "ada" && review["spec"]["resourceAttributes"]["name"] != "hidden";
                review["status"] = json!({"allowed": allowed});
                (201, review)
            } else if let Some(map) = path.strip_prefix("/api/v1/namespaces/aether-system/configmaps/") {
                let map = objects.get(&("configmaps".to_owned(), map.to_owned()));
                map.map_or_else(|| (404, not_found()), |map| (200, map.clone()))
            } else {
                let rest = path.strip_prefix("/apis/aether.dev/v1alpha1/namespaces/demo/").unwrap_or_default();
                match rest.split_once('/') {
                    None => {
                        let items: Vec<&Value> =
                            objects.iter().filter(|((plural, _), _)| plural == rest).map(|(_, it)| it).collect();
                        (200, json!({"kind": "List", "apiVersion": "v1", "metadata": {}, "items": items}))
                    }
                    Some((plural, name)) => match objects.get(&(plural.to_owned(), name.to_owned())) {
                        Some(object) => (200, object.clone()),
                        None => (404, not_found()),
                    },
                }
            };
            let body = Body::from(serde_json::to_vec(&body).unwrap());
            Ok::<_, std::convert::Infallible>(Response::builder().status(code).body(body).unwrap())
        }
    });
    let service = Service {
        client: kube::Client::new(answer, "demo"),
        store: Arc::new(store.clone()),
        namespace: "aether-system".into(),
        streams: Arc::new(Semaphore::new(2)),
        directory_bytes: 1 << 20,
        spool: None,
        patience: std::time::Duration::from_secs(60),
        metrics: aether_review::metrics::Metrics::new(&aether_runtime::Metrics::new()),
    };
    (service, reviews)
}
