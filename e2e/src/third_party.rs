//! Programs that others wrote, made available by the scripts of `third-party/`.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use crate::paths::Paths;

/// Where the programs are.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Programs {
    kubernetes: PathBuf,
    kubectl_helm: PathBuf,
}

impl Programs {
    /// Builds and fetches what is missing. A fresh machine takes some minutes, a prepared one none.
    pub async fn provide() -> Result<Self> {
        script("packages.sh", &[]).await?;
        let (kubernetes, kubectl_helm) = tokio::try_join!(script("kubernetes.sh", &[]), kubectl_helm())?;
        Ok(Self { kubernetes: kubernetes.into(), kubectl_helm })
    }

    /// A server program of Kubernetes, or `pause`.
    pub fn kubernetes(&self, program: &str) -> String {
        self.kubernetes.join(program).display().to_string()
    }

    /// The folder of kubectl and helm, for PATH.
    pub fn bin(&self) -> &Path {
        &self.kubectl_helm
    }
}

/// The folder of kubectl and helm.
pub async fn kubectl_helm() -> Result<PathBuf> {
    script("kubectl-helm.sh", &[]).await.map(PathBuf::from)
}

/// The root file system that images share: a tar.
pub async fn base_image() -> Result<PathBuf> {
    script("base-image.sh", &[]).await.map(PathBuf::from)
}

/// The root file system of a developer's pod, with node and cargo and packages for both: a tar.
pub async fn developer_image() -> Result<PathBuf> {
    script("base-image.sh", &["developer"]).await.map(PathBuf::from)
}

/// The Kubernetes source tree as a bare git repository.
pub async fn kubernetes_repository() -> Result<PathBuf> {
    script("kubernetes-repository.sh", &[]).await.map(PathBuf::from)
}

/// Runs a script; its progress goes to our standard error, its last line is the answer.
async fn script(name: &str, args: &[&str]) -> Result<String> {
    let path = Paths::third_party().join(name);
    // Not `output()`: tokio's captures standard error whatever was asked for, and with it the progress.
    let running = Command::new("bash")
        .arg(&path)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot run {}", path.display()))?;
    let output = running.wait_with_output().await.with_context(|| format!("cannot wait for {}", path.display()))?;
    anyhow::ensure!(output.status.success(), "{} failed ({}); what it said is above", path.display(), output.status);
    Ok(String::from_utf8_lossy(&output.stdout).lines().last().unwrap_or_default().to_owned())
}
