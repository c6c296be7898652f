//! The cluster of the current kubeconfig, for `make demo CLUSTER=current`: finds Aether there or installs it, and serves the
//! story's repository from a pod, so that nothing outside the cluster has to be reached.
//!
//! What is made for the story lies in namespaces with a label of the run; [`Current::clean`] removes exactly those. Aether
//! itself, once installed, stays.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, ResourceExt};
use serde_json::json;

use super::{SYSTEM_NAMESPACE, Site};
use crate::command::{command, output};
use crate::testing::pod_ready;
use crate::tools::Tools;
use crate::{product, third_party, wait};

const RUN_LABEL: &str = "aether.dev/demo";
const GIT_SERVER: &str = include_str!("git_server.py");
const GIT_PORT: u16 = 8418;
const LOCKED_GIT_PORT: u16 = 8419;

/// What is installed when Aether is not there.
#[derive(Debug, Clone, Default)]
pub struct Install {
    /// Where the images are: `<registry>/aether/operator:<tag>` and so on.
    pub registry: Option<String>,
    /// Their tag.
    pub tag: Option<String>,
    /// A file of further values for the chart.
    pub values: Option<PathBuf>,
}

/// The current cluster, looked at but not touched.
pub struct Current {
    client: Client,
    tools: Tools,
    /// The context of the kubeconfig, for people.
    context: String,
    /// The value of the run's label.
    run: String,
}

impl Current {
    /// Connects to the cluster of the current context of `KUBECONFIG`, or of `~/.kube/config`.
    pub async fn connect() -> Result<Self> {
        let way_out = "CLUSTER=current plays on the cluster of the current kubeconfig: set KUBECONFIG, or leave CLUSTER out for a cluster of the demo's own";
        let kubeconfig = Kubeconfig::read().context(way_out)?;
        let context = kubeconfig.current_context.clone().unwrap_or_else(|| "(none)".into());
        let config =
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.context(way_out)?;
        let server = config.cluster_url.to_string();
        let client = Client::try_from(config)?;
        let version = client
            .apiserver_version()
            .await
            .with_context(|| format!("the API server of context {context}, {server}, does not answer"))?;
        println!("Playing on the cluster of context {context}: Kubernetes {} at {server}", version.git_version);
        let tools = Tools::current(&third_party::kubectl_helm().await?, SYSTEM_NAMESPACE)?;
        let run = format!("{:x}", jiff::Timestamp::now().as_microsecond());
        Ok(Self { client, tools, context, run })
    }

    /// Finds Aether, or installs it, and makes what the story needs.
    pub async fn prepare(&self, install: &Install, disrupt: bool) -> Result<Site> {
        let operator = match self.operator().await? {
            Some(operator) => {
                if install.registry.is_some() || install.tag.is_some() {
                    println!("      Aether is installed already: REGISTRY and TAG are not used");
                }
                operator
            }
            None => {
                self.install(install).await?;
                self.operator().await?.context("helm installed the chart, but there is no operator")?
            }
        };
        let system_namespace = operator.namespace().context("a Deployment has a namespace")?;
        let nodes = self.nodes(&system_namespace).await?;
        let tools_image = argument(&operator, "--command-image=").with_context(|| {
            format!("Deployment {system_namespace}/aether-operator has no argument --command-image: is it an Aether of this version?")
        })?;
        println!("      Aether is in namespace {system_namespace}; playing on {}", nodes.join(" and "));
        let labels = BTreeMap::from([(RUN_LABEL.to_owned(), self.run.clone())]);
        let platform_namespace = format!("demo-platform-{}", self.run);
        // Not by `kubectl apply`: the sample that is applied later has no labels and would take these away.
        let namespace = serde_json::from_value(json!({"metadata": {"name": platform_namespace, "labels": labels}}))?;
        Api::<Namespace>::all(self.client.clone()).create(&PostParams::default(), &namespace).await?;
        let address = self.serve_git(&platform_namespace, &tools_image).await?;
        Ok(Site {
            client: self.client.clone(),
            tools: self.tools.clone(),
            nodes,
            system_namespace,
            platform_namespace,
            tools_image,
            git_url: format!("http://{address}:{GIT_PORT}"),
            locked_git_url: format!("http://{address}:{LOCKED_GIT_PORT}"),
            labels,
            disrupt,
            cluster: None,
        })
    }

    /// Removes the namespaces of this run and waits until they are gone.
    pub async fn clean(&self) -> Result<()> {
        let api: Api<Namespace> = Api::all(self.client.clone());
        let ours = ListParams::default().labels(&format!("{RUN_LABEL}={}", self.run));
        for namespace in api.list(&ours).await? {
            match api.delete(&namespace.name_any(), &DeleteParams::default()).await {
                Err(kube::Error::Api(status)) if [404, 409].contains(&status.code) => {}
                deleted => drop(deleted?),
            }
        }
        wait::until("the namespaces of the demo are gone", Duration::from_secs(180), async || {
            let left: Vec<String> = api.list(&ours).await?.iter().map(ResourceExt::name_any).collect();
            ensure!(
                left.is_empty(),
                "still there: {}; `kubectl describe namespace` says what they wait for",
                left.join(", ")
            );
            Ok(Some(()))
        })
        .await
    }

    /// The operator's Deployment, wherever it is installed.
    async fn operator(&self) -> Result<Option<Deployment>> {
        let all: Api<Deployment> = Api::all(self.client.clone());
        let selector =
            ListParams::default().labels("app.kubernetes.io/name=aether,app.kubernetes.io/component=operator");
        Ok(all.list(&selector).await?.items.into_iter().next())
    }

    async fn install(&self, install: &Install) -> Result<()> {
        let (Some(registry), Some(tag)) = (&install.registry, &install.tag) else {
            bail!(
                "Aether is not installed on the cluster of context {}. Install it as the README says, or let the demo do it: push the images of the Containerfiles and run `make demo CLUSTER=current REGISTRY=registry.example.org TAG=0.1.0`, with VALUES=FILE for further values of the chart",
                self.context
            );
        };
        println!("      installing Aether with the images of {registry}, tag {tag}");
        let chart = product::top().join("charts/aether").display().to_string();
        let (registry, tag) = (format!("images.registry={registry}"), format!("images.tag={tag}"));
        let mut args =
            vec!["upgrade", "--install", "aether", &chart, "--create-namespace", "--wait", "--timeout", "300s"];
        // By the client, as old API servers refuse what they would default themselves.
        args.extend(["--server-side=false", "--set", &registry, "--set-string", &tag]);
        let values = install.values.as_ref().map(|file| file.display().to_string());
        args.extend(values.iter().flat_map(|file| ["--values", file.as_str()]));
        self.tools.helm(&args).await.with_context(|| {
            format!("the chart is not ready; `kubectl -n {SYSTEM_NAMESPACE} get pods` says what it waits for, `helm -n {SYSTEM_NAMESPACE} uninstall aether` removes it")
        })?;
        println!("      it stays when the demo ends: `helm -n {SYSTEM_NAMESPACE} uninstall aether` removes it");
        Ok(())
    }

    /// Two nodes with a ready driver that take pods, if there are two.
    async fn nodes(&self, system_namespace: &str) -> Result<Vec<String>> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), system_namespace);
        let selector = ListParams::default().labels("app.kubernetes.io/name=aether");
        let parts = wait::until("all parts of Aether are ready", Duration::from_secs(60), async || {
            let parts = pods.list(&selector).await?.items;
            for part in &parts {
                let name = part.name_any();
                ensure!(
                    pod_ready(part),
                    "pod {name} is not; `kubectl -n {system_namespace} describe pod {name}` says why"
                );
            }
            Ok(Some(parts))
        })
        .await?;
        let mut with_driver: Vec<String> = parts
            .iter()
            .filter(|part| part.labels().get("app.kubernetes.io/component").is_some_and(|name| name == "driver"))
            .filter_map(|part| part.spec.as_ref()?.node_name.clone())
            .collect();
        with_driver.sort();
        let nodes: Api<Node> = Api::all(self.client.clone());
        let mut found = Vec::new();
        for name in &with_driver {
            let spec = nodes.get(name).await?.spec.unwrap_or_default();
            let refuses = spec.taints.iter().flatten().any(|taint| taint.effect != "PreferNoSchedule");
            if !refuses && spec.unschedulable != Some(true) {
                found.push(name.clone());
            }
        }
        found.truncate(2);
        ensure!(
            !found.is_empty(),
            "no node takes the story's pods: it needs one, better two, with a ready driver and without taints; drivers run on [{}]. `kubectl uncordon NODE`, or driver.nodeSelector and driver.tolerations of the chart, make one",
            with_driver.join(", ")
        );
        Ok(found)
    }

    /// Serves the story's repository from a pod; the address of its Service.
    async fn serve_git(&self, namespace: &str, image: &str) -> Result<String> {
        let tools = self.tools.in_namespace(namespace);
        let credentials = product::credentials();
        let labels = json!({"app": "git-server"});
        let ports = json!([{"name": "open", "port": GIT_PORT}, {"name": "locked", "port": LOCKED_GIT_PORT}]);
        let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "git-server"}, "data": {"git_server.py": GIT_SERVER}},
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "git-server"}, "spec": {"selector": labels, "ports": ports}},
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "git-server", "labels": labels}, "spec": {
                "terminationGracePeriodSeconds": 1,
                "securityContext": {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000},
                "containers": [{
                    "name": "git-server",
                    "image": image,
                    "command": ["python3", "/program/git_server.py", "/repositories", GIT_PORT.to_string(), LOCKED_GIT_PORT.to_string(),
                        format!("{}:{}", credentials.user, credentials.password)],
                    "readinessProbe": {"tcpSocket": {"port": GIT_PORT}, "periodSeconds": 1},
                    "volumeMounts": [{"name": "program", "mountPath": "/program"}, {"name": "repositories", "mountPath": "/repositories"}],
                }],
                "volumes": [{"name": "program", "configMap": {"name": "git-server"}}, {"name": "repositories", "emptyDir": {}}],
            }},
        ]});
        let begun = std::time::Instant::now();
        let repository = third_party::kubernetes_repository().await?;
        tools.apply(&objects.to_string()).await?;
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        wait::object(&pods, "git-server", "is ready", Duration::from_secs(120), pod_ready).await.with_context(|| {
            format!("the git server of the demo does not start: its image {image} (the chart's images.command) must have git and python3")
        })?;
        let folder = repository.parent().context("a repository lies in a folder")?;
        let name = repository.file_name().context("a repository has a name")?;
        let mut pack = command("tar", ["-C".as_ref(), folder.as_os_str(), "-c".as_ref(), name]).spawn()?;
        let packed: Stdio = pack.stdout.take().context("its output is piped")?.try_into()?;
        let mut unpack = tools.kubectl_command(&[
            "exec",
            "-i",
            "git-server",
            "--",
            "tar",
            "--no-same-owner",
            "-x",
            "-C",
            "/repositories",
        ]);
        let unpacked = output(unpack.stdin(packed), None).await?;
        ensure!(
            pack.wait().await?.success() && unpacked.code == 0,
            "the repository does not get into the pod: {}",
            unpacked.stderr.trim()
        );
        let services: Api<Service> = Api::namespaced(self.client.clone(), namespace);
        let address = services
            .get("git-server")
            .await?
            .spec
            .and_then(|spec| spec.cluster_ip)
            .context("a Service has an address")?;
        println!(
            "      a pod serves the Kubernetes source tree as a git repository [{:.1} s]",
            begun.elapsed().as_secs_f64()
        );
        Ok(address)
    }
}

/// The value of an argument of a Deployment's first container.
fn argument(deployment: &Deployment, name: &str) -> Option<String> {
    let container = deployment.spec.as_ref()?.template.spec.as_ref()?.containers.first()?;
    container.args.iter().flatten().find_map(|argument| argument.strip_prefix(name).map(str::to_owned))
}
