//! Serves a router by TLS, under settings that may change while it runs.
//!
//! When the settings change, connections made under the old ones finish what they are doing and close, so that a certificate or
//! an authority that was withdrawn is used no longer than a request lasts.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::CertificateDer;
use rustls::server::danger::ClientCertVerifier;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::certificate::Certificate;

/// What a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// What connections are made under.
pub trait Settings: Clone + Send + Sync + 'static {
    /// The certificate to show, and the clients to believe.
    fn tls(&self) -> Arc<ServerConfig>;

    /// What the client sees who has shown this certificate, the chain of which was verified.
    fn routes(&self, router: Router, client: Option<&CertificateDer<'_>>) -> Router;
}

/// Shows this certificate and asks clients for none.
impl Settings for Arc<ServerConfig> {
    fn tls(&self) -> Arc<ServerConfig> {
        self.clone()
    }

    fn routes(&self, router: Router, _: Option<&CertificateDer<'_>>) -> Router {
        router
    }
}

/// What handshakes need: HTTP/2 and HTTP/1.1 under this certificate. Clients are asked for one where `clients` says how to verify it.
///
/// # Errors
/// A certificate that TLS refuses.
pub fn config(
    certificate: &Certificate,
    clients: Option<Arc<dyn ClientCertVerifier>>,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?;
    let builder = match clients {
        Some(clients) => builder.with_client_cert_verifier(clients),
        None => builder.with_no_client_auth(),
    };
    let mut tls = builder.with_single_cert(certificate.chain.clone(), certificate.key.clone_key())?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(tls))
}

/// Serves until `stop`; then takes no more connections and returns when those there are have ended. Connections are
/// refused while there are no settings.
///
/// # Errors
/// None at present; a connection that fails concerns nobody else.
pub async fn serve<S: Settings>(
    listener: TcpListener,
    settings: watch::Receiver<Option<S>>,
    router: Router,
    stop: CancellationToken,
) -> anyhow::Result<()> {
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
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
    Ok(())
}

async fn connection<S: Settings>(
    stream: TcpStream,
    mut settings: watch::Receiver<Option<S>>,
    router: Router,
    stop: CancellationToken,
) {
    let Some(current) = settings.borrow_and_update().clone() else { return };
    let _ = stream.set_nodelay(true);
    let stream = match tokio::time::timeout(HANDSHAKE, TlsAcceptor::from(current.tls()).accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!("a handshake failed: {error}"),
        Err(_) => return tracing::debug!("a handshake took too long"),
    };
    let client = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let service = TowerToHyperService::new(current.routes(router, client));
    let builder = Builder::new(TokioExecutor::new());
    let mut served = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    let mut ending = false;
    let result = loop {
        tokio::select! {
            result = served.as_mut() => break result,
            _ = settings.changed(), if !ending => {}
            () = stop.cancelled(), if !ending => {}
        }
        ending = true;
        served.as_mut().graceful_shutdown();
    };
    if let Err(error) = result {
        tracing::debug!("a connection ended: {error}");
    }
}
