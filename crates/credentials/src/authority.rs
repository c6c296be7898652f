//! A connection to whom an authority vouches for.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::crypto::ring;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Why a connection is not made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot read the store's authority {0} (--store-ca): {1}")]
    Authority(String, String),
    #[error("{0:?} is not a host")]
    Host(String),
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Tls(#[from] rustls::Error),
}

/// Connects, and believes no other authorities than those in `file`, as it is now. Who answers must be the host of `uri`, also
/// `at` one of its addresses.
pub(crate) async fn dial(
    uri: Uri,
    at: Option<SocketAddr>,
    file: PathBuf,
) -> Result<TokioIo<TlsStream<TcpStream>>, Error> {
    let roots = roots(&file).await?;
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let name = ServerName::try_from(host.to_owned()).map_err(|_| Error::Host(host.to_owned()))?;
    let stream = match at {
        Some(address) => TcpStream::connect(address).await?,
        None => TcpStream::connect((host, uri.port_u16().unwrap_or(443))).await?,
    };
    stream.set_nodelay(true)?;
    Ok(TokioIo::new(TlsConnector::from(Arc::new(config)).connect(name, stream).await?))
}

async fn roots(file: &Path) -> Result<RootCertStore, Error> {
    let unusable = |problem: String| Error::Authority(file.display().to_string(), problem);
    let pem = tokio::fs::read(file).await.map_err(|error| unusable(error.to_string()))?;
    let certificates: Vec<CertificateDer<'static>> =
        CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().map_err(|error| unusable(error.to_string()))?;
    let mut roots = RootCertStore::empty();
    let (usable, _) = roots.add_parsable_certificates(certificates);
    if usable == 0 { Err(unusable("there is no certificate in it".into())) } else { Ok(roots) }
}
