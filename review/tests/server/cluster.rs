//! A cluster in memory: checkpoints, and who may read them.

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
            owner: Owner { uid: 1000, gid: 1000 },
        }),
        ..Default::default()
    });
    checkpoint
}

/// A service over `store` in a cluster with these checkpoints, where user `ada` may read all but the one named `hidden`.
pub(crate) fn service(store: &MemoryStore, checkpoints: Vec<AetherCheckpoint>) -> (Service, Reviews) {
    let checkpoints: Arc<BTreeMap<String, AetherCheckpoint>> = Arc::new(
        checkpoints.into_iter().map(|checkpoint| (checkpoint.metadata.name.clone().unwrap(), checkpoint)).collect(),
    );
    let reviews = Reviews::default();
    let seen = reviews.clone();
    let answer = tower::service_fn(move |request: Request<Body>| {
        let (checkpoints, seen) = (checkpoints.clone(), seen.clone());
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
            } else {
                let name = path
                    .strip_prefix("/apis/aether.dev/v1alpha1/namespaces/demo/aethercheckpoints/")
                    .unwrap_or_default();
                match checkpoints.get(name) {
                    Some(checkpoint) => (200, serde_json::to_value(checkpoint).unwrap()),
                    None => (
                        404,
                        json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404, "message": "not found", "reason": "NotFound"}),
                    ),
                }
            };
            let body = Body::from(serde_json::to_vec(&body).unwrap());
            Ok::<_, std::convert::Infallible>(Response::builder().status(code).body(body).unwrap())
        }
    });
    let service = Service {
        client: kube::Client::new(answer, "demo"),
        store: Arc::new(store.clone()),
        streams: Arc::new(Semaphore::new(2)),
        directory_bytes: 1 << 20,
        spool: None,
        patience: std::time::Duration::from_secs(60),
        metrics: aether_review::metrics::Metrics::new(&aether_runtime::Metrics::new()),
    };
    (service, reviews)
}
