//! A git server on threads of the test: git's own `http-backend` behind a small HTTP server, over TLS and behind a
//! password if wished, with the part of Git LFS's protocol that moves contents. Who has the password may push.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use base64::Engine;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A running server. Its threads end with the test's process.
pub struct Server {
    address: SocketAddr,
    /// PEM of the authority that vouches for it; nothing without TLS.
    pub authority: Option<String>,
}

struct Served {
    root: PathBuf,
    /// The header that lets in.
    token: Option<String>,
    base: String,
}

/// Takes a TCP connection as what the bytes come through.
type Accept = Box<dyn Fn(std::net::TcpStream) -> Box<dyn Connection> + Send>;

trait Connection: Read + Write + Send {}
impl<T: Read + Write + Send> Connection for T {}

impl Server {
    /// Serves the repositories in `root`; `credentials` are user and password.
    ///
    /// # Panics
    /// When it does not start.
    pub fn http(root: &Path, credentials: Option<(&str, &str)>) -> Self {
        Self::start(LOOPBACK, root, credentials, None, Box::new(|stream| Box::new(stream)))
    }

    /// The same over TLS, with a certificate for 127.0.0.1 of an authority that nobody knows.
    ///
    /// # Panics
    /// When it does not start.
    pub fn https(root: &Path, credentials: Option<(&str, &str)>) -> Self {
        Self::https_at(LOOPBACK, root, credentials)
    }

    /// The same at another address of this machine.
    ///
    /// # Panics
    /// When it does not start.
    pub fn https_at(address: IpAddr, root: &Path, credentials: Option<(&str, &str)>) -> Self {
        let (authority, config) = tls_at(address);
        let accept: Accept = Box::new(move |stream| {
            Box::new(StreamOwned::new(
                ServerConnection::new(config.clone()).expect("the configuration is good"),
                stream,
            ))
        });
        Self::start(address, root, credentials, Some(authority), accept)
    }

    fn start(
        address: IpAddr,
        root: &Path,
        credentials: Option<(&str, &str)>,
        authority: Option<String>,
        accept: Accept,
    ) -> Self {
        let listener = TcpListener::bind((address, 0)).expect("the address is this machine's");
        let address = listener.local_addr().expect("it is bound");
        let token = credentials.map(|(user, password)| {
            format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")))
        });
        let server = Self { address, authority };
        let served = Arc::new(Served { root: root.to_owned(), token, base: server.url("") });
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (served, mut connection) = (served.clone(), accept(stream));
                // A client that goes away early, or does not believe our certificate, is its own business.
                std::thread::spawn(move || served.answer(&mut *connection));
            }
        });
        server
    }

    /// The address of a repository.
    pub fn url(&self, name: &str) -> String {
        let scheme = if self.authority.is_some() { "https" } else { "http" };
        format!("{scheme}://{}/{name}", self.address)
    }
}

/// An authority for a test.
///
/// # Panics
/// When there can be none.
pub fn authority() -> (String, Issuer<'static, KeyPair>) {
    let mut params = CertificateParams::new(Vec::<String>::new()).expect("no names");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().expect("keys can be made");
    let certificate = params.self_signed(&key).expect("it can be signed");
    (certificate.pem(), Issuer::new(params, key))
}

/// The PEM of an authority, and what a server with a certificate of it for 127.0.0.1 needs.
///
/// # Panics
/// When there can be none.
pub fn tls() -> (String, Arc<ServerConfig>) {
    tls_at(LOOPBACK)
}

fn tls_at(address: IpAddr) -> (String, Arc<ServerConfig>) {
    let (pem, issuer) = authority();
    let key = KeyPair::generate().expect("keys can be made");
    let params = CertificateParams::new(vec![address.to_string()]).expect("an address is a name");
    let certificate = params.signed_by(&key, &issuer).expect("it can be signed");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring has them")
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).expect("rcgen makes PKCS #8"),
        )
        .expect("the key is the certificate's");
    (pem, Arc::new(config))
}

impl Served {
    /// One request, then the connection ends.
    fn answer(&self, connection: &mut dyn Connection) -> std::io::Result<()> {
        let mut reader = BufReader::new(connection);
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            match line.trim_end() {
                "" => break,
                line => lines.push(line.to_owned()),
            }
        }
        let header = |wanted: &str| {
            let named = |line: &String| {
                let (name, value) = line.split_once(": ")?;
                name.eq_ignore_ascii_case(wanted).then(|| value.to_owned())
            };
            lines.iter().skip(1).find_map(named).unwrap_or_default()
        };
        let body = if header("transfer-encoding").eq_ignore_ascii_case("chunked") {
            chunks(&mut reader)?
        } else {
            let mut body = vec![0; header("content-length").parse().unwrap_or(0)];
            reader.read_exact(&mut body)?;
            body
        };
        let connection = reader.into_inner();
        let mut request = lines[0].split(' ');
        let (method, target) = (request.next().unwrap_or_default(), request.next().unwrap_or_default());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));

        let answer = if self.token.as_ref().is_some_and(|token| *token != header("authorization")) {
            response("401 Unauthorized", "WWW-Authenticate: Basic realm=\"git\"\r\n", b"")
        } else if let Some(repository) = path.strip_suffix("/info/lfs/objects/batch") {
            let batch = self.batch(repository, &serde_json::from_slice(&body)?).to_string();
            response("200 OK", "Content-Type: application/vnd.git-lfs+json\r\n", batch.as_bytes())
        } else if let (Some((repository, oid)), "PUT") = (path.split_once("/lfs-objects/"), method) {
            let file = self.large(repository, oid);
            std::fs::create_dir_all(file.parent().unwrap_or(&self.root)).and_then(|()| std::fs::write(file, &body))?;
            response("200 OK", "", b"")
        } else if let Some((repository, oid)) = path.split_once("/lfs-objects/") {
            match std::fs::read(self.large(repository, oid)) {
                Ok(content) => response("200 OK", "", &content),
                Err(_) => response("404 Not Found", "", b""),
            }
        } else {
            let environment = [
                ("PATH_INFO", path),
                ("QUERY_STRING", query),
                ("REQUEST_METHOD", method),
                ("CONTENT_TYPE", &header("content-type")),
                ("HTTP_CONTENT_ENCODING", &header("content-encoding")),
                ("GIT_PROTOCOL", &header("git-protocol")),
                // Git lets push whom the server knows.
                ("REMOTE_USER", if self.token.is_some() { "user" } else { "" }),
            ];
            self.backend(&environment, &body)?
        };
        connection.write_all(&answer)?;
        connection.flush()
    }

    /// Hands a request to git by the rules of CGI (RFC 3875).
    fn backend(&self, environment: &[(&str, &str)], body: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut child = Command::new("git")
            .arg("http-backend")
            .envs(environment.iter().copied())
            .env("GIT_PROJECT_ROOT", &self.root)
            .env("GIT_HTTP_EXPORT_ALL", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        // Requests to fetch are small; and a backend that has its answer may end before it has read everything.
        let _ = child.stdin.take().expect("it is piped").write_all(body);
        let printed = child.wait_with_output()?.stdout;
        let end = printed.windows(4).position(|window| window == b"\r\n\r\n").unwrap_or_default();
        let (head, body) = printed.split_at((end + 4).min(printed.len()));
        let head = String::from_utf8_lossy(head);
        let status = head.lines().find_map(|line| line.strip_prefix("Status: ")).unwrap_or("200 OK");
        let headers: String =
            head.lines().filter(|line| line.contains(": ")).map(|line| format!("{line}\r\n")).collect();
        Ok(response(status, &headers, body))
    }

    /// The batch API of Git LFS.
    fn batch(&self, repository: &str, request: &Value) -> Value {
        let objects = request["objects"].as_array().cloned().unwrap_or_default().into_iter().map(|object| {
            let oid = object["oid"].as_str().unwrap_or_default();
            let href = format!("{}{}/lfs-objects/{oid}", self.base.trim_end_matches('/'), repository);
            let place = if request["operation"] == "upload" {
                ("actions", json!({"upload": {"href": href}}))
            } else if self.large(repository, oid).is_file() {
                ("actions", json!({"download": {"href": href}}))
            } else {
                ("error", json!({"code": 404, "message": "no such object"}))
            };
            json!({"oid": oid, "size": object["size"], place.0: place.1})
        });
        json!({"transfer": "basic", "objects": objects.collect::<Vec<_>>()})
    }

    /// Where `git lfs` keeps a content in the repository that made it; a bare one keeps it likewise.
    fn large(&self, repository: &str, oid: &str) -> PathBuf {
        let parts = [oid.get(..2).unwrap_or("-"), oid.get(2..4).unwrap_or("-"), oid];
        let repository = self.root.join(repository.trim_matches('/'));
        let repository = if repository.is_dir() { repository } else { repository.with_extension("") };
        let git = repository.join(".git");
        if git.is_dir() { git } else { repository }.join("lfs/objects").join(parts.join("/"))
    }
}

/// A body of which nobody knew the length.
fn chunks(reader: &mut impl BufRead) -> std::io::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let length = usize::from_str_radix(line.trim(), 16).map_err(std::io::Error::other)?;
        let begin = body.len();
        // A line end follows each piece.
        body.resize(begin + length + 2, 0);
        reader.read_exact(&mut body[begin..])?;
        body.truncate(begin + length);
        if length == 0 {
            return Ok(body);
        }
    }
}

fn response(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n", body.len());
    [head.as_bytes(), body].concat()
}
