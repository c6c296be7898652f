//! TLS on the store's port, by a certificate in two files that may be replaced at any time.
//!
//! A new certificate is shown to new connections; those there are go on. Of handshakes there are only so many at one time, and
//! only so many from one address: who begins them and stands still keeps no place from others, and takes bounded memory.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, RwLock};
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
/// Handshakes at one time. Whoever comes then waits to be accepted.
const HANDSHAKES: usize = 256;
/// Those of one address. Whoever comes then is hung up on, and tries again.
const HANDSHAKES_OF_ONE: usize = 32;

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
        let under_way = UnderWay::default();
        let connections = stream::unfold(listener, async |listener| Some((accept_one(&listener).await, listener)));
        connections
            .filter_map(move |(stream, from)| std::future::ready(under_way.begin(from).map(|place| (stream, place))))
            .map(move |(stream, place)| {
                let handshake = acceptor.accept(stream);
                async move {
                    let done = tokio::time::timeout(HANDSHAKE, handshake).await;
                    drop(place);
                    done
                }
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

/// How many handshakes of each address are under way. Clones count the same.
#[derive(Clone, Default)]
struct UnderWay(Arc<Mutex<HashMap<IpAddr, usize>>>);

impl UnderWay {
    /// A place for one more of this address, if there may be one.
    fn begin(&self, from: IpAddr) -> Option<Place> {
        let mut counts = self.0.lock().expect("no holder panics");
        let count = counts.entry(from).or_default();
        if *count == HANDSHAKES_OF_ONE {
            tracing::debug!(%from, "hung up: too many handshakes are under way");
            return None;
        }
        *count += 1;
        Some(Place { from, under_way: self.clone() })
    }
}

/// Counts while it is there.
struct Place {
    from: IpAddr,
    under_way: UnderWay,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.under_way.0.lock().expect("no holder panics");
        if let Some(count) = counts.get_mut(&self.from) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.from);
            }
        }
    }
}

async fn accept_one(listener: &TcpListener) -> (TcpStream, IpAddr) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                let _ = stream.set_nodelay(true);
                return (stream, from.ip());
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
