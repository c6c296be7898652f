//! kubectl and helm as a person would use them: with a kubeconfig, a namespace, and our plugin on the PATH.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

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
    /// The folder of kubectl and helm.
    programs: PathBuf,
    /// What the environment says when absent.
    kubeconfig: Option<PathBuf>,
    namespace: String,
    path: OsString,
}

impl Tools {
    /// For the harness's cluster, with the rights of the administrator.
    pub fn new(cluster: &Cluster, namespace: &str) -> Result<Self> {
        Self::with(cluster.programs.bin(), Some(cluster.kubeconfig()), namespace)
    }

    /// For the cluster of the current kubeconfig, with the programs of this folder.
    pub fn current(programs: &Path, namespace: &str) -> Result<Self> {
        Self::with(programs, None, namespace)
    }

    fn with(programs: &Path, kubeconfig: Option<PathBuf>, namespace: &str) -> Result<Self> {
        // The plugin `kubectl-aether` is found on the PATH: cargo's own folder has it.
        let mut path = vec![programs.to_owned(), target_folder().join("debug")];
        path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
        Ok(Self {
            programs: programs.to_owned(),
            kubeconfig,
            namespace: namespace.to_owned(),
            path: std::env::join_paths(path).context("PATH cannot be extended")?,
        })
    }

    /// The same for another namespace.
    pub fn in_namespace(&self, namespace: &str) -> Self {
        Self { namespace: namespace.to_owned(), ..self.clone() }
    }

    /// The same for the user of another kubeconfig.
    pub fn of_user(&self, kubeconfig: PathBuf) -> Self {
        Self { kubeconfig: Some(kubeconfig), ..self.clone() }
    }

    /// A kubectl command line, to be run by the caller.
    pub fn kubectl_command(&self, args: &[&str]) -> Command {
        self.prepare("kubectl", &["--namespace", &self.namespace], args)
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
        self.prepare("kubectl", &["aether", "--namespace", &self.namespace], args)
    }

    /// What somebody types into a shell, to be run by the caller: kubectl and `kubectl aether` are on the PATH, in the namespace of
    /// the kubeconfig. What it prints and what it complains of come as one, in the order in which they appear on a screen.
    pub fn typed(&self, line: &str) -> Command {
        self.with_environment(command("bash", ["-c", &format!("exec 2>&1; {line}")]))
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
        Ok(expect_success(&mut self.prepare("helm", &["--namespace", &self.namespace], args)).await?.stdout)
    }

    fn prepare(&self, program: &str, first: &[&str], args: &[&str]) -> Command {
        self.with_environment(command(self.programs.join(program), first.iter().chain(args)))
    }

    fn with_environment(&self, mut command: Command) -> Command {
        command.env("PATH", &self.path);
        if let Some(kubeconfig) = &self.kubeconfig {
            command.env("KUBECONFIG", kubeconfig);
        }
        command
    }
}
