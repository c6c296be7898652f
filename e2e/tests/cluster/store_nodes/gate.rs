//! A gate between the store and its bucket: while it is closed no pack gets into the bucket, though all can be read, so that an
//! upload is under way for as long as a test wants.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use aether_e2e::network::HOST;
use aether_testkit::bucket::BUCKET;
use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Ends, and with it all connections through it, when dropped.
pub(crate) struct Gate {
    port: u16,
    open: watch::Sender<bool>,
    held: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Gate {
    /// Before the service at this URL, open.
    pub(crate) async fn before(service: &str) -> Result<Self> {
        let service = service.strip_prefix("http://").context("the service speaks http")?.to_owned();
        let listener = TcpListener::bind((HOST, 0)).await.with_context(|| format!("cannot listen on {HOST}"))?;
        let port = listener.local_addr()?.port();
        let (open, opened) = watch::channel(true);
        let held = Arc::new(AtomicUsize::new(0));
        let counted = held.clone();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let (service, opened, held) = (service.clone(), opened.clone(), counted.clone());
                connections.spawn(async move {
                    // A connection that breaks is the store's to see.
                    let _ = pass(client, &service, opened, &held).await;
                });
            }
        });
        Ok(Self { port, open, held, task })
    }

    /// What the store's nodes know as the bucket service.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{HOST}:{}", self.port)
    }

    pub(crate) fn close(&self) {
        self.held.store(0, Ordering::SeqCst);
        self.open.send_replace(false);
    }

    pub(crate) fn open(&self) {
        self.open.send_replace(true);
    }

    /// How many requests to store a pack have come to the closed gate.
    pub(crate) fn held(&self) -> usize {
        self.held.load(Ordering::SeqCst)
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(client: TcpStream, service: &str, mut opened: watch::Receiver<bool>, held: &AtomicUsize) -> Result<()> {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_service, mut to_service) = TcpStream::connect(service).await?.into_split();
    let requests = async {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let read = from_client.read(&mut buffer).await?;
            if read == 0 {
                break anyhow::Ok(());
            }
            // As a whole, or the begin of one in parts.
            let stores = ["PUT", "POST"]
                .iter()
                .any(|verb| buffer[..read].starts_with(format!("{verb} /{BUCKET}/packs/").as_bytes()));
            if stores && !*opened.borrow() {
                held.fetch_add(1, Ordering::SeqCst);
                opened.wait_for(|open| *open).await?;
            }
            to_service.write_all(&buffer[..read]).await?;
        }
    };
    let answers = async { anyhow::Ok(tokio::io::copy(&mut from_service, &mut to_client).await.map(drop)?) };
    // One side that ends ends the other.
    tokio::select! { ended = requests => ended, ended = answers => ended }
}
