//! TLS on the store's port, by a certificate in two files that may be replaced at any time.
//!
//! A new certificate is shown to new connections; those there are go on.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use aether_runtime::CancellationToken;
use anyhow::Context;
use futures::{Stream, StreamExt, stream};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// What a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at one time.
const HANDSHAKES: usize = 256;

/// The certificate that is shown, and where it comes from. Clones show the same.
#[derive(Clone)]
pub struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    shown: Arc<Shown>,
    config: Arc<ServerConfig>,
}

#[derive(Debug)]
struct Shown(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.read().expect("no holder panics").clone())
    }
}

impl Tls {
    /// Shows the certificate (a chain, PEM) and uses the key that are in these files.
    ///
    /// # Errors
    /// The file that cannot be used, and why.
    pub fn load(certificate: PathBuf, key: PathBuf) -> anyhow::Result<Self> {
        let shown = Arc::new(Shown(RwLock::new(Arc::new(read(&certificate, &key)?))));
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(shown.clone());
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self { certificate, key, shown, config: Arc::new(config) })
    }

    /// Looks at the files `every` so often until `stop`.
    ///
    /// # Errors
    /// None: what cannot be used is logged, and the certificate there is shown on.
    pub async fn follow(self, every: Duration, stop: CancellationToken) -> anyhow::Result<()> {
        let mut failed = None;
        while stop.run_until_cancelled(tokio::time::sleep(every)).await.is_some() {
            match read(&self.certificate, &self.key) {
                Ok(found) => {
                    failed = None;
                    let mut shown = self.shown.0.write().expect("no holder panics");
                    if shown.cert != found.cert {
                        *shown = Arc::new(found);
                        tracing::info!(file = %self.certificate.display(), "showing a new certificate");
                    }
                }
                // Between the two files of a change, or for longer: said once.
                Err(error) => {
                    let error = format!("{error:#}");
                    if failed.as_ref() != Some(&error) {
                        tracing::warn!("{error}; the certificate there is goes on being shown");
                    }
                    failed = Some(error);
                }
            }
        }
        Ok(())
    }

    /// The connections whose handshake succeeds. One that is slow keeps no other waiting.
    pub(crate) fn accept(self, listener: TcpListener) -> impl Stream<Item = io::Result<TlsStream<TcpStream>>> {
        let acceptor = TlsAcceptor::from(self.config);
        let connections = stream::unfold(listener, async |listener| Some((accept_one(&listener).await, listener)));
        connections
            .map(move |stream| {
                let handshake = acceptor.accept(stream);
                async move { tokio::time::timeout(HANDSHAKE, handshake).await }
            })
            .buffer_unordered(HANDSHAKES)
            .filter_map(async |handshake| match handshake {
                Ok(Ok(stream)) => Some(Ok(stream)),
                Ok(Err(error)) => {
                    tracing::debug!(%error, "a handshake failed");
                    None
                }
                Err(_) => None,
            })
    }
}

async fn accept_one(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let _ = stream.set_nodelay(true);
                return stream;
            }
            Err(error) => {
                // Out of file descriptors, mostly: some will be given back.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn read(certificate: &PathBuf, key: &PathBuf) -> anyhow::Result<CertifiedKey> {
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("cannot read the certificate {} (--tls-cert)", certificate.display()))?;
    let private = PrivateKeyDer::from_pem_file(key)
        .with_context(|| format!("cannot read the key {} (--tls-key)", key.display()))?;
    CertifiedKey::from_der(chain, private, &ring::default_provider()).with_context(|| {
        format!(
            "{} and {} are not a certificate and its key (--tls-cert, --tls-key)",
            certificate.display(),
            key.display()
        )
    })
}
