//! What races, kills and lost answers must not cost, with the real engine and an API server in memory. As root: it mounts.

mod hydrating;
mod leaving;
mod limits;
mod publishing;
mod restoring;
mod tidying;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aether_api::session::{Attachment, Base, Owner, SourceReference};
use aether_api::{AetherCheckpoint, AetherSession, AetherSessionSpec, AetherSessionStatus};
use aether_cas::tree::Directory;
use aether_cas::{Blob, MemoryStore, Store};
use aether_engine::Engine;
use aether_engine::pool::PoolConfig;
use aether_engine::testing::isolated;
use aether_runtime::{CancellationToken, Tasks};
use aether_testkit::ApiServer;
use clap::Parser as _;

use crate::cluster::Patience;
use crate::config::{Arguments, Config};
use crate::driver::Driver;
use crate::failure::Result;
use crate::metrics::Metrics;
use crate::publish::Publish;
use crate::records::Pod;
use crate::volume::{Volume, Wanted};

const NAMESPACE: &str = "team";
const UID: &str = "6a3f";

/// A node called `a`, its store and the cluster, with session `fix` of an empty tree that nobody holds.
struct Node {
    driver: Arc<Driver>,
    server: ApiServer,
    root: PathBuf,
}

impl Node {
    async fn new(root: &Path) -> Self {
        let tree = Directory::default();
        let store = MemoryStore::new();
        store.write(tree.blob(), tree.encode()).await.unwrap();
        Self::with_base(root, store, tree.blob(), &[]).await
    }

    /// The session's tree is in the store; the driver has further arguments.
    async fn with_base(root: &Path, store: impl Store + 'static, tree: Blob, arguments: &[&str]) -> Self {
        let base = Base {
            root: Some(tree.to_string()),
            source_namespace: None,
            source_name: None,
            revision: None,
            revision_root: None,
            commit: None,
            owner: Owner { uid: 0, gid: 0 },
        };
        let server = ApiServer::new();
        let source = SourceReference { name: "empty".into(), ..Default::default() };
        let mut session =
            AetherSession::new("fix", AetherSessionSpec { source: Some(source), ..AetherSessionSpec::default() });
        session.metadata.namespace = Some(NAMESPACE.into());
        session.metadata.uid = Some(UID.into());
        session.status = Some(AetherSessionStatus { base: Some(base), ..AetherSessionStatus::default() });
        server.put(&session);
        let driver = driver_with(root, &server, store, arguments).await.unwrap();
        Self { driver: Arc::new(driver), server, root: root.to_owned() }
    }

    fn session(&self) -> Arc<AetherSession> {
        Arc::new(self.server.get(NAMESPACE, "fix").unwrap())
    }

    fn checkpoints(&self) -> Vec<String> {
        self.server.all::<AetherCheckpoint>().iter().map(kube::ResourceExt::name_any).collect()
    }

    /// Where the kubelet wants the volume of a pod.
    fn target(&self, pod: &str) -> PathBuf {
        let path = self.root.join(format!("kubelet/pods/{pod}/volumes/kubernetes.io~csi/aether-{UID}"));
        fs::create_dir_all(&path).unwrap();
        path.join("mount")
    }

    /// Mounts the session for a pod of that uid.
    async fn publish(&self, pod: &str) -> Result<PathBuf> {
        let target = self.target(pod);
        self.driver.publish(publish(&target, pod), patience()).await.map(|()| target)
    }

    /// Another node takes the session over.
    fn taken_over(&self) {
        take_over(&self.server);
    }
}

fn take_over(server: &ApiServer) {
    server.change(NAMESPACE, "fix", |session: &mut AetherSession| {
        let status = session.status.get_or_insert_default();
        let epoch = status.attachment.as_ref().map_or(0, |attachment| attachment.epoch);
        status.attachment = Some(Attachment { node: Some("b".into()), epoch: epoch + 1, since: None });
    });
}

/// A driver whose kubelet keeps cgroups in the directory `cgroup`.
async fn driver(root: &Path, server: &ApiServer, store: MemoryStore) -> Result<Driver> {
    driver_with(root, server, store, &[]).await
}

async fn driver_with(root: &Path, server: &ApiServer, store: impl Store + 'static, more: &[&str]) -> Result<Driver> {
    let state = format!("--state-dir={}", root.join("state").display());
    let cgroups = root.join("cgroup");
    fs::create_dir_all(cgroups.join("kubepods")).unwrap();
    let cgroups = format!("--cgroup-root={}", cgroups.display());
    let arguments =
        ["aether-csi-driver", "--node-name=a", "--store=http://127.0.0.1:9", "--pool=directory", &state, &cgroups];
    let config = Config::new(Arguments::parse_from(arguments.iter().chain(more))).unwrap();
    let mut engine = aether_engine::Config::new(&config.state_dir);
    engine.pool = PoolConfig::Directory;
    engine.lazy = config.lazy;
    let engine = Engine::open(engine).await.unwrap();
    let metrics = Metrics::new(&aether_runtime::Metrics::new());
    Driver::new(config, engine, Arc::new(store), server.client(), metrics, Tasks::new())
}

fn patience() -> Patience {
    Patience { deadline: Instant::now() + Duration::from_secs(60), cancelled: CancellationToken::new() }
}

fn publish(target: &Path, pod: &str) -> Publish {
    let wanted = Wanted::Session { namespace: NAMESPACE.into(), name: "fix".into(), uid: Some(UID.into()) };
    let pod = Pod { namespace: NAMESPACE.into(), name: format!("agent-{pod}"), uid: pod.into() };
    Publish {
        volume_id: format!("aether-{UID}"),
        target: target.to_owned(),
        read_only: false,
        volume: Volume { wanted, pod: Some(pod) },
    }
}

fn run(name: &str, body: impl AsyncFnOnce(&Path)) {
    isolated(&format!("mount_races::{name}"), |root| {
        tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(body(root));
    });
}
