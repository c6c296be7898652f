//! The node driver: CSI services for the kubelet, control loops for the API, the engine below. One per node. As
//! `aether-csi-driver controller` the CSI Controller service instead, one per cluster.

mod admin;
mod attach;
mod cluster;
mod config;
mod control;
mod controller;
mod driver;
mod events;
mod failure;
mod hydration;
mod identity;
mod inline;
mod lease;
mod limits;
mod metrics;
mod moments;
#[cfg(test)]
mod mount_races;
mod node;
mod publish;
mod records;
mod registration;
mod release;
mod report;
mod target;
mod transport;
mod volume;

use std::sync::Arc;
use std::time::Duration;

use aether_cas::RemoteStore;
use aether_cas::remote::RemoteConfig;
use aether_engine::Engine;
use aether_engine::pool::PoolConfig;
use aether_proto::csi::v1::identity_server::IdentityServer;
use aether_proto::csi::v1::node_server::NodeServer;
use aether_proto::node::v1::node_admin_server::NodeAdminServer;
use aether_runtime::{Readiness, Stage, Tasks, http, logs, signals};
use anyhow::Context as _;
use clap::Parser as _;
use tonic::transport::Server;

use crate::config::{Arguments, Config, Pool, Role};
use crate::driver::Driver;
use crate::transport::Socket;

/// How long an orderly end may take; less than the pod's terminationGracePeriodSeconds.
const STOP: Duration = Duration::from_secs(20);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = Arguments::parse();
    logs::init()?;
    let shutdown = signals::shutdown().context("cannot listen for signals")?;
    let tasks = Tasks::new();
    if let Some(Role::Controller(arguments)) = arguments.role.take() {
        controller::start(arguments, &tasks).await?;
        return tasks.run(shutdown, STOP).await;
    }
    let config = Config::new(arguments)?;
    let table = aether_runtime::Metrics::new();
    let readiness = Readiness::new();

    // Health is served before everything else, so that a slow start can be told from a dead one.
    let engine_ready = readiness.part("engine");
    let watches_ready = readiness.part("watches");
    let pool_ready = readiness.part("pool");
    let (address, routes) = (config.http, http::routes(readiness.clone(), table.clone()));
    tasks.essential(Stage::Foundation, "http", move |stop| http::serve(address, routes, stop));

    let engine = open_engine(&config).await?;
    engine_ready.ready();
    let remote = RemoteConfig { credentials: config.credentials.clone(), ..RemoteConfig::new(&config.store) };
    let remote = RemoteStore::lazy(&remote).context("--store")?;
    let client = kube::Client::try_default().await.context("cannot find the Kubernetes API")?;
    let metrics = metrics::Metrics::new(&table);
    let driver = Arc::new(Driver::new(config, engine, Arc::new(remote), client, metrics, tasks.clone())?);
    driver.require_records().await?;
    driver.count();

    control::start(&driver, &tasks);
    let reporting = driver.clone();
    tasks.spawn(Stage::Work, "node report", driver.node(), move |stop| report::publish(reporting, stop));
    let limiting = driver.clone();
    tasks.essential(Stage::Work, "limits", move |stop| limits::run(limiting, pool_ready, stop));
    let hydrating = driver.clone();
    tasks.essential(Stage::Work, "hydration", move |stop| async move {
        hydration::run(hydrating, stop).await;
        Ok(())
    });
    if driver.config.lazy {
        let watching = driver.clone();
        tasks.essential(Stage::Work, "lazy layer", move |stop| async move {
            hydration::watch_layer(watching, stop).await;
            Ok(())
        });
    }
    serve(&driver, &tasks, readiness)?;
    let waiting = driver.clone();
    tasks.spawn(Stage::Intake, "first lists", "the process", move |stop| async move {
        tokio::select! {
            () = waiting.cluster.ready() => watches_ready.ready(),
            () = stop.cancelled() => {}
        }
        Ok(())
    });
    // Mounts stay: pods go on without this process.
    tasks.run(shutdown, STOP).await
}

async fn open_engine(config: &Config) -> anyhow::Result<Engine> {
    let mut setup = aether_engine::Config::new(&config.state_dir);
    setup.pool = match &config.pool {
        Pool::BtrfsImage(bytes) => PoolConfig::Image { bytes: *bytes },
        Pool::BtrfsDevice(device) => PoolConfig::Device(device.clone()),
        Pool::Directory => PoolConfig::Directory,
    };
    setup.memory = config.memory;
    setup.object_limit = config.object_limit;
    setup.lazy = config.lazy;
    let engine = Engine::open(setup)
        .await
        .with_context(|| format!("cannot open the engine in {}", config.state_dir.display()))?;
    Ok(engine)
}

/// Starts the sockets: CSI, its registration with the kubelet, administration.
fn serve(driver: &Arc<Driver>, tasks: &Tasks, readiness: Readiness) -> anyhow::Result<()> {
    let paths = registration::Paths::below(&driver.config.kubelet_dir);
    let csi = Socket::bind(&paths.csi).with_context(|| format!("cannot listen on {}", paths.csi.display()))?;
    let services = Server::builder()
        .add_service(IdentityServer::new(identity::IdentityService::new(readiness)))
        .add_service(NodeServer::new(node::NodeService::new(driver.clone())));
    tasks.essential(Stage::Intake, "csi", move |stop| async move {
        let (incoming, _file) = csi.into_incoming();
        services.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await.context("CSI socket")
    });

    tasks.essential(Stage::Intake, "registration", move |stop| async move { registration::serve(&paths, stop).await });

    let path = driver.config.admin_socket();
    let admin = Socket::bind(&path).with_context(|| format!("cannot listen on {}", path.display()))?;
    let service = NodeAdminServer::new(admin::AdminService::new(driver.clone()));
    tasks.essential(Stage::Intake, "administration", move |stop| async move {
        let (incoming, _file) = admin.into_incoming();
        Server::builder()
            .add_service(service)
            .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
            .await
            .context("administration socket")
    });
    Ok(())
}
