//! Whom the server believes, over real TLS: only the front proxy, by its certificate; headers alone mean nothing.

use std::sync::Arc;

use aether_cas::MemoryStore;
use aether_review::api::router;
use aether_review::front_proxy::Trust;
use aether_review::server::Settings;
use aether_runtime::CancellationToken;
use aether_runtime::certificate::Certificate;
use aether_runtime::tls::serve;
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ConfigMap;
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsConnector;

use crate::cluster;

const NAME: &str = "aether-review.aether-system.svc";

struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

type ClientCertificate = (CertificateDer<'static>, PrivateKeyDer<'static>);

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "front-proxy-ca");
        Self { pem: params.self_signed(&key).unwrap().pem(), issuer: Issuer::new(params, key) }
    }

    fn client(&self, name: &str) -> ClientCertificate {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.der().clone(), PrivateKeyDer::try_from(key.serialize_der()).unwrap())
    }

    fn trust(&self) -> Trust {
        let data = [
            ("requestheader-client-ca-file", self.pem.as_str()),
            ("requestheader-allowed-names", r#"["front-proxy-client"]"#),
            ("requestheader-username-headers", r#"["X-Remote-User"]"#),
            ("requestheader-group-headers", r#"["X-Remote-Group"]"#),
            ("requestheader-extra-headers-prefix", r#"["X-Remote-Extra-"]"#),
        ];
        let data = data.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        Trust::of(&ConfigMap { data: Some(data), ..Default::default() }).unwrap()
    }
}

struct Server {
    address: std::net::SocketAddr,
    bundle: String,
    certificate: Certificate,
    settings: watch::Sender<Option<Settings>>,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl Server {
    async fn start(trust: Trust) -> Self {
        let names = [NAME.to_owned()];
        let certificate =
            Certificate::read(&Certificate::issue(None, "aether-review-ca", &names, Timestamp::now()).unwrap(), &names)
                .unwrap();
        let (settings, served) = watch::channel(Some(Settings::new(&certificate, trust).unwrap()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let (service, _) = cluster::service(&MemoryStore::new(), vec![]);
        let task = tokio::spawn(serve(listener, served, router(service), stop.clone()));
        Self { address, bundle: certificate.bundle.clone(), certificate, settings, stop, task }
    }

    async fn connect(&self, client: Option<ClientCertificate>) -> Result<Connection, Box<dyn std::error::Error>> {
        let mut roots = RootCertStore::empty();
        for authority in CertificateDer::pem_slice_iter(self.bundle.as_bytes()) {
            roots.add(authority?)?;
        }
        let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots);
        let config = match client {
            Some((certificate, key)) => config.with_client_auth_cert(vec![certificate], key)?,
            None => config.with_no_client_auth(),
        };
        let stream = TcpStream::connect(self.address).await?;
        let stream = TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(NAME)?, stream).await?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let task = tokio::spawn(connection);
        Ok(Connection { sender, task })
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }
}

struct Connection {
    sender: hyper::client::conn::http1::SendRequest<Empty<Bytes>>,
    task: tokio::task::JoinHandle<hyper::Result<()>>,
}

impl Connection {
    async fn get(
        &mut self,
        path: &str,
        user: Option<&str>,
    ) -> Result<(u16, serde_json::Value), Box<dyn std::error::Error>> {
        self.ask(Request::get(path), user).await
    }

    async fn ask(
        &mut self,
        request: hyper::http::request::Builder,
        user: Option<&str>,
    ) -> Result<(u16, serde_json::Value), Box<dyn std::error::Error>> {
        let mut request = request.header("host", NAME);
        if let Some(user) = user {
            request = request.header("X-Remote-User", user).header("X-Remote-Group", "system:masters");
        }
        let response = self.sender.send_request(request.body(Empty::new())?).await?;
        let code = response.status().as_u16();
        let body = response.into_body().collect().await?.to_bytes();
        Ok((code, serde_json::from_slice(&body)?))
    }
}

#[tokio::test]
async fn the_front_proxy_is_believed() {
    let authority = Authority::new();
    let server = Server::start(authority.trust()).await;
    let mut connection = server.connect(Some(authority.client("front-proxy-client"))).await.unwrap();
    let (code, body) = connection.get("/apis/review.aether.dev/v1alpha1", Some("ada")).await.unwrap();
    assert_eq!((code, &body["kind"]), (200, &"APIResourceList".into()));
    assert_eq!(body["resources"][0]["name"], "checkpoints/changes");
    assert_eq!(connection.get("/openapi/v2", Some("ada")).await.unwrap().1["swagger"], "2.0");
    let who = || Request::post("/apis/review.aether.dev/v1alpha1/selfsubjectreviews");
    let (code, body) = connection.ask(who(), Some("ada")).await.unwrap();
    let expected = serde_json::json!({"username": "ada", "uid": null, "groups": ["system:masters"], "extra": {}});
    assert_eq!((code, &body["status"]["userInfo"]), (201, &expected));
    assert_eq!(connection.ask(who(), None).await.unwrap().0, 401);
    let (code, body) = connection.get("/apis/other", Some("ada")).await.unwrap();
    assert_eq!((code, &body["kind"]), (404, &"Status".into()));
    let (code, body) = connection.get("/apis", None).await.unwrap();
    assert_eq!((code, &body["reason"]), (401, &"Unauthorized".into()), "it must say on whose behalf it asks");
    drop(connection);
    server.stop().await;
}

#[tokio::test]
async fn headers_without_a_certificate_mean_nothing() {
    let server = Server::start(Authority::new().trust()).await;
    let mut connection = server.connect(None).await.unwrap();
    let of = |rest: &str| format!("/apis/review.aether.dev/v1alpha1/namespaces/demo/{rest}");
    let served = ["checkpoints/k/changes", "checkpoints/k/file?path=a", "commits/c/changes", "sessions/s/notes"];
    for path in served.map(of).iter().map(String::as_str).chain(["/apis", "/nowhere"]) {
        let (code, body) = connection.get(path, Some("ada")).await.unwrap();
        assert_eq!((code, &body["kind"]), (401, &"Status".into()), "{path}");
    }
    drop(connection);
    server.stop().await;
}

#[tokio::test]
async fn another_name_of_the_right_authority_is_nobody() {
    let authority = Authority::new();
    let server = Server::start(authority.trust()).await;
    let mut connection = server.connect(Some(authority.client("kubelet"))).await.unwrap();
    assert_eq!(connection.get("/apis", Some("ada")).await.unwrap().0, 401);
    drop(connection);
    server.stop().await;
}

#[tokio::test]
async fn another_authority_is_refused() {
    let server = Server::start(Authority::new().trust()).await;
    // In TLS 1.3 the client learns of it with the first answer.
    let refused = match server.connect(Some(Authority::new().client("front-proxy-client"))).await {
        Err(_) => true,
        Ok(mut connection) => connection.get("/apis", Some("ada")).await.is_err(),
    };
    assert!(refused);
    server.stop().await;
}

#[tokio::test]
async fn a_withdrawn_authority_loses_its_connections() {
    let (old, new) = (Authority::new(), Authority::new());
    let server = Server::start(old.trust()).await;
    let mut connection = server.connect(Some(old.client("front-proxy-client"))).await.unwrap();
    assert_eq!(connection.get("/apis", Some("ada")).await.unwrap().0, 200);
    server.settings.send_replace(Some(Settings::new(&server.certificate, new.trust()).unwrap()));
    connection.task.await.unwrap().unwrap();
    let mut connection = server.connect(Some(new.client("front-proxy-client"))).await.unwrap();
    assert_eq!(connection.get("/apis", Some("ada")).await.unwrap().0, 200);
    drop(connection);
    server.stop().await;
}
