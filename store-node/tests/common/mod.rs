//! A store node in this process.
#![allow(dead_code, reason = "each test program uses its part")]

use std::{net::SocketAddr, path::Path};

use aether_cas::{LocalConfig, LocalStore, RemoteStore};
use aether_runtime::{CancellationToken, Metrics};
use aether_store_node::{Guard, metrics::StoreMetrics};
use tempfile::TempDir;
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::transport::Channel;

pub(crate) struct Node {
    pub(crate) folder: TempDir,
    pub(crate) store: LocalStore,
    pub(crate) address: SocketAddr,
    pub(crate) metrics: Metrics,
    token: CancellationToken,
    server: JoinHandle<anyhow::Result<()>>,
}

pub(crate) fn open(folder: &Path) -> LocalStore {
    LocalStore::open(LocalConfig {
        objects: folder.join("objects"),
        index: folder.join("index"),
        inline_limit: 16 << 10,
    })
    .unwrap()
}

impl Node {
    pub(crate) async fn start() -> Self {
        Self::start_behind(Guard::default()).await
    }

    pub(crate) async fn start_behind(guard: Guard) -> Self {
        Self::start_with(tempfile::tempdir().unwrap(), guard).await
    }

    /// On a folder that a node left behind.
    pub(crate) async fn start_in(folder: TempDir) -> Self {
        Self::start_with(folder, Guard::default()).await
    }

    async fn start_with(folder: TempDir, guard: Guard) -> Self {
        let store = open(folder.path());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let metrics = Metrics::new();
        let token = CancellationToken::new();
        let server = tokio::spawn(aether_store_node::serve(
            listener,
            store.clone(),
            StoreMetrics::new(&metrics),
            guard,
            token.clone(),
        ));
        Self { folder, store, address, metrics, token, server }
    }

    pub(crate) fn uri(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) async fn remote(&self) -> RemoteStore {
        RemoteStore::connect(&self.uri()).await.unwrap()
    }

    pub(crate) async fn channel(&self) -> Channel {
        Channel::from_shared(self.uri()).unwrap().connect().await.unwrap()
    }

    /// Stops, and leaves the folder for another start. Clones of the store must be dropped.
    pub(crate) async fn keep(self) -> TempDir {
        self.token.cancel();
        self.server.await.unwrap().unwrap();
        self.folder
    }

    pub(crate) async fn stop(self) {
        self.token.cancel();
        self.server.await.unwrap().unwrap();
    }
}
