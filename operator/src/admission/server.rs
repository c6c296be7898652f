//! Serves the webhook by TLS, under a certificate that may change while it runs.

use std::sync::Arc;
use std::time::Duration;

use aether_runtime::CancellationToken;
use aether_runtime::certificate::Certificate;
use anyhow::Result;
use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use rustls::crypto::ring;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

/// What a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// The certificate to show.
pub type Settings = Arc<ServerConfig>;

/// Serves by this certificate.
///
/// # Errors
/// A certificate that TLS refuses.
pub(super) fn settings(certificate: &Certificate) -> Result<Settings> {
    let mut tls = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(certificate.chain.clone(), certificate.key.clone_key())?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(tls))
}

/// Serves until `stop`; then takes no more connections and returns when those there are have ended. Connections are
/// refused while there is no certificate.
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
                let Some(settings) = settings.borrow().clone() else { continue };
                drop(connections.spawn(connection(stream, settings, router.clone(), stop.clone())));
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

async fn connection(stream: TcpStream, settings: Settings, router: Router, stop: CancellationToken) {
    let _ = stream.set_nodelay(true);
    let stream = match tokio::time::timeout(HANDSHAKE, TlsAcceptor::from(settings).accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!("a handshake failed: {error}"),
        Err(_) => return tracing::debug!("a handshake took too long"),
    };
    let builder = Builder::new(TokioExecutor::new());
    let mut served = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
    let result = tokio::select! {
        result = served.as_mut() => result,
        () = stop.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = result {
        tracing::debug!("a connection ended: {error}");
    }
}
