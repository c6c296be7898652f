//! kubectl and helm as a person would use them: with a kubeconfig, a namespace, and our plugin on the PATH.

use std::{ffi::OsString, path::PathBuf};

use anyhow::{Context, Result};
use tokio::process::Command;

use crate::{
    cluster::Cluster,
    command::{self, Output, command, expect_success},
    images::target_folder,
};

/// kubectl and helm for one user and one namespace.
#[derive(Debug, Clone)]
pub struct Tools {
    kubectl: PathBuf,
    helm: PathBuf,
    kubeconfig: PathBuf,
    namespace: String,
    path: OsString,
}

impl Tools {
    /// With the rights of the administrator.
    pub fn new(cluster: &Cluster, namespace: &str) -> Result<Self> {
        Self::with_kubeconfig(cluster, namespace, cluster.kubeconfig())
    }

    /// With the rights of another user; see [`Cluster::kubeconfig_for`].
    pub fn with_kubeconfig(cluster: &Cluster, namespace: &str, kubeconfig: PathBuf) -> Result<Self> {
        // The plugin `kubectl-aether` is found on the PATH: cargo's own folder has it.
        let mut path = vec![cluster.programs.bin().to_owned(), target_folder().join("debug")];
        path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
        Ok(Self {
            kubectl: cluster.programs.kubectl(),
            helm: cluster.programs.helm(),
            kubeconfig,
            namespace: namespace.to_owned(),
            path: std::env::join_paths(path).context("PATH cannot be extended")?,
        })
    }

    /// A kubectl command line, to be run by the caller.
    pub fn kubectl_command(&self, args: &[&str]) -> Command {
        self.prepare(&self.kubectl, args)
    }

    /// Runs kubectl; a failing exit code is an error with what it said.
    pub async fn kubectl(&self, args: &[&str]) -> Result<String> {
        Ok(expect_success(&mut self.kubectl_command(args)).await?.stdout)
    }

    /// Runs kubectl, whatever its exit code.
    pub async fn kubectl_output(&self, args: &[&str], input: Option<&str>) -> Result<Output> {
        command::output(&mut self.kubectl_command(args), input.map(str::as_bytes)).await
    }

    /// A `kubectl aether` command line, to be run by the caller. kubectl wants no flag before a plugin's name.
    pub fn aether_command(&self, args: &[&str]) -> Command {
        let mut command = command(&self.kubectl, ["aether", "--namespace", &self.namespace].iter().chain(args));
        command.env("KUBECONFIG", &self.kubeconfig).env("PATH", &self.path);
        command
    }

    /// Applies YAML.
    pub async fn apply(&self, yaml: &str) -> Result<()> {
        let args = ["apply", "--filename", "-"];
        let output = self.kubectl_output(&args, Some(yaml)).await?;
        anyhow::ensure!(output.code == 0, "kubectl apply: {}", output.stderr.trim());
        Ok(())
    }

    /// Runs a shell script in a pod's first container; its standard output.
    pub async fn exec(&self, pod: &str, script: &str) -> Result<String> {
        self.kubectl(&["exec", pod, "--", "bash", "-euc", script]).await
    }

    /// As [`Tools::exec`], whatever the exit code.
    pub async fn exec_output(&self, pod: &str, script: &str) -> Result<Output> {
        self.kubectl_output(&["exec", pod, "--", "bash", "-euc", script], None).await
    }

    /// Runs helm.
    pub async fn helm(&self, args: &[&str]) -> Result<String> {
        Ok(expect_success(&mut self.prepare(&self.helm, args)).await?.stdout)
    }

    fn prepare(&self, program: &PathBuf, args: &[&str]) -> Command {
        let mut command = command(program, ["--namespace", &self.namespace].iter().chain(args));
        command.env("KUBECONFIG", &self.kubeconfig).env("PATH", &self.path);
        command
    }
}
