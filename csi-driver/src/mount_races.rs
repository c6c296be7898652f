//! What races must not cost, with the real engine and an API server in memory. As root: it mounts.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aether_api::AetherSession;
use aether_cas::RemoteStore;
use aether_cas::remote::RemoteConfig;
use aether_cas::tree::Directory;
use aether_engine::Engine;
use aether_engine::pool::PoolConfig;
use aether_engine::testing::isolated;
use aether_runtime::{CancellationToken, Tasks};
use clap::Parser as _;
use http::{Method, Request, Response};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};

use crate::cluster::Patience;
use crate::config::{Arguments, Config};
use crate::driver::Driver;
use crate::metrics::Metrics;
use crate::publish::Publish;
use crate::records::Upper;
use crate::volume::{Volume, Wanted};

const SESSIONS: &str = "/apis/aether.dev/v1alpha1/namespaces/team/aethersessions";
const CHECKPOINTS: &str = "/apis/aether.dev/v1alpha1/namespaces/team/aethercheckpoints";
const UID: &str = "6a3f";

/// Objects by path, with the compare-and-swap of the real one.
#[derive(Clone, Default)]
struct Server(Arc<Mutex<BTreeMap<String, Value>>>);

impl Server {
    fn client(&self) -> Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let server = server.clone();
            async move {
                let (parts, body) = request.into_parts();
                let sent = body.collect_bytes().await.unwrap();
                let (code, answer) =
                    server.answer(&parts.method, parts.uri.path(), serde_json::from_slice(&sent).unwrap_or_default());
                let answer = Body::from(serde_json::to_vec(&answer).unwrap());
                Ok::<_, Infallible>(Response::builder().status(code).body(answer).unwrap())
            }
        });
        Client::new(service, "team")
    }

    fn answer(&self, method: &Method, path: &str, sent: Value) -> (u16, Value) {
        let refuse = |code: u16| (code, json!({"kind": "Status", "status": "Failure", "message": path, "code": code}));
        let mut objects = self.0.lock().unwrap();
        if path.contains("/events") {
            return (201, sent);
        }
        let path = path.trim_end_matches("/status");
        match (method, objects.get_mut(path)) {
            (&Method::GET, Some(object)) => (200, object.clone()),
            (&Method::POST, _) => {
                let path = format!("{path}/{}", sent["metadata"]["name"].as_str().unwrap());
                if objects.contains_key(&path) {
                    return refuse(409);
                }
                let mut object = sent;
                object["metadata"]["uid"] = json!(format!("uid of {path}"));
                object["metadata"]["resourceVersion"] = json!("1");
                objects.insert(path, object.clone());
                (201, object)
            }
            (&Method::PATCH, Some(object))
                if sent["metadata"]["resourceVersion"] == object["metadata"]["resourceVersion"] =>
            {
                merge(&mut object["status"], &sent["status"]);
                bump(object);
                (200, object.clone())
            }
            (&Method::PATCH, Some(_)) => refuse(409),
            _ => refuse(404),
        }
    }

    fn session(&self) -> Arc<AetherSession> {
        Arc::new(serde_json::from_value(self.0.lock().unwrap()[&format!("{SESSIONS}/fix")].clone()).unwrap())
    }

    fn checkpoints(&self) -> Vec<Value> {
        self.0
            .lock()
            .unwrap()
            .iter()
            .filter(|(path, _)| path.starts_with(CHECKPOINTS))
            .map(|(_, object)| object.clone())
            .collect()
    }
}

fn merge(into: &mut Value, patch: &Value) {
    let Some(patch) = patch.as_object() else { return into.clone_from(patch) };
    if !into.is_object() {
        *into = json!({});
    }
    for (key, value) in patch {
        if value.is_null() {
            into.as_object_mut().unwrap().remove(key);
        } else {
            merge(&mut into[key], value);
        }
    }
}

fn bump(object: &mut Value) {
    let version: u64 = object["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
    object["metadata"]["resourceVersion"] = json!((version + 1).to_string());
}

/// A driver on node `a`, and a session of an empty tree that nobody holds. The store is never asked: all is on the node.
async fn setup(root: &Path) -> (Arc<Driver>, Server) {
    let state = format!("--state-dir={}", root.join("state").display());
    let arguments = ["aether-csi-driver", "--node-name=a", "--store=http://127.0.0.1:9", "--pool=directory", &state];
    let config = Config::new(Arguments::parse_from(arguments)).unwrap();
    let mut engine = aether_engine::Config::new(&config.state_dir);
    engine.pool = PoolConfig::Directory;
    let engine = Engine::open(engine).await.unwrap();
    let tree = Directory::default();
    engine.objects().put_directories(std::slice::from_ref(&tree)).unwrap();
    let server = Server::default();
    let session = json!({
        "apiVersion": "aether.dev/v1alpha1", "kind": "AetherSession",
        "metadata": {"name": "fix", "namespace": "team", "uid": UID, "resourceVersion": "1"},
        "spec": {"source": {"name": "empty"}},
        "status": {"base": {"root": tree.blob().to_string(), "owner": {"uid": 0, "gid": 0}}},
    });
    server.0.lock().unwrap().insert(format!("{SESSIONS}/fix"), session);
    let remote = RemoteStore::lazy(&RemoteConfig::new(&config.store)).unwrap();
    let metrics = Metrics::new(&aether_runtime::Metrics::new());
    let driver = Driver::new(config, engine, remote, server.client(), metrics, Tasks::new()).unwrap();
    (Arc::new(driver), server)
}

fn patience() -> Patience {
    Patience { deadline: Instant::now() + Duration::from_secs(60), cancelled: CancellationToken::new() }
}

fn publish(target: &Path) -> Publish {
    let wanted = Wanted::Session { namespace: "team".into(), name: "fix".into(), uid: Some(UID.into()) };
    Publish {
        volume_id: "aether-6a3f".into(),
        target: target.to_owned(),
        read_only: false,
        volume: Volume { wanted, pod: None },
    }
}

fn run(name: &str, body: impl AsyncFnOnce(&Path)) {
    isolated(name, |root| {
        tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(body(root));
    });
}

#[test]
fn two_pods_of_one_node_starting_together_share_the_session() {
    run("mount_races::two_pods_of_one_node_starting_together_share_the_session", async |root| {
        let (driver, server) = setup(root).await;
        let stale = server.session();
        let target = root.join("first");
        driver.publish(publish(&target), patience()).await.unwrap();
        fs::write(target.join("work"), "of the first pod").unwrap();

        // The second pod's publish looked at the cache before the first one's lease was in it.
        assert!(stale.holder().is_none());
        let attached = driver.attach(stale, None, None, &patience()).await.unwrap();
        assert_eq!(attached.session.holder(), Some("a"));
        assert_eq!(fs::read_to_string(target.join("work")).unwrap(), "of the first pod");
        let record = driver.sessions.get(UID).unwrap();
        assert_eq!((record.epoch, &record.upper), (1, &Upper::Dirty));
        assert!(server.checkpoints().is_empty(), "nothing was recovered");
    });
}

#[test]
fn what_a_process_writes_after_the_loss_of_its_session_is_kept_too() {
    run("mount_races::what_a_process_writes_after_the_loss_of_its_session_is_kept_too", async |root| {
        let (driver, server) = setup(root).await;
        let target = root.join("pod");
        driver.publish(publish(&target), patience()).await.unwrap();
        let mut log = fs::File::create(target.join("log")).unwrap();
        log.write_all(b"before").unwrap();
        {
            let mut objects = server.0.lock().unwrap();
            let session = objects.get_mut(&format!("{SESSIONS}/fix")).unwrap();
            session["status"]["attachment"] = json!({"node": "b", "epoch": 2});
            bump(session);
        }
        let session = server.session();
        assert!(driver.holds_now(UID).await.unwrap().is_none(), "the record alone decides nothing");

        let recover = async || {
            let _lock = driver.session_locks.lock(UID).await;
            driver.recover(&session, &driver.sessions.get(UID).unwrap()).await
        };
        let busy = recover().await.unwrap_err();
        assert!(matches!(&busy, crate::failure::Failure::Engine(aether_engine::Error::Busy { .. })), "{busy}");
        let names = |server: &Server| -> Vec<String> {
            server.checkpoints().iter().map(|object| object["metadata"]["name"].as_str().unwrap().to_owned()).collect()
        };
        assert_eq!(names(&server), ["fix-recovered-1"]);
        log.write_all(b" and after").unwrap();
        drop(log);

        let deadline = Instant::now() + Duration::from_secs(30);
        while let Err(failure) = recover().await {
            // The kernel lets go of a mount a moment after the last file in it is closed.
            assert!(Instant::now() < deadline, "{failure}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(names(&server), ["fix-recovered-1", "fix-recovered-1-2"]);
        let mut roots = Vec::new();
        for checkpoint in server.checkpoints() {
            assert_eq!(checkpoint["status"]["durability"], "Local");
            roots.push(driver.engine.digest(checkpoint["status"]["snapshot"].as_str().unwrap()).await.unwrap().root);
        }
        assert_ne!(roots[0], roots[1]);
        assert!(driver.sessions.get(UID).is_none() && !target.exists());
        assert!(driver.engine.session(UID).await.unwrap_err().is_not_found());
    });
}
