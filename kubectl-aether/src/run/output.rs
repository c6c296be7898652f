//! The output of a pod's container, from its first byte to its last, however often the connection breaks.
//!
//! A log can only be read from its beginning. After a break it is read again and what was printed is skipped by
//! count. When the node has rotated the log meanwhile, the beginning is another one; then the end of what was printed
//! is looked for in the new file, so that the rotation neither loses nor repeats a line that can still be had.
//!
//! A stream that ended is no proof of the end, because the API server ends it also when the node's connection breaks:
//! only a read that began after the container had ended is taken for complete.

use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use futures::AsyncBufReadExt;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::api::{Api, LogParams};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, sleep};

use crate::cluster::explain;
use crate::signals::Interrupted;

/// How much of a log's beginning tells it from another one.
const HEAD: usize = 1024;
/// How much of what was printed last is looked for in a rotated log.
const TAIL: usize = 4096;
/// A rotated log is read into memory up to here; nodes rotate at 10 MiB unless told otherwise.
const ROTATED_LIMIT: usize = 256 << 20;
/// How long a log may be unreadable before that is an error.
const OUTAGE: Duration = Duration::from_secs(120);
/// Pauses between reads, from and to: the container's end becomes known a moment after its log's end.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// The log of one container and how much of it was printed.
pub(crate) struct Output {
    pods: Api<Pod>,
    pod: String,
    container: String,
    /// Bytes of the present log file that were printed.
    printed: u64,
    head: Vec<u8>,
    tail: Vec<u8>,
}

enum End {
    /// The stream ended.
    Reached,
    /// The log is not the one that was read before.
    Rotated,
}

impl Output {
    pub(crate) fn new(pods: Api<Pod>, pod: &str, container: &str) -> Self {
        Self { pods, pod: pod.into(), container: container.into(), printed: 0, head: Vec::new(), tail: Vec::new() }
    }

    /// Prints everything, until the container has ended.
    pub(crate) async fn follow(&mut self, out: &mut (impl AsyncWrite + Unpin)) -> Result<()> {
        let mut broken_since: Option<Instant> = None;
        let mut pause = PAUSE.0;
        loop {
            let before = self.printed;
            let attempt = match self.ended().await {
                Ok(ended) => self.read(!ended, out).await.map(|end| (ended, end)),
                Err(error) => Err(error),
            };
            match attempt {
                Ok((true, End::Reached)) => return Ok(()),
                Ok((ended, End::Rotated)) => {
                    if self.resume(out).await? && ended {
                        return Ok(());
                    }
                }
                Ok((false, End::Reached)) => broken_since = None,
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(error)) => {
                    let since = *broken_since.get_or_insert_with(Instant::now);
                    if self.printed > before {
                        broken_since = None;
                    } else if since.elapsed() > OUTAGE {
                        return Err(error.context(format!("the output of pod {} cannot be read", self.pod)));
                    }
                }
            }
            pause = if self.printed > before { PAUSE.0 } else { (pause * 2).min(PAUSE.1) };
            sleep(pause).await;
        }
    }

    /// Prints what there is now.
    pub(crate) async fn once(&mut self, out: &mut (impl AsyncWrite + Unpin)) -> Result<()> {
        self.read(false, out).await.map(drop).map_err(Failure::into_inner)
    }

    /// Whether the container has ended, so that its log is final.
    async fn ended(&self) -> Result<bool, Failure> {
        let pod = self.pods.get_opt(&self.pod).await.map_err(|error| Failure::of(error, &self.pod))?;
        let Some(pod) = pod else {
            return Err(Failure::Final(anyhow!("pod {} was deleted, and with it the output not shown yet", self.pod)));
        };
        Ok(container_status(&pod, &self.container)
            .is_some_and(|status| status.state.as_ref().is_some_and(|state| state.terminated.is_some()))
            || matches!(pod.status.and_then(|status| status.phase).as_deref(), Some("Succeeded" | "Failed")))
    }

    async fn read(&mut self, follow: bool, out: &mut (impl AsyncWrite + Unpin)) -> Result<End, Failure> {
        let query = LogParams { container: Some(self.container.clone()), follow, ..Default::default() };
        let mut stream = std::pin::pin!(
            self.pods.log_stream(&self.pod, &query).await.map_err(|error| Failure::of(error, &self.pod))?
        );
        let known = self.head.len();
        let mut position: u64 = 0;
        loop {
            let data = stream.fill_buf().await.map_err(|error| Failure::Passing(error.into()))?;
            let count = data.len();
            if count == 0 {
                break;
            }
            let at = usize::try_from(position).unwrap_or(usize::MAX);
            if at < known {
                let compared = count.min(known - at);
                if data[..compared] != self.head[at..at + compared] {
                    return Ok(End::Rotated);
                }
            }
            let skip = usize::try_from(self.printed.saturating_sub(position)).unwrap_or(usize::MAX).min(count);
            self.print(&data[skip..], out).await?;
            position += count as u64;
            stream.consume_unpin(count);
        }
        // A log never shrinks: a shorter one is another one.
        Ok(if position < self.printed { End::Rotated } else { End::Reached })
    }

    async fn print(&mut self, data: &[u8], out: &mut (impl AsyncWrite + Unpin)) -> Result<(), Failure> {
        if data.is_empty() {
            return Ok(());
        }
        let written = async {
            out.write_all(data).await?;
            out.flush().await
        };
        written.await.map_err(|error| {
            Failure::Final(if error.kind() == std::io::ErrorKind::BrokenPipe {
                Interrupted(13).into()
            } else {
                anyhow!(error).context("cannot write to stdout")
            })
        })?;
        self.printed += data.len() as u64;
        let room = HEAD.saturating_sub(self.head.len());
        self.head.extend_from_slice(&data[..room.min(data.len())]);
        self.tail.extend_from_slice(&data[data.len().saturating_sub(TAIL)..]);
        self.tail.drain(..self.tail.len().saturating_sub(TAIL));
        Ok(())
    }

    /// Goes on in the log that took the place of the one that was read; false if it could not be read now.
    async fn resume(&mut self, out: &mut (impl AsyncWrite + Unpin)) -> Result<bool> {
        let query = LogParams { container: Some(self.container.clone()), ..Default::default() };
        let read = async {
            let mut stream = std::pin::pin!(
                self.pods.log_stream(&self.pod, &query).await.map_err(|error| Failure::of(error, &self.pod))?
            );
            let mut content = Vec::new();
            loop {
                let data = stream.fill_buf().await.map_err(|error| Failure::Passing(error.into()))?;
                let count = data.len();
                if count == 0 || content.len() > ROTATED_LIMIT {
                    return Ok(content);
                }
                content.extend_from_slice(data);
                stream.consume_unpin(count);
            }
        };
        let content = match read.await {
            Ok(content) => content,
            // The next round meets the rotation again.
            Err(Failure::Passing(_)) => return Ok(false),
            Err(Failure::Final(error)) => return Err(error),
        };
        let from = going_on(&self.tail, &content).unwrap_or_else(|| {
            eprintln!("warning: the node rotated the output faster than it could be read; some of it is missing");
            0
        });
        self.head = content[..from.min(HEAD)].to_vec();
        self.printed = from as u64;
        self.print(&content[from..], out).await.map_err(Failure::into_inner)?;
        Ok(true)
    }
}

/// Where in `content` the bytes after `tail` begin: after its last occurrence, or after its last part if `content` begins with that.
fn going_on(tail: &[u8], content: &[u8]) -> Option<usize> {
    if tail.is_empty() {
        return Some(0);
    }
    let whole = (0..=content.len().saturating_sub(tail.len())).rev().find(|&at| content[at..].starts_with(tail));
    whole.map(|at| at + tail.len()).or_else(|| {
        let longest = (1..=tail.len().min(content.len())).rev().find(|&count| tail.ends_with(&content[..count]));
        // A rotation is between lines, so nothing in common means that the new log begins where the old one ended.
        longest.or_else(|| (content.len() < TAIL || tail.ends_with(b"\n")).then_some(0))
    })
}

/// Why a read ended early.
enum Failure {
    /// May pass.
    Passing(anyhow::Error),
    /// Will not.
    Final(anyhow::Error),
}

impl Failure {
    fn of(error: kube::Error, pod: &str) -> Self {
        // 400: the container has not started yet, as far as this node knows. 5xx: the node does not answer.
        let hopeless = matches!(&error, kube::Error::Api(status) if matches!(status.code, 401 | 403 | 404));
        let explained = explain(error, &format!("read the output of pod {pod}"));
        if hopeless { Self::Final(explained) } else { Self::Passing(explained) }
    }

    fn into_inner(self) -> anyhow::Error {
        match self {
            Self::Passing(error) | Self::Final(error) => error,
        }
    }
}

/// The container that runs the command: the one that is named as default, else the first.
pub(crate) fn container_name(pod: &Pod) -> Result<String> {
    let annotated =
        pod.metadata.annotations.as_ref().and_then(|all| all.get("kubectl.kubernetes.io/default-container"));
    let first = pod.spec.as_ref().and_then(|spec| spec.containers.first()).map(|container| &container.name);
    match annotated.or(first) {
        Some(name) => Ok(name.clone()),
        None => bail!("pod {} has no container", pod.metadata.name.as_deref().unwrap_or_default()),
    }
}

pub(crate) fn container_status<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerStatus> {
    pod.status.as_ref()?.container_statuses.as_ref()?.iter().find(|status| status.name == container)
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::{Arc, Mutex};

    use axum::Router;
    use axum::body::Body;
    use axum::extract::{Query, State};
    use axum::response::{IntoResponse, Response};
    use axum::routing::get;
    use futures::stream;

    use super::*;

    /// What the fake node answers next: to a look at the pod, whether the container has ended; to a read, the log.
    #[derive(Clone)]
    enum Log {
        Whole(Vec<u8>),
        /// Cut off after these bytes.
        Broken(Vec<u8>),
        /// The API server says so.
        Error(u16),
    }

    #[derive(Default)]
    struct Script {
        looks: VecDeque<bool>,
        logs: VecDeque<Log>,
        follows: Vec<bool>,
    }

    type Shared = Arc<Mutex<Script>>;

    async fn look(State(script): State<Shared>) -> Response {
        let ended = {
            let mut script = script.lock().unwrap();
            if script.looks.len() > 1 { script.looks.pop_front().unwrap() } else { script.looks[0] }
        };
        let state =
            if ended { serde_json::json!({"terminated": {"exitCode": 0}}) } else { serde_json::json!({"running": {}}) };
        axum::Json(serde_json::json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [{"name": "c"}]},
            "status": {"containerStatuses": [{"name": "c", "state": state, "ready": false, "restartCount": 0, "image": "i", "imageID": "i"}]}
        }))
        .into_response()
    }

    async fn log(
        State(script): State<Shared>,
        Query(query): Query<std::collections::HashMap<String, String>>,
    ) -> Response {
        let next = {
            let mut script = script.lock().unwrap();
            script.follows.push(query.contains_key("follow"));
            script.logs.pop_front().expect("one read too many")
        };
        match next {
            Log::Whole(data) => data.into_response(),
            Log::Broken(data) => {
                let parts = vec![Ok(bytes::Bytes::from(data)), Err(std::io::Error::other("cut"))];
                Body::from_stream(stream::iter(parts)).into_response()
            }
            Log::Error(code) => (
                axum::http::StatusCode::from_u16(code).unwrap(),
                axum::Json(serde_json::json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": "no", "reason": "No"})),
            )
                .into_response(),
        }
    }

    /// Follows the scripted log; what was printed, and which reads asked to follow.
    async fn followed(looks: &[bool], logs: &[Log]) -> (Result<()>, String, Vec<bool>) {
        let script = Arc::new(Mutex::new(Script {
            looks: looks.iter().copied().collect(),
            logs: logs.iter().cloned().collect(),
            follows: vec![],
        }));
        let app = Router::new()
            .route("/api/v1/namespaces/demo/pods/p", get(look))
            .route("/api/v1/namespaces/demo/pods/p/log", get(log))
            .with_state(script.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move { axum::serve(listener, app).await });
        let mut config = kube::Config::new(format!("http://{address}").parse().unwrap());
        config.default_retry = false;
        let client = kube::Client::try_from(config).unwrap();
        let mut out = Vec::new();
        let result = Output::new(Api::namespaced(client, "demo"), "p", "c").follow(&mut out).await;
        server.abort();
        let script = script.lock().unwrap();
        assert!(script.logs.is_empty(), "{} reads too few", script.logs.len());
        (result, String::from_utf8(out).unwrap(), script.follows.clone())
    }

    fn whole(text: &str) -> Log {
        Log::Whole(text.into())
    }

    #[tokio::test]
    async fn a_command_that_has_ended_already_is_read_once() {
        let (result, text, follows) = followed(&[true], &[whole("done\n")]).await;
        result.unwrap();
        assert_eq!((text.as_str(), follows.as_slice()), ("done\n", &[false][..]));
    }

    #[tokio::test]
    async fn the_end_is_read_again_after_the_container_has_ended() {
        // The stream ended although the container wrote on: the API server lost the node.
        let (result, text, follows) = followed(&[false, true], &[whole("one\n"), whole("one\ntwo\n")]).await;
        result.unwrap();
        assert_eq!((text.as_str(), follows.as_slice()), ("one\ntwo\n", &[true, false][..]));
    }

    #[tokio::test]
    async fn breaks_and_errors_lose_and_repeat_nothing() {
        let logs = [
            Log::Error(400),
            Log::Broken(b"one\ntw".to_vec()),
            Log::Error(500),
            Log::Broken(b"one\ntwo\nth".to_vec()),
            Log::Broken(b"one".to_vec()),
            whole("one\ntwo\nthree"),
        ];
        let (result, text, _) = followed(&[false, false, false, false, false, true], &logs).await;
        result.unwrap();
        assert_eq!(text, "one\ntwo\nthree");
    }

    #[tokio::test]
    async fn a_rotated_log_goes_on_where_it_was() {
        let rotated = "second\nthird\n";
        // One stream went across the rotation; the final read sees the new file only, and again to resume.
        let (result, text, _) =
            followed(&[false, true], &[whole("first\nsecond\n"), whole(rotated), whole(rotated)]).await;
        result.unwrap();
        assert_eq!(text, "first\nsecond\nthird\n");
    }

    #[tokio::test]
    async fn a_forbidden_log_is_an_error_at_once() {
        let (result, text, _) = followed(&[false], &[Log::Error(403)]).await;
        assert!(result.unwrap_err().to_string().contains("pod p"));
        assert_eq!(text, "");
    }

    #[test]
    fn where_a_rotated_log_goes_on() {
        assert_eq!(going_on(b"a\nb\n", b"x\na\nb\nc\n"), Some(6));
        assert_eq!(going_on(b"a\nb\n", b"b\nc\n"), Some(2));
        assert_eq!(going_on(b"a\nb\n", b"c\n"), Some(0));
        assert_eq!(going_on(b"", b"c\n"), Some(0));
    }
}
