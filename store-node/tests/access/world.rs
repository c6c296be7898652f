//! A store node that asks who calls, the API server that it asks, and the files of both sides.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aether_cas::RemoteStore;
use aether_cas::remote::RemoteConfig;
use aether_credentials::{Connection, Credentials};
use aether_runtime::{CancellationToken, Metrics};
use aether_store_node::Guard;
use aether_store_node::access::{Access, Reviews, Times, Tls};
use aether_testkit::ApiServer;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::Endpoint;

use crate::common::Node;

pub(crate) const DRIVER: &str = "system:serviceaccount:aether-system:aether-driver";
pub(crate) const OPERATOR: &str = "system:serviceaccount:aether-system:aether-operator";
pub(crate) const IMPORTER: &str = "system:serviceaccount:platform:aether-importer";
const GRANTS: [&str; 4] = [
    "system:serviceaccount:aether-system:aether-driver=read,write",
    "system:serviceaccount:aether-system:aether-operator=pin",
    "system:serviceaccount:*:aether-importer=write",
    "system:serviceaccount:aether-system:admin=admin",
];

/// A token as Kubernetes makes them, as far as anybody can see: it ends `seconds` from now.
pub(crate) fn token_for(audiences: &[&str], seconds: i64) -> String {
    static MADE: AtomicU32 = AtomicU32::new(0);
    let number = MADE.fetch_add(1, Ordering::Relaxed);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let payload = serde_json::json!({"aud": audiences, "exp": now.saturating_add_signed(seconds), "jti": number});
    format!("e30.{}.c2lnbmVk", URL_SAFE_NO_PAD.encode(payload.to_string()))
}

/// A good one, always the same for a number.
pub(crate) fn token(number: u32) -> String {
    let payload = serde_json::json!({"aud": ["aether-store"], "exp": 4_000_000_000_u64, "jti": format!("n{number}")});
    format!("e30.{}.c2lnbmVk", URL_SAFE_NO_PAD.encode(payload.to_string()))
}

pub(crate) struct World {
    pub(crate) node: Node,
    pub(crate) api: ApiServer,
    pub(crate) times: Times,
    metrics: Metrics,
    files: TempDir,
    stop: CancellationToken,
}

impl World {
    pub(crate) async fn start() -> Self {
        let files = tempfile::tempdir().unwrap();
        write_authority(&files, "ca.crt");
        let tls = Tls::load(files.path().join("tls.crt"), files.path().join("tls.key")).unwrap();
        let stop = CancellationToken::new();
        tokio::spawn(tls.clone().follow(Duration::from_millis(50), stop.clone()));
        let (api, metrics) = (ApiServer::new(), Metrics::new());
        let times = Times {
            believed: Duration::from_millis(1500),
            refused: Duration::from_millis(700),
            answer: Duration::from_secs(5),
        };
        let grants = GRANTS.iter().map(|grant| grant.parse().unwrap()).collect();
        let access = Access::new(Reviews::new(api.client(), times), grants, &metrics);
        let node = Node::start_behind(Guard { tls: Some(tls), access: Some(access) }).await;
        Self { node, api, times, metrics, files, stop }
    }

    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.node.stop().await;
    }

    /// A new token of this account.
    pub(crate) fn account(&self, account: &str) -> String {
        let token = token_for(&["aether-store"], 3600);
        self.api.know_token(&token, account, &["aether-store"]);
        token
    }

    /// How many calls were refused for this reason.
    pub(crate) fn refused(&self, reason: &str) -> u64 {
        let text = self.metrics.render();
        let line =
            text.lines().find(|line| line.starts_with("aether_store_refused_calls_total") && line.contains(reason));
        line.and_then(|line| line.rsplit(' ').next()).unwrap().parse().unwrap()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    fn uri(&self) -> String {
        format!("https://{}", self.node.address)
    }

    fn credentials(&self) -> Credentials {
        Credentials { authority: Some(self.file("ca.crt")), token: Some(self.file("token")) }
    }

    pub(crate) fn write_token(&self, token: &str) {
        std::fs::write(self.file("token"), token).unwrap();
    }

    /// A connection with this token; the file may have another one afterwards.
    pub(crate) fn connection(&self, token: Option<&str>) -> Connection {
        let credentials = Credentials { token: token.map(|token| self.keep(token)), ..self.credentials() };
        credentials.connect(&Endpoint::from_shared(self.uri()).unwrap()).unwrap()
    }

    /// A connection to the node as one of the addresses of another name.
    pub(crate) fn connection_at(&self, uri: &str, token: &str) -> Connection {
        let credentials = Credentials { token: Some(self.keep(token)), ..self.credentials() };
        credentials.connect_at(&Endpoint::from_shared(uri.to_owned()).unwrap(), Some(self.node.address)).unwrap()
    }

    /// A token in a file of its own.
    fn keep(&self, token: &str) -> PathBuf {
        let file = self.file(&format!("token-{}", aether_cas::Digest::of(token.as_bytes())));
        std::fs::write(&file, token).unwrap();
        file
    }

    pub(crate) fn config(&self, uri: &str, credentials: Credentials) -> RemoteConfig {
        RemoteConfig { credentials, patience: Duration::ZERO, ..RemoteConfig::new(uri) }
    }

    pub(crate) fn store_with(&self, change: impl FnOnce(&mut Credentials)) -> RemoteStore {
        let mut credentials = self.credentials();
        change(&mut credentials);
        RemoteStore::lazy(&self.config(&self.uri(), credentials)).unwrap()
    }

    /// A store that shows this token, from the file `token`.
    pub(crate) fn store(&self, token: &str) -> RemoteStore {
        let file = self.file(&format!("token-{}", aether_cas::Digest::of(token.as_bytes())));
        std::fs::write(&file, token).unwrap();
        self.store_with(|credentials| credentials.token = Some(file))
    }

    pub(crate) fn store_with_old_authority(&self, token: &str) -> RemoteStore {
        self.write_token(token);
        self.store_with(|credentials| credentials.authority = Some(self.file("old.crt")))
    }

    pub(crate) fn write_key_only(&self) {
        std::fs::write(self.file("tls.key"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
    }

    pub(crate) fn renew_under_another_authority(&self) {
        std::fs::rename(self.file("ca.crt"), self.file("old.crt")).unwrap();
        write_authority(&self.files, "ca.crt");
    }

    /// The certificate that a new connection is shown.
    pub(crate) async fn shown(&self) -> CertificateDer<'static> {
        let mut roots = rustls::RootCertStore::empty();
        for file in ["ca.crt", "old.crt"] {
            if let Ok(pem) = std::fs::read(self.file(file)) {
                roots.add(CertificateDer::from_pem_slice(&pem).unwrap()).unwrap();
            }
        }
        let mut config =
            rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(roots)
                .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let stream = TcpStream::connect(self.node.address).await.unwrap();
        let name = ServerName::IpAddress(self.node.address.ip().into());
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
        stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
    }

    pub(crate) async fn until_shown_is_not(&self, before: &CertificateDer<'static>) {
        for _ in 0..100 {
            if self.shown().await != *before {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("the new certificate is not shown");
    }
}

/// A new authority in `file`, and a certificate of it for this machine.
fn write_authority(folder: &TempDir, file: &str) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let authority = params.self_signed(&key).unwrap();
    let own = KeyPair::generate().unwrap();
    let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
    let certificate = CertificateParams::new(names).unwrap().signed_by(&own, &Issuer::new(params, key)).unwrap();
    for (name, pem) in [(file, authority.pem()), ("tls.crt", certificate.pem()), ("tls.key", own.serialize_pem())] {
        std::fs::write(folder.path().join(name), pem).unwrap();
    }
}
