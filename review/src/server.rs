//! Serves a router by TLS, under settings that may change while it runs.
//!
//! Each connection carries a [`Peer`]. When the settings change, connections made under the old ones finish what they
//! are doing and close, so that a withdrawn authority is believed no longer than a request lasts.

use std::sync::Arc;
use std::time::Duration;

use aether_runtime::CancellationToken;
use aether_runtime::certificate::Certificate;
use anyhow::Result;
use axum::{Extension, Router};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, ring};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tracing::{debug, warn};

use crate::api::Peer;
use crate::front_proxy::Trust;

/// What a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// The certificate to show and the clients to believe.
#[derive(Clone)]
pub struct Settings {
    tls: Arc<ServerConfig>,
    trust: Arc<Trust>,
}

impl Settings {
    /// Checks that the two can be served by.
    ///
    /// # Errors
    /// A certificate or authority that TLS refuses.
    pub fn new(certificate: &Certificate, trust: Trust) -> Result<Self> {
        let provider: Arc<CryptoProvider> = Arc::new(ring::default_provider());
        let mut tls = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(trust.verifier(provider)?)
            .with_single_cert(certificate.chain.clone(), certificate.key.clone_key())?;
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self { tls: Arc::new(tls), trust: Arc::new(trust) })
    }
}

/// Serves until `stop`; then takes no more connections and returns when those there are have ended. Connections are
/// refused while there are no settings.
///
/// # Errors
/// None at present; a connection that fails concerns nobody else.
pub async fn serve(
    listener: TcpListener,
    settings: watch::Receiver<Option<Settings>>,
    router: Router,
    stop: CancellationToken,
) -> Result<()> {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = stop.cancelled() => break,
        };
        match accepted {
            Ok((stream, _)) => {
                drop(connections.spawn(connection(stream, settings.clone(), router.clone(), stop.clone())))
            }
            Err(error) => {
                // Out of file descriptors, mostly: some will be given back.
                warn!("cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
    Ok(())
}

async fn connection(
    stream: TcpStream,
    mut settings: watch::Receiver<Option<Settings>>,
    router: Router,
    stop: CancellationToken,
) {
    let Some(current) = settings.borrow_and_update().clone() else { return };
    let _ = stream.set_nodelay(true);
    let stream = match tokio::time::timeout(HANDSHAKE, TlsAcceptor::from(current.tls).accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return debug!("a handshake failed: {error}"),
        Err(_) => return debug!("a handshake took too long"),
    };
    // The handshake has verified the chain; what is left to check is the name.
    let leaf = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let front_proxy = leaf.is_some_and(|leaf| current.trust.accepts(leaf));
    let peer = Peer { trust: current.trust, front_proxy };
    let service = TowerToHyperService::new(router.layer(Extension(peer)));
    let builder = Builder::new(TokioExecutor::new());
    let mut served = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    let mut ending = false;
    loop {
        let result = tokio::select! {
            result = served.as_mut() => result,
            _ = settings.changed(), if !ending => {
                ending = true;
                served.as_mut().graceful_shutdown();
                continue;
            }
            () = stop.cancelled(), if !ending => {
                ending = true;
                served.as_mut().graceful_shutdown();
                continue;
            }
        };
        if let Err(error) = result {
            debug!("a connection ended: {error}");
        }
        return;
    }
}
