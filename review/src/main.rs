//! `aether-review`: see the library.

use std::sync::Arc;
use std::time::Duration;

use aether_cas::RemoteStore;
use aether_cas::remote::RemoteConfig;
use aether_review::api::{self, Service};
use aether_review::config::Config;
use aether_review::keeper::Keeper;
use aether_runtime::{Metrics, Readiness, Stage, Tasks, http, logs, signals, tls};
use anyhow::{Context, Result};
use clap::Parser;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tracing::info;

/// How long one piece of a diff may wait for its reader, who holds one of few places meanwhile.
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> Result<()> {
    let config = Config::parse();
    logs::init()?;
    let shutdown = signals::shutdown()?;
    if let Some(spool) = &config.spool {
        // Found out now, not with the first large file.
        tempfile::tempfile_in(spool).with_context(|| format!("cannot write to --spool {}", spool.display()))?;
    }
    let client = kube::Client::try_default().await.context("no API server to talk to")?;
    let store = Arc::new(RemoteStore::lazy(&RemoteConfig {
        credentials: config.credentials.clone(),
        ..RemoteConfig::new(&config.store)
    })?);
    let listener =
        TcpListener::bind(config.listen).await.with_context(|| format!("cannot listen on {}", config.listen))?;
    info!(address = %config.listen, store = config.store, "serving the review API");

    let (readiness, metrics) = (Readiness::new(), Metrics::new());
    let (settings, served) = watch::channel(None);
    let keeper = Keeper {
        client: client.clone(),
        namespace: config.namespace.clone(),
        secret: config.secret.clone(),
        service: config.service.clone(),
        settings,
        ready: readiness.part("certificate"),
    };
    let router = api::router(Service {
        client,
        store,
        namespace: config.namespace.clone(),
        streams: Arc::new(Semaphore::new(config.streams.into())),
        directory_bytes: config.directory_bytes,
        spool: config.spool.clone(),
        patience: PATIENCE,
        metrics: aether_review::metrics::Metrics::new(&metrics),
    });
    let tasks = Tasks::new();
    tasks.essential(Stage::Intake, "review API", |stop| tls::serve(listener, served, router, stop));
    tasks.essential(Stage::Work, "certificate", |stop| keeper.run(stop));
    let health = http::routes(readiness, metrics);
    tasks.essential(Stage::Foundation, "health", |stop| http::serve(config.health, health, stop));
    tasks.run(shutdown, Duration::from_secs(config.grace_seconds)).await
}
