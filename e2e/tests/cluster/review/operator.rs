//! The operator and its webhook, taken away and given back.

use aether_e2e::site::SYSTEM_NAMESPACE;
use aether_e2e::team::create;
use aether_e2e::testing::{LIMIT, Test, pod_ready};
use aether_e2e::tools::Tools;
use aether_e2e::wait;
use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use serde_json::Value;

const LABEL: &str = "app.kubernetes.io/name=aether";
const PODS: &str = "app.kubernetes.io/name=aether,app.kubernetes.io/component=operator";
const KINDS: [&str; 2] = ["mutatingwebhookconfiguration", "validatingwebhookconfiguration"];

/// The operator of the release.
pub(crate) struct Operator<'a> {
    test: &'a Test,
    system: Tools,
    /// What tells the API server to ask the webhook, as it was found.
    configurations: Vec<Value>,
}

impl<'a> Operator<'a> {
    pub(crate) async fn find(test: &'a Test) -> Result<Self> {
        let system = test.tools.in_namespace(SYSTEM_NAMESPACE);
        let mut configurations = Vec::new();
        for kind in KINDS {
            let found = system.kubectl(&["get", kind, "--selector", LABEL, "--output=json"]).await?;
            let mut found: Value = serde_json::from_str(&found)?;
            let mut found = found["items"][0].take();
            let metadata = found["metadata"].as_object_mut().with_context(|| format!("the chart has no {kind}"))?;
            metadata.retain(|field, _| ["name", "labels", "annotations"].contains(&field.as_str()));
            configurations.push(found);
        }
        Ok(Self { test, system, configurations })
    }

    /// So many replicas, all ready.
    pub(crate) async fn scale(&self, replicas: usize) -> Result<()> {
        self.system.kubectl(&["scale", "deployment", "aether-operator", &format!("--replicas={replicas}")]).await?;
        self.until_ready(replicas).await
    }

    pub(crate) async fn until_ready(&self, replicas: usize) -> Result<()> {
        wait::until(&format!("{replicas} operators are ready"), 2 * LIMIT, async || {
            let pods = self.pods().await?;
            let ready = pods.iter().filter(|pod| pod_ready(pod)).count();
            ensure!(pods.len() == replicas && ready == replicas, "{ready} of {} are", pods.len());
            Ok(Some(()))
        })
        .await
    }

    async fn pods(&self) -> Result<Vec<Pod>> {
        let pods: Api<Pod> = Api::namespaced(self.test.client.clone(), SYSTEM_NAMESPACE);
        Ok(pods.list(&ListParams::default().labels(PODS)).await?.items)
    }

    /// One operator, which dies when it first gets to this point of a commit. What is started again in its place goes on.
    pub(crate) async fn arm(&self, point: &str) -> Result<()> {
        // On a volume that outlives the container.
        let once = "AETHER_CRASH_ONCE=/var/run/aether/authority/crashed";
        self.set(&[&format!("AETHER_CRASH_AT={point}"), once]).await
    }

    /// Fails unless the only operator has died once, at this point.
    pub(crate) async fn died_at(&self, point: &str) -> Result<()> {
        let pods = self.pods().await?;
        let [pod] = &pods[..] else { bail!("there are {} operators", pods.len()) };
        let containers = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
        let deaths: i32 = containers.into_iter().flatten().map(|container| container.restart_count).sum();
        ensure!(deaths == 1, "{point}: the operator has died {deaths} times");
        let said = self.system.kubectl(&["logs", &pod.name_any(), "--previous", "--tail=3"]).await?;
        ensure!(said.contains(&format!("crash point {point}")), "{point}: the operator's last words were {said}");
        Ok(())
    }

    /// With these variables in its environment, or without those that end in `-`.
    async fn set(&self, variables: &[&str]) -> Result<()> {
        let deployment = "deployment/aether-operator";
        self.system.kubectl(&[&["set", "env", deployment][..], variables].concat()).await?;
        self.system.kubectl(&["rollout", "status", deployment, "--timeout=180s"]).await?;
        self.until_ready(1).await
    }

    /// `kill -9` of all operators at once; how many there were.
    pub(crate) async fn kill(&self) -> Result<usize> {
        let script = "for p in /proc/[0-9]*; do [ \"$(cat $p/comm 2>/dev/null)\" = aether-operator ] && kill -9 ${p#/proc/} && echo; done; true";
        let nodes = self.test.cluster()?.nodes();
        let killed = nodes.iter().map(async |node| node.run(&["sh", "-c", script]).await);
        Ok(futures::future::try_join_all(killed).await?.iter().map(|pids| pids.lines().count()).sum())
    }

    /// The API server asks no webhook any more, as if whoever may do everything had seen to that.
    pub(crate) async fn unhook(&self) -> Result<()> {
        for (kind, found) in KINDS.iter().zip(&self.configurations) {
            self.system.kubectl(&["delete", kind, name(found)]).await?;
        }
        Ok(())
    }

    /// As it was found.
    pub(crate) async fn give_back(&self) -> Result<()> {
        for (kind, found) in KINDS.iter().zip(&self.configurations) {
            if self.system.kubectl_output(&["get", kind, name(found)], None).await?.code != 0 {
                create(&self.system, found).await?;
            }
        }
        self.scale(1).await?;
        self.set(&["AETHER_CRASH_AT-", "AETHER_CRASH_ONCE-"]).await
    }
}

fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}
