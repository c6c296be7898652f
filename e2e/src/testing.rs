//! What a cluster test is written with: a namespace of its own, waits that say what they await, and, when it fails,
//! everything there is to know about why.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! # use std::time::Duration;
//! # use k8s_openapi::api::core::v1::Pod;
//! aether_e2e::testing::with_namespace("target/debug/aether-cluster", "greets", async |test| {
//!     test.tools.apply(&aether_e2e::manifests::pod("greeter", "node-1", "echo hello; sleep infinity")?).await?;
//!     test.until_ready("greeter").await?;
//!     assert_eq!(test.tools.exec("greeter", "id -u").await?.trim(), "1000");
//!     Ok(())
//! })
//! .await
//! # }
//! ```

use std::{fs::File, panic::AssertUnwindSafe, path::Path, time::Duration};

use anyhow::{Context, Result};
use futures::FutureExt;
use k8s_openapi::{NamespaceResourceScope, api::core::v1 as core};
use kube::{
    Api, Client, Resource,
    api::{DeleteParams, PostParams},
};
use serde_json::json;

use crate::{
    cluster::Cluster,
    options::Options,
    paths::Paths,
    site::Site,
    tools::Tools,
    wait::{self, Watched},
};

/// Long enough for anything that works, on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(90);

/// A running test.
#[derive(Clone)]
pub struct Test {
    /// The cluster, and what is on it.
    pub site: Site,
    /// A client with all rights.
    pub client: Client,
    /// The test's own namespace.
    pub namespace: String,
    /// kubectl and helm in that namespace.
    pub tools: Tools,
}

/// Runs a test in a namespace of its own, beside others. The cluster is brought up if it is not; `harness` is the
/// `aether-cluster` program. The namespace is deleted afterwards, unless `AETHER_KEEP` is set.
pub async fn with_namespace(
    harness: impl AsRef<Path>,
    name: &str,
    body: impl AsyncFnOnce(&Test) -> Result<()>,
) -> Result<()> {
    let _turn = turn(false).await?;
    run(harness.as_ref(), name, body).await
}

/// As [`with_namespace`], with no other test beside it: for a test that cuts off or kills nodes or our own programs.
pub async fn alone_with_namespace(
    harness: impl AsRef<Path>,
    name: &str,
    body: impl AsyncFnOnce(&Test) -> Result<()>,
) -> Result<()> {
    let _turn = turn(true).await?;
    run(harness.as_ref(), name, body).await
}

async fn run(harness: &Path, name: &str, body: impl AsyncFnOnce(&Test) -> Result<()>) -> Result<()> {
    let cluster = Cluster::up(&Options::default(), harness).await?;
    cluster.load_tools().await?;
    let test = Test::begin(Site::harness(cluster)?, name).await?;
    let result = AssertUnwindSafe(body(&test)).catch_unwind().await;
    if !matches!(result, Ok(Ok(()))) {
        eprintln!("{}", test.dump().await);
    }
    if std::env::var_os("AETHER_KEEP").is_none() {
        test.end().await?;
    }
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Waits for the right to use the cluster: shared, or alone.
async fn turn(alone: bool) -> Result<File> {
    let paths = Paths::from_environment()?;
    tokio::task::spawn_blocking(move || {
        std::fs::create_dir_all(paths.cache())?;
        let file = File::create(paths.cache().join("cluster-tests.lock"))?;
        if alone {
            file.lock()?
        } else {
            file.lock_shared()?
        }
        Ok(file)
    })
    .await?
}

impl Test {
    /// Makes a namespace whose name begins like this.
    pub async fn begin(site: Site, name: &str) -> Result<Self> {
        let api = Api::<core::Namespace>::all(site.client.clone());
        let object =
            serde_json::from_value(json!({"metadata": {"generateName": format!("{name}-"), "labels": site.labels}}))?;
        let namespace =
            api.create(&PostParams::default(), &object).await?.metadata.name.context("a namespace has a name")?;
        let tools = site.tools.in_namespace(&namespace);
        let test = Self { client: site.client.clone(), tools, namespace, site };
        // Pods are refused until the controller-manager has made it; before Kubernetes 1.24, also until it has its token.
        let version = test.client.apiserver_version().await?;
        let old = version.minor.trim_end_matches('+').parse::<u32>().is_ok_and(|minor| minor < 24);
        test.until::<core::ServiceAccount>("default", "is there", |account| !old || account.secrets.is_some()).await?;
        Ok(test)
    }

    /// The harness's cluster; an error on another.
    pub fn cluster(&self) -> Result<&Cluster> {
        self.site.cluster()
    }

    /// Deletes the namespace, unless the test has.
    pub async fn end(&self) -> Result<()> {
        // The namespace controller takes ten seconds at least; a test that cares waits itself.
        match Api::<core::Namespace>::all(self.client.clone()).delete(&self.namespace, &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            deleted => Ok(deleted.map(drop)?),
        }
    }

    /// An API in the test's namespace.
    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Watches an object of the test's namespace until it is as wished, for [`LIMIT`].
    pub async fn until<K>(&self, name: &str, what: &str, wished: impl Fn(&K) -> bool) -> Result<K>
    where
        K: Watched + Resource<Scope = NamespaceResourceScope>,
    {
        wait::object(&self.api::<K>(), name, what, LIMIT, wished).await
    }

    /// Watches until an object of the test's namespace is gone, for [`LIMIT`].
    pub async fn until_gone<K>(&self, name: &str) -> Result<()>
    where
        K: Watched + Resource<Scope = NamespaceResourceScope>,
    {
        wait::gone(&self.api::<K>(), name, LIMIT).await
    }

    /// Waits until a pod is Ready.
    pub async fn until_ready(&self, pod: &str) -> Result<core::Pod> {
        self.until(pod, "is Ready", pod_ready).await
    }

    /// Waits until a pod has ended, and says whether it succeeded.
    pub async fn until_ended(&self, pod: &str) -> Result<bool> {
        let phase = |pod: &core::Pod| pod.status.as_ref().and_then(|status| status.phase.clone()).unwrap_or_default();
        let pod = self.until(pod, "has ended", |pod| ["Succeeded", "Failed"].contains(&phase(pod).as_str())).await?;
        Ok(phase(&pod) == "Succeeded")
    }

    /// Objects, events and logs of the test's namespace, and the logs of the product.
    pub async fn dump(&self) -> String {
        let mut out = format!("\n======== {} failed; what is there: ========\n", self.namespace);
        let mut section = async |tools: &Tools, args: &[&str]| {
            let text = match tools.kubectl_output(args, None).await {
                Ok(output) => output.stdout + &output.stderr,
                Err(error) => format!("{error:#}"),
            };
            if !text.trim().is_empty() {
                out += &format!("-------- kubectl {}\n{}\n", args.join(" "), text.trim_end());
            }
        };
        section(&self.tools, &["get", "pods,persistentvolumeclaims,jobs", "--output=wide"]).await;
        section(&self.tools, &["get", "aether", "--output=yaml"]).await;
        section(&self.tools, &["get", "events", "--sort-by=.lastTimestamp"]).await;
        let system = self.tools.in_namespace(&self.site.system_namespace);
        for (tools, lines) in [(self.tools.clone(), "--tail=40"), (system, "--tail=80")] {
            let pods = tools.kubectl(&["get", "pods", "--output=name"]).await.unwrap_or_default();
            for pod in pods.lines() {
                section(&tools, &["logs", pod, "--all-containers", "--prefix", lines]).await;
            }
        }
        section(&self.tools, &["get", "nodes,persistentvolumes"]).await;
        out
    }
}

/// Whether a pod's containers are all ready.
pub fn pod_ready(pod: &core::Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.is_some_and(|conditions| conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}
