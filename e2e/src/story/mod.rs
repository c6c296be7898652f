//! The story of the README, step by step, as a person and their agents live it: with kubectl, `kubectl aether` and the YAML of
//! `docs/samples`. The demo plays the steps in one namespace and prints their results; the cluster tests play each in its own.
//!
//! A step says what it needs (`source`, `session`, `pod`), finds it there or makes it, and returns one line of result.

mod checkpoint;
mod command;
mod deletion;
mod fork;
mod handoff;
mod import;
mod killed;
mod measure;
mod restore;
mod session;
mod volumes;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use aether_api::{AetherSource, conditions};
use anyhow::{Context, Result, anyhow, ensure};
use futures::future::LocalBoxFuture;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::api::{Api, ListParams};
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::command::{self as program, Output};
use crate::testing::{SYSTEM_NAMESPACE, Test, pod_ready};
use crate::tools::Tools;
use crate::{product, third_party, wait};

/// Where the shared source lives, as a platform team would have it.
pub const PLATFORM_NAMESPACE: &str = "platform";
/// The image of agents' pods.
pub const TOOLS_IMAGE: &str = "aether/tools:dev";
/// One step of the story.
pub struct Step {
    /// Its name in the report and as a test.
    pub name: &'static str,
    /// What it shows.
    pub title: &'static str,
    /// Whether nothing else may run beside it: it kills parts or nodes that others need, or its figures suffer.
    pub alone: bool,
    /// Plays it; one line of result.
    pub play: for<'a> fn(&'a Story) -> LocalBoxFuture<'a, Result<String>>,
}

macro_rules! steps {
    ($($name:literal $title:literal $alone:literal $play:path;)*) => {
        &[$(Step { name: $name, title: $title, alone: $alone, play: |story| Box::pin($play(story)) }),*]
    };
}

/// The steps in the order of the story.
pub const STEPS: &[Step] = steps! {
    "import" "An AetherSource imports the Kubernetes source tree" true import::import_a_repository;
    "wrong-sources" "A wrong source says what is wrong" false import::wrong_sources;
    "session" "A session, in a pod that runs as uid 1000" false session::work_in_a_session;
    "checkpoint" "A checkpoint while edits go on, and its diff" false checkpoint::checkpoint_and_diff;
    "fork" "A fork of a live session with unsaved changes" false fork::fork_a_live_session;
    "fifty-forks" "Fifty forks at once" true fork::fifty_forks;
    "command" "Commands in worker pods" false command::run_commands;
    "handoff" "Handoff from node 1 to node 2" false handoff::hand_over;
    "lost-node" "A node is lost, and comes back" true handoff::lose_a_node;
    "restore" "Restore under a running process" false restore::restore_in_place;
    "volumes" "Inline volumes and claims of class aether" false volumes::inline_and_class;
    "killed" "kill -9 of driver, operator and store under a writer" true killed::kill_our_parts;
    "bind" "From apply to a bound claim" true measure::bind;
    "pod-start" "What a session adds to the start of a pod" true measure::pod_start;
    "storage" "What twenty edited files store" false measure::storage;
    "fifty-inline" "Fifty inline volumes at once" true volumes::fifty_inline;
    "deletion" "The end, in any order" true deletion::leave_nothing;
};

/// Steps that only tests play: longer ones, and variants of what the story shows.
pub const MORE_STEPS: &[Step] = steps! {
    "killed-node" "All processes of a node end at once" true handoff::kill_a_node;
    "torn-copies" "A hundred copies of a busy session" false torn_copies;
};

async fn torn_copies(story: &Story) -> Result<String> {
    fork::no_copy_is_torn(story, 100).await
}

/// A namespace in which the story is played, and what was measured.
pub struct Story {
    /// The cluster.
    pub cluster: Cluster,
    /// The namespace.
    pub namespace: String,
    test: Test,
    figures: Mutex<BTreeMap<&'static str, Value>>,
}

impl Story {
    /// To be played in this namespace.
    pub fn new(test: &Test) -> Self {
        Self {
            cluster: test.cluster.clone(),
            namespace: test.namespace.clone(),
            test: test.clone(),
            figures: Mutex::default(),
        }
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
        self.figures.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(name, value);
    }

    /// The figures so far.
    pub fn figures(&self) -> BTreeMap<&'static str, Value> {
        self.figures.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    // What a step needs: found or made.

    /// The imported Kubernetes source, shared by all namespaces.
    pub async fn source(&self) -> Result<()> {
        let manifest = self.sample("source.yaml")?;
        Tools::new(&self.cluster, PLATFORM_NAMESPACE)?.apply(&manifest).await?;
        let sources: Api<AetherSource> = Api::namespaced(self.cluster.client.clone(), PLATFORM_NAMESPACE);
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
            ensure!(begun.elapsed() < limit(300), "source platform/kubernetes is not Ready: {:?}", status.conditions);
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// A session of the source with a bound claim; milliseconds from apply to bound.
    pub async fn session(&self, name: &str) -> Result<u128> {
        let begun = Instant::now();
        self.apply(&self.session_manifest(name)).await?;
        self.until(name, "is bound", limit(60), |claim: &PersistentVolumeClaim| {
            claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound")
        })
        .await?;
        Ok(begun.elapsed().as_millis())
    }

    /// The README's session under this name.
    pub fn session_manifest(&self, name: &str) -> String {
        self.sample("session.yaml").expect("the sample is in the repository").replace("fix-flaky-test", name)
    }

    /// A running pod that mounts a session's claim; milliseconds from create to ready.
    pub async fn pod(&self, name: &str, claim: &str, node: Option<&str>) -> Result<u128> {
        let begun = Instant::now();
        self.create_pod(name, claim, node, false).await?;
        self.until_pod_ready(name, limit(120)).await?;
        Ok(begun.elapsed().as_millis())
    }

    /// The README's pod under this name; does not wait.
    pub async fn create_pod(&self, name: &str, claim: &str, node: Option<&str>, read_only: bool) -> Result<()> {
        let mut pod: Value = serde_yaml::from_str(&self.sample("pod.yaml")?)?;
        pod["metadata"]["name"] = name.into();
        pod["spec"]["terminationGracePeriodSeconds"] = 0.into();
        if let Some(node) = node {
            pod["spec"]["nodeSelector"] = json!({"kubernetes.io/hostname": node});
        }
        pod["spec"]["volumes"][0]["persistentVolumeClaim"] = json!({"claimName": claim, "readOnly": read_only});
        self.apply(&pod.to_string()).await
    }

    /// A session and a pod on node 1 that mounts it.
    pub async fn agent(&self, session: &str, pod: &str) -> Result<()> {
        self.source().await?;
        self.session(session).await?;
        self.pod(pod, session, Some("node-1")).await?;
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
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + Debug,
    {
        self.get_in(&self.namespace, name).await
    }

    /// An object of another namespace.
    pub async fn get_in<K>(&self, namespace: &str, name: &str) -> Result<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + Debug,
    {
        Ok(Api::<K>::namespaced(self.cluster.client.clone(), namespace).get(name).await?)
    }

    /// Waits, by a watch, until an object of the namespace is as described; the object.
    pub async fn until<K>(&self, name: &str, what: &str, limit: Duration, is: impl Fn(&K) -> bool) -> Result<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + Debug
            + DeserializeOwned
            + Serialize
            + Send
            + 'static,
    {
        wait::object(&self.test.api::<K>(), name, what, limit, is).await
    }

    /// Waits until a check passes; its last error says why it did not.
    pub async fn poll<T>(&self, what: &str, limit: Duration, check: impl AsyncFn() -> Result<T>) -> Result<T> {
        wait::until(what, limit, async || check().await.map(Some)).await
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

    /// The drivers' pods, node 1 first.
    pub async fn driver_pods(&self) -> Result<Vec<String>> {
        let pods: Api<Pod> = Api::namespaced(self.cluster.client.clone(), SYSTEM_NAMESPACE);
        let mut found = pods.list(&ListParams::default().labels("app.kubernetes.io/component=driver")).await?.items;
        found.sort_by_key(|pod| pod.spec.as_ref().and_then(|spec| spec.node_name.clone()));
        Ok(found.iter().map(ResourceExt::name_any).collect())
    }

    /// How often containers of our parts were started again.
    pub async fn restarts(&self) -> Result<i32> {
        let pods: Api<Pod> = Api::namespaced(self.cluster.client.clone(), SYSTEM_NAMESPACE);
        let found = pods.list(&ListParams::default().labels("app.kubernetes.io/name=aether")).await?.items;
        Ok(found
            .iter()
            .filter_map(|pod| pod.status.as_ref()?.container_statuses.as_ref())
            .flatten()
            .map(|container| container.restart_count)
            .sum())
    }

    /// An error that names a part of ours that is not ready.
    pub async fn parts_ready(&self) -> Result<()> {
        let pods: Api<Pod> = Api::namespaced(self.cluster.client.clone(), SYSTEM_NAMESPACE);
        let found = pods.list(&ListParams::default().labels("app.kubernetes.io/name=aether")).await?.items;
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
        Ok(text.replace("https://git.example.org", &self.git_url()))
    }

    /// Where the git server of the cluster answers, without a password.
    pub fn git_url(&self) -> String {
        product::git_url()
    }

    /// Where it answers to those who have one.
    pub fn locked_git_url(&self) -> String {
        product::locked_git_url()
    }
}

/// The folder of the README's examples.
pub fn samples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/samples")
}

/// A line below a step.
fn say(line: &str) {
    eprintln!("      {line}");
}

/// A time limit. The machine may be slow: limits only end what hangs.
fn limit(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
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
