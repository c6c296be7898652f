//! The story of the README, step by step, as a person and their agents live it: with kubectl, `kubectl aether` and the YAML of
//! `docs/samples`. The demo plays the steps in one namespace and prints their results; the cluster tests play each in its own.
//!
//! A step says what it needs (`source`, `session`, `pod`), finds it there or makes it, and returns one line of result.

mod checkpoint;
mod claim_source;
mod command;
mod deletion;
mod fork;
mod handoff;
mod import;
mod killed;
mod lazy;
mod limits;
mod measure;
mod programs;
mod restore;
mod review;
mod session;
mod volumes;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use aether_api::{AetherSource, conditions};
use anyhow::{Context, Result, anyhow, ensure};
use futures::future::LocalBoxFuture;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::api::{Api, ListParams};
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde_json::{Value, json};

use crate::command::{self as program, Output};
use crate::site::Site;
use crate::testing::{Test, pod_ready};
use crate::wait::Watched;
use crate::{third_party, wait};

/// What a step cannot do without.
pub enum Needs {
    /// Any cluster.
    Nothing,
    /// A second node.
    TwoNodes,
    /// The harness's own cluster, for this.
    Harness(&'static str),
    /// A cluster where nobody else uses Aether.
    Quiet,
}

/// One step of the story.
pub struct Step {
    /// Its name in the report and as a test.
    pub name: &'static str,
    /// What it shows.
    pub title: &'static str,
    /// Whether nothing else may run beside it: it kills parts or nodes that others need, or its figures suffer.
    pub alone: bool,
    /// Where it cannot be played.
    pub needs: Needs,
    /// Plays it; one line of result.
    pub play: for<'a> fn(&'a Story) -> LocalBoxFuture<'a, Result<String>>,
}

macro_rules! steps {
    ($($name:literal $title:literal $alone:literal $needs:expr, $play:path;)*) => {
        &[$(Step { name: $name, title: $title, alone: $alone, needs: $needs, play: |story| Box::pin($play(story)) }),*]
    };
}

/// The steps in the order of the story.
pub const STEPS: &[Step] = steps! {
    "import" "An AetherSource imports the Kubernetes source tree" true Needs::Nothing, import::import_a_repository;
    "wrong-sources" "A wrong source says what is wrong" false Needs::Nothing, import::wrong_sources;
    "session" "A session, in a pod that runs as uid 1000" false Needs::Nothing, session::work_in_a_session;
    "checkpoint" "A checkpoint while edits go on, and its diff" false Needs::Nothing, checkpoint::checkpoint_and_diff;
    "fork" "A fork of a live session with unsaved changes" false Needs::Nothing, fork::fork_a_live_session;
    "fifty-forks" "Fifty forks at once" true Needs::Nothing, fork::fifty_forks;
    "command" "Commands in worker pods" false Needs::Nothing, command::run_commands;
    "handoff" "Handoff from node 1 to node 2" false Needs::TwoNodes, handoff::hand_over;
    "lost-node" "A node is lost, and comes back" true Needs::Harness("it cuts off the network of a node"), handoff::lose_a_node;
    "restore" "Restore under a running process" false Needs::Nothing, restore::restore_in_place;
    "review" "Review: an agent's work is rejected, mended, approved by two and pushed" false Needs::Harness("it logs in as four people, pushes to a git server behind TLS, and needs a store that serves commits of their namespace"), review::review;
    "volumes" "Inline volumes and claims of class aether" false Needs::Nothing, volumes::inline_and_class;
    "lazy" "A session before its contents are there" true Needs::Quiet, lazy::work_before_contents_are_here;
    "killed" "kill -9 of driver, operator and store under a writer" true Needs::Quiet, killed::kill_our_parts;
    "bind" "From apply to a bound claim" true Needs::Nothing, measure::bind;
    "pod-start" "What a session adds to the start of a pod" true Needs::Nothing, measure::pod_start;
    "storage" "What twenty edited files store" false Needs::Nothing, measure::storage;
    "fifty-inline" "Fifty inline volumes at once" true Needs::Nothing, volumes::fifty_inline;
    "deletion" "The end, in any order" true Needs::Nothing, deletion::leave_nothing;
};

/// Steps that only tests play: longer ones, and variants of what the story shows.
pub const MORE_STEPS: &[Step] = steps! {
    "killed-node" "All processes of a node end at once" true Needs::Harness("it ends all processes of a node"), handoff::kill_a_node;
    "claim-source" "An AetherSource of a directory in a claim" false Needs::Nothing, claim_source::import_a_claim;
    "git-and-sqlite" "Git and SQLite in a session, and in a fork of it" false Needs::Nothing, programs::git_and_sqlite;
    "limits" "Limits, raised under running pods, and sessions in memory" false Needs::Harness("its nodes keep memory for sessions"), limits::limits;
    "npm-and-cargo" "npm and cargo in a session, and in a fork of it" false Needs::Harness("its pods have node and cargo"), programs::npm_and_cargo;
    "torn-copies" "A hundred copies of a busy session" false Needs::Nothing, torn_copies;
};

async fn torn_copies(story: &Story) -> Result<String> {
    fork::no_copy_is_torn(story, 100).await
}

/// A namespace in which the story is played, and what was measured.
pub struct Story {
    /// The namespace.
    pub namespace: String,
    test: Test,
    figures: Mutex<BTreeMap<&'static str, Value>>,
    left_out: Mutex<Vec<LeftOut>>,
}

/// A part of a step that this cluster does not allow.
#[derive(Debug, Clone, Serialize)]
pub struct LeftOut {
    /// What was not done or measured.
    pub what: &'static str,
    /// Why, and what would help.
    pub why: String,
}

impl Story {
    /// To be played in this namespace.
    pub fn new(test: &Test) -> Self {
        Self {
            namespace: test.namespace.clone(),
            test: test.clone(),
            figures: Mutex::default(),
            left_out: Mutex::default(),
        }
    }

    /// Why a step cannot be played here, if so.
    pub async fn skips(&self, step: &Step) -> Result<Option<String>> {
        match step.needs {
            Needs::Nothing => Ok(None),
            Needs::TwoNodes if self.site().nodes.len() > 1 => Ok(None),
            Needs::TwoNodes => Ok(Some(format!(
                "it needs two nodes with a ready driver that take pods; there is {}",
                self.first_node()
            ))),
            Needs::Harness(what) => Ok(self.site().cluster().err().map(|_| {
                format!("{what}, which only the demo's own cluster allows: `make demo` without CLUSTER plays it")
            })),
            Needs::Quiet => self.site().others_at_work().await,
        }
    }

    /// Notes, and says, that a part of the running step is left out.
    pub fn leave_out(&self, what: &'static str, why: String) {
        say(&format!("left out: {what}: {why}"));
        self.left_out.lock().unwrap_or_else(PoisonError::into_inner).push(LeftOut { what, why });
    }

    /// What was left out since the last call.
    pub fn take_left_out(&self) -> Vec<LeftOut> {
        std::mem::take(&mut *self.left_out.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Keeps a figure of the report.
    pub fn figure(&self, name: &'static str, value: impl Into<Value>) {
        let value = match value.into() {
            // A thousandth of a millisecond is noise.
            Value::Number(number) if number.is_f64() => {
                json!((number.as_f64().unwrap_or_default() * 1000.0).round() / 1000.0)
            }
            other => other,
        };
        self.figures.lock().unwrap_or_else(PoisonError::into_inner).insert(name, value);
    }

    /// The figures so far.
    pub fn figures(&self) -> BTreeMap<&'static str, Value> {
        self.figures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where it is played.
    pub fn site(&self) -> &Site {
        &self.test.site
    }

    /// The node on which most is done.
    pub fn first_node(&self) -> &str {
        &self.site().nodes[0]
    }

    /// The node to which things move.
    pub fn second_node(&self) -> Result<&str> {
        self.site().nodes.get(1).map(String::as_str).context("this needs a second node")
    }

    /// An API of the namespace.
    fn api<K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>>(&self) -> Api<K> {
        self.test.api()
    }

    // What a step needs: found or made.

    /// The imported Kubernetes source, shared by all namespaces.
    pub async fn source(&self) -> Result<()> {
        let manifest = self.sample("source.yaml")?;
        let platform = &self.site().platform_namespace;
        self.test.tools.in_namespace(platform).apply(&manifest).await?;
        let sources: Api<AetherSource> = Api::namespaced(self.test.client.clone(), platform);
        let begun = Instant::now();
        let mut shown = String::new();
        loop {
            let status = sources.get("kubernetes").await?.status.unwrap_or_default();
            if conditions::is_true(&status.conditions, conditions::READY) {
                return Ok(());
            }
            if let Some(import) = &status.import {
                let line =
                    format!("importing: {} {} files, {:.0} MB", import.phase, import.files, import.bytes as f64 / 1e6);
                if line != shown {
                    say(&line);
                    shown = line;
                }
            }
            ensure!(begun.elapsed() < limit(300), "source {platform}/kubernetes is not Ready: {:?}", status.conditions);
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// A session of the source with a bound claim; milliseconds from apply to bound.
    pub async fn session(&self, name: &str) -> Result<f64> {
        let begun = Instant::now();
        self.apply(&self.session_manifest(name)).await?;
        self.until_bound(name).await?;
        Ok(milliseconds(begun.elapsed()))
    }

    /// A session of a source of the namespace, with a bound claim.
    pub async fn session_of(&self, name: &str, source: &str) -> Result<()> {
        let session = json!({
            "apiVersion": "aether.dev/v1alpha1", "kind": "AetherSession", "metadata": {"name": name},
            "spec": {"source": {"name": source}, "owner": {"uid": 1000, "gid": 1000}},
        });
        self.apply(&session.to_string()).await?;
        self.until_bound(name).await
    }

    /// The README's session under this name.
    pub fn session_manifest(&self, name: &str) -> String {
        self.sample("session.yaml").expect("the sample is in the repository").replace("fix-flaky-test", name)
    }

    /// A running pod that mounts a session's claim; milliseconds from create to ready.
    pub async fn pod(&self, name: &str, claim: &str, node: Option<&str>) -> Result<f64> {
        let begun = Instant::now();
        self.create_pod(name, claim, node, false).await?;
        self.until_pod_ready(name, limit(120)).await?;
        Ok(milliseconds(begun.elapsed()))
    }

    /// The README's pod under this name; does not wait.
    pub async fn create_pod(&self, name: &str, claim: &str, node: Option<&str>, read_only: bool) -> Result<()> {
        self.apply(&self.pod_manifest(name, claim, node, read_only)?.to_string()).await
    }

    /// The README's pod under this name.
    pub fn pod_manifest(&self, name: &str, claim: &str, node: Option<&str>, read_only: bool) -> Result<Value> {
        let mut pod: Value = serde_yaml::from_str(&self.sample("pod.yaml")?)?;
        pod["metadata"]["name"] = name.into();
        pod["spec"]["terminationGracePeriodSeconds"] = 0.into();
        if let Some(node) = node {
            pod["spec"]["affinity"] = on(node);
        }
        pod["spec"]["volumes"][0]["persistentVolumeClaim"] = json!({"claimName": claim, "readOnly": read_only});
        Ok(pod)
    }

    /// A running pod on the first node that mounts many sessions, each at `/sessions/<its name>`.
    pub async fn pod_of_many(&self, name: &str, sessions: &[String]) -> Result<()> {
        let mounts: Vec<_> = sessions
            .iter()
            .map(|session| json!({"name": session, "mountPath": format!("/sessions/{session}")}))
            .collect();
        let volumes: Vec<_> = sessions
            .iter()
            .map(|session| json!({"name": session, "persistentVolumeClaim": {"claimName": session}}))
            .collect();
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
            "spec": {
                "affinity": on(self.first_node()), "terminationGracePeriodSeconds": 0,
                "securityContext": {"runAsUser": 1000, "runAsGroup": 1000},
                "containers": [{"name": "agent", "image": self.site().tools_image, "command": ["sleep", "infinity"], "volumeMounts": mounts}],
                "volumes": volumes,
            }
        });
        self.apply(&pod.to_string()).await?;
        self.until_pod_ready(name, limit(120)).await
    }

    /// A session and a pod on the first node that mounts it.
    pub async fn agent(&self, session: &str, pod: &str) -> Result<()> {
        self.source().await?;
        self.session(session).await?;
        self.pod(pod, session, Some(self.first_node())).await?;
        Ok(())
    }

    // kubectl and kubectl aether.

    /// Runs kubectl in the namespace; what it printed.
    pub async fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.test.tools.kubectl(args).await
    }

    /// Runs `kubectl aether` in the namespace; a failing exit code is an error.
    pub async fn aether(&self, args: &[&str]) -> Result<Output> {
        program::expect_success(&mut self.test.tools.aether_command(args)).await
    }

    /// Runs `kubectl aether` in the namespace, whatever its exit code.
    pub async fn aether_code(&self, args: &[&str]) -> Result<Output> {
        program::output(&mut self.test.tools.aether_command(args), None).await
    }

    /// Applies YAML or JSON.
    pub async fn apply(&self, manifest: &str) -> Result<()> {
        self.test.tools.apply(manifest).await
    }

    /// Runs a shell script in a pod; what it printed.
    pub async fn exec(&self, pod: &str, script: &str) -> Result<String> {
        self.test.tools.exec(pod, script).await
    }

    /// Runs a shell script in a pod with this on its standard input.
    pub async fn exec_with_input(&self, pod: &str, script: &str, input: &str) -> Result<String> {
        let output =
            self.test.tools.kubectl_output(&["exec", "-i", pod, "--", "sh", "-c", script], Some(input)).await?;
        ensure!(output.code == 0, "{script} in {pod} exited with {}: {}", output.code, output.stderr.trim());
        Ok(output.stdout)
    }

    /// Deletes a pod and waits until it is gone.
    pub async fn delete_pod(&self, name: &str) -> Result<()> {
        self.kubectl(&["delete", "pod", name, "--timeout=120s"]).await.map(drop)
    }

    // Waiting.

    /// An object of the namespace.
    pub async fn get<K>(&self, name: &str) -> Result<K>
    where
        K: Watched + Resource<Scope = NamespaceResourceScope>,
    {
        self.get_in(&self.namespace, name).await
    }

    /// An object of another namespace.
    pub async fn get_in<K>(&self, namespace: &str, name: &str) -> Result<K>
    where
        K: Watched + Resource<Scope = NamespaceResourceScope>,
    {
        Ok(Api::<K>::namespaced(self.test.client.clone(), namespace).get(name).await?)
    }

    /// Waits, by a watch, until an object of the namespace is as described; the object.
    pub async fn until<K>(&self, name: &str, what: &str, limit: Duration, is: impl Fn(&K) -> bool) -> Result<K>
    where
        K: Watched + Resource<Scope = NamespaceResourceScope>,
    {
        wait::object(&self.test.api::<K>(), name, what, limit, is).await
    }

    /// Waits until a check passes; its last error says why it did not.
    pub async fn poll<T>(&self, what: &str, limit: Duration, check: impl AsyncFn() -> Result<T>) -> Result<T> {
        wait::until(what, limit, async || check().await.map(Some)).await
    }

    /// Waits until a session's claim is bound.
    async fn until_bound(&self, name: &str) -> Result<()> {
        self.until(name, "is bound", limit(60), |claim: &PersistentVolumeClaim| {
            claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound")
        })
        .await
        .map(drop)
    }

    /// Waits until a source of the namespace is ready.
    pub async fn until_source_ready(&self, name: &str) -> Result<AetherSource> {
        self.until(name, "is Ready", limit(180), |source: &AetherSource| {
            let conditions = source.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
            conditions::is_true(conditions, conditions::READY)
        })
        .await
    }

    /// Waits until a pod is ready.
    pub async fn until_pod_ready(&self, name: &str, limit: Duration) -> Result<()> {
        let waited = self.until(name, "is ready", limit, pod_ready).await;
        if waited.is_err() {
            let told = self.kubectl(&["describe", "pod", name]).await.unwrap_or_default();
            return Err(anyhow!("{told}")).context(format!("pod {name} is not ready after {} s", limit.as_secs()));
        }
        Ok(())
    }

    /// Waits until a pod has left `Pending`, or its containers are being made: its volumes are there.
    pub async fn until_volumes_mounted(&self, name: &str, limit: Duration) -> Result<()> {
        self.until(name, "has its volumes", limit, |pod: &Pod| {
            let statuses =
                pod.status.as_ref().and_then(|status| status.container_statuses.as_deref()).unwrap_or_default();
            statuses.iter().any(|status| status.state.as_ref().is_some_and(|state| state.running.is_some()))
        })
        .await
        .map(drop)
    }

    /// Whether a pod is ready now.
    pub async fn pod_is_ready(&self, name: &str) -> Result<bool> {
        Ok(pod_ready(&self.get::<Pod>(name).await?))
    }

    /// The pods of Aether's parts, or of one of them (`driver`, `operator`, `store`, `review`).
    pub async fn parts(&self, component: Option<&str>) -> Result<Vec<Pod>> {
        let mut labels = "app.kubernetes.io/name=aether".to_owned();
        if let Some(component) = component {
            labels += &format!(",app.kubernetes.io/component={component}");
        }
        let pods: Api<Pod> = Api::namespaced(self.test.client.clone(), &self.site().system_namespace);
        Ok(pods.list(&ListParams::default().labels(&labels)).await?.items)
    }

    /// Runs kubectl in the namespace of Aether's parts; what it printed.
    pub async fn system_kubectl(&self, args: &[&str]) -> Result<String> {
        self.test.tools.in_namespace(&self.site().system_namespace).kubectl(args).await
    }

    /// How often containers of our parts were started again.
    pub async fn restarts(&self) -> Result<i32> {
        let found = self.parts(None).await?;
        Ok(found
            .iter()
            .filter_map(|pod| pod.status.as_ref()?.container_statuses.as_ref())
            .flatten()
            .map(|container| container.restart_count)
            .sum())
    }

    /// An error that names a part of ours that is not ready.
    pub async fn parts_ready(&self) -> Result<()> {
        let found = self.parts(None).await?;
        ensure!(!found.is_empty(), "Aether is not installed");
        for pod in found {
            ensure!(pod_ready(&pod), "{} is not ready", pod.name_any());
        }
        Ok(())
    }

    // The repository that is imported.

    /// How many files and symbolic links git tracks in the imported repository, and how many of them are files.
    pub async fn tracked(&self) -> Result<(i64, i64)> {
        let repository = third_party::kubernetes_repository().await?;
        let list =
            program::run("git", ["--git-dir", &repository.display().to_string(), "ls-tree", "-r", "main"]).await?;
        let files = list.lines().filter(|line| line.starts_with("100")).count();
        Ok((i64::try_from(list.lines().count())?, i64::try_from(files)?))
    }

    /// One of the README's examples, with the addresses of this cluster.
    pub fn sample(&self, name: &str) -> Result<String> {
        let path = samples().join(name);
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let site = self.site();
        Ok(text
            .replace("https://git.example.org", &site.git_url)
            .replace("platform", &site.platform_namespace)
            .replace("aether/tools:dev", &site.tools_image))
    }
}

/// The affinity of a pod that may run on this node only. By the scheduler, unlike `nodeName`.
fn on(node: &str) -> Value {
    let fields = json!([{"key": "metadata.name", "operator": "In", "values": [node]}]);
    json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": fields}]}}})
}

/// The folder of the README's examples.
pub fn samples() -> PathBuf {
    Path::new(env!("AETHER_TOP")).join("docs/samples")
}

/// A line below a step.
fn say(line: &str) {
    eprintln!("      {line}");
}

/// A time limit. The machine may be slow: limits only end what hangs.
fn limit(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// The value of `name=value` in what a script printed.
fn value<T: FromStr>(text: &str, name: &str) -> Result<T> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
        .and_then(|value| value.trim().parse().ok())
        .with_context(|| format!("no {name}= in {text:?}"))
}

/// The beginning of a long text.
fn head(text: &str) -> String {
    text.lines().take(60).collect::<Vec<_>>().join("\n")
}

/// `kubectl wait --for=delete` complains when there is nothing to wait for.
fn already_gone(error: anyhow::Error) -> Result<String> {
    let text = format!("{error:#}");
    if text.contains("not found") || text.contains("no matching resources") { Ok(String::new()) } else { Err(error) }
}
