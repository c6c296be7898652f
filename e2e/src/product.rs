//! Aether itself on a cluster: its custom resources, its Helm chart, and the git server that stands for the world's.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::net::TcpListener;

use crate::cluster::Cluster;
use crate::git_server::{self, Credentials};
use crate::network::HOST;
use crate::process::Processes;
use crate::site::SYSTEM_NAMESPACE;
use crate::tools::Tools;
use crate::{images, manifests, third_party, wait};

/// Where the git server answers to everybody.
const GIT_PORT: u16 = 8418;
/// Where it asks for a password.
const LOCKED_GIT_PORT: u16 = 8419;
/// The store's address: the cluster has no DNS, and drivers use their node's network.
const STORE_ADDRESS: &str = "10.96.0.80";

/// Loads the images of Aether, serves the demo's repository, and installs or upgrades the chart.
pub async fn provide(cluster: &Cluster) -> Result<()> {
    let (loaded, repository) = tokio::join!(cluster.load_images(), third_party::kubernetes_repository());
    let images = loaded?;
    repository?;
    let processes = Processes::new(cluster.paths.processes(), cluster.paths.logs());
    if processes.get("git-server").is_none() {
        // A program of its own, so that it outlives the demo when the cluster stays up.
        let harness = std::env::current_exe()?.with_file_name("aether-cluster");
        processes.start("git-server", &[harness.display().to_string(), "git-server".into()])?;
    }
    install(cluster, &images::running(&images)).await
}

/// Installs or upgrades the chart, and waits until every part is ready. The tag of the images stays the same, so it is their
/// digests that tell Kubernetes which pods to roll.
async fn install(cluster: &Cluster, digests: &[(&str, &str)]) -> Result<()> {
    let tools = Tools::new(cluster, SYSTEM_NAMESPACE)?;
    let top = top();
    // This API server knows no CEL: the rules are left out of the schemas, and the operator checks them too.
    let definitions = manifests::definitions_without_rules(&top.join("crds"))?;
    tools.apply(&definitions).await.context("the custom resource definitions")?;
    let digests: Vec<String> =
        digests.iter().map(|(part, digest)| format!("{part}.podAnnotations.aether\\.dev/image={digest}")).collect();
    let chart = top.join("charts/aether").display().to_string();
    let address = format!("store.clusterIP={STORE_ADDRESS}");
    let mut args = vec![
        "upgrade",
        "--install",
        "aether",
        &chart,
        "--create-namespace",
        "--skip-crds",
        "--wait",
        // The server-side apply of this old API server refuses what it would default itself.
        "--server-side=false",
        "--timeout",
        "300s",
        "--set",
        "images.tag=dev",
        "--set",
        "images.pullPolicy=IfNotPresent",
        "--set",
        &address,
        "--set",
        "store.persistence.hostPath=/var/lib/aether-store",
        "--set-string",
        "store.nodeSelector.kubernetes\\.io/hostname=node-1",
        "--set",
        // Where the story and the tests have sources that commits go back to.
        "store.access.commitNamespaces={platform}",
        "--set",
        "driver.pool.size=4Gi",
        "--set",
        "driver.pool.memorySize=512Mi",
        // A cluster that is kept gets the lazy server that was just built.
        "--set",
        "lazy.updateStrategy=RollingUpdate",
        // Slow, so that there is a time in which contents are still missing.
        "--set",
        "lazy.bandwidth=4Mi",
    ];
    args.extend(digests.iter().flat_map(|set| ["--set-string", set.as_str()]));
    tools.helm(&args).await?;
    let apis = ["get", "--raw", "/apis/review.aether.dev/v1alpha1"];
    wait::until("the aggregated API answers", Duration::from_secs(60), async || tools.kubectl(&apis).await.map(Some))
        .await?;
    Ok(())
}

/// The top folder of this repository.
pub fn top() -> PathBuf {
    PathBuf::from(env!("AETHER_TOP"))
}

/// The git server's URL, for everybody.
pub fn git_url() -> String {
    format!("http://{HOST}:{GIT_PORT}")
}

/// The git server's URL that asks for a password.
pub fn locked_git_url() -> String {
    format!("http://{HOST}:{LOCKED_GIT_PORT}")
}

/// Who may fetch from [`locked_git_url`].
pub fn credentials() -> Credentials {
    Credentials { user: "agent".into(), password: "correct horse battery staple".into() }
}

/// Serves the repositories until the process ends.
pub async fn serve_git() -> Result<()> {
    let repository = third_party::kubernetes_repository().await?;
    let root = repository.parent().context("a repository lies in a folder")?.to_owned();
    let listen = async |port| {
        TcpListener::bind((HOST, port))
            .await
            .with_context(|| format!("cannot listen on {HOST}:{port}: is the cluster up?"))
    };
    let (open, locked) = (listen(GIT_PORT).await?, listen(LOCKED_GIT_PORT).await?);
    tokio::try_join!(
        git_server::serve(open, root.clone(), None),
        git_server::serve(locked, root, Some(credentials()))
    )?;
    Ok(())
}
