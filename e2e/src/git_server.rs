//! A git server for tests and the demo: git's own smart HTTP program behind a small HTTP server, on the address that pods
//! reach. Fetching and pushing; with a password, if wished.

use std::{net::SocketAddr, path::PathBuf, process::Stdio, sync::Arc};

use anyhow::{Context, Result};
use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    response::Response,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures::TryStreamExt;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::TcpListener,
    process::Command,
    task::JoinHandle,
};
use tokio_util::io::{ReaderStream, StreamReader};

use crate::network::HOST;

/// User and password.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The user.
    pub user: String,
    /// The password or token.
    pub password: String,
}

struct Served {
    root: PathBuf,
    credentials: Option<Credentials>,
}

/// A running server; ends when dropped.
#[derive(Debug)]
pub struct GitServer {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl GitServer {
    /// Serves all repositories below a folder, on any free port of the cluster's bridge.
    pub async fn start(root: PathBuf, credentials: Option<Credentials>) -> Result<Self> {
        let listener = TcpListener::bind((HOST, 0))
            .await
            .with_context(|| format!("cannot listen on {HOST}: is the cluster up?"))?;
        let address = listener.local_addr()?;
        let task = tokio::spawn(async move {
            if let Err(error) = serve(listener, root, credentials).await {
                tracing::error!("the git server ended: {error:#}");
            }
        });
        Ok(Self { address, task })
    }

    /// The URL of a repository of that folder.
    pub fn url(&self, repository: &str) -> String {
        format!("http://{}/{repository}", self.address)
    }
}

impl Drop for GitServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Serves all repositories below a folder until the process ends.
pub async fn serve(listener: TcpListener, root: PathBuf, credentials: Option<Credentials>) -> Result<()> {
    let router = Router::new().fallback(handle).with_state(Arc::new(Served { root, credentials }));
    Ok(axum::serve(listener, router).await?)
}

async fn handle(State(served): State<Arc<Served>>, request: Request) -> Response {
    let refused = |status: StatusCode, text: String| {
        let mut response = Response::new(Body::from(text));
        *response.status_mut() = status;
        response
    };
    if !allowed(&served, request.headers()) {
        let mut response = refused(StatusCode::UNAUTHORIZED, "a user and a password are needed\n".into());
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"git\""));
        return response;
    }
    backend(&served, request)
        .await
        .unwrap_or_else(|error| refused(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")))
}

fn allowed(served: &Served, headers: &HeaderMap) -> bool {
    let Some(Credentials { user, password }) = &served.credentials else { return true };
    let expected = format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}")));
    headers.get(header::AUTHORIZATION).is_some_and(|given| given == expected.as_str())
}

/// Hands a request to `git http-backend` by the rules of CGI (RFC 3875), streaming both ways.
async fn backend(served: &Served, request: Request) -> Result<Response> {
    let (parts, body) = request.into_parts();
    let header = |name: HeaderName| parts.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let mut child = Command::new("git")
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", &served.root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        // Repositories of a test may belong to any user, and pushes need no further configuration.
        .env("GIT_CONFIG_COUNT", "2")
        .env("GIT_CONFIG_KEY_0", "safe.directory")
        .env("GIT_CONFIG_VALUE_0", "*")
        .env("GIT_CONFIG_KEY_1", "http.receivepack")
        .env("GIT_CONFIG_VALUE_1", "true")
        .env("PATH_INFO", parts.uri.path())
        .env("QUERY_STRING", parts.uri.query().unwrap_or_default())
        .env("REQUEST_METHOD", parts.method.as_str())
        .env("CONTENT_TYPE", header(header::CONTENT_TYPE))
        .env("HTTP_CONTENT_ENCODING", header(header::CONTENT_ENCODING))
        .env("GIT_PROTOCOL", header(HeaderName::from_static("git-protocol")))
        .env("REMOTE_USER", served.credentials.as_ref().map_or("anonymous", |credentials| &credentials.user))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .spawn()
        .context("cannot start git http-backend")?;
    let mut stdin = child.stdin.take().context("stdin is piped")?;
    let mut stdout = BufReader::new(child.stdout.take().context("stdout is piped")?);
    tokio::spawn(async move {
        let mut body = StreamReader::new(body.into_data_stream().map_err(std::io::Error::other));
        // A backend that has its answer may end before it has read everything.
        let _ = tokio::io::copy(&mut body, &mut stdin).await;
        // Its closing is the end of the body.
        drop(stdin);
        let _ = child.wait().await;
    });

    let mut response = Response::new(Body::empty());
    let mut line = String::new();
    loop {
        line.clear();
        anyhow::ensure!(stdout.read_line(&mut line).await? > 0, "git http-backend ended without an answer");
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        if name.eq_ignore_ascii_case("status") {
            *response.status_mut() = value.split(' ').next().unwrap_or_default().parse()?;
        } else {
            response.headers_mut().append(name.parse::<HeaderName>()?, value.parse()?);
        }
    }
    *response.body_mut() = Body::from_stream(ReaderStream::new(stdout));
    Ok(response)
}
