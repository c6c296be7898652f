//! The installed release with another store: on claims as others have it, with a bucket, of several nodes. At the end it is as it
//! was, with the volume that it had.

use std::io::Write;

use aether_e2e::product;
use aether_e2e::site::SYSTEM_NAMESPACE;
use aether_e2e::testing::{LIMIT, Test, pod_ready};
use aether_e2e::tools::Tools;
use aether_e2e::wait;
use aether_testkit::bucket::{BUCKET, KEY, SECRET};
use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::{Api, ListParams};
use serde_json::{Value, json};

/// Where the nodes of the cluster keep the volumes; below `/var/lib`, which ends with the cluster.
const FOLDER: &str = "/var/lib/aether-e2e-store";
/// Names the volumes' class; there need be no such object.
const CLASS: &str = "aether-e2e-store";
/// The Secret of the bucket's account.
const CREDENTIALS: &str = "aether-e2e-s3";
const PODS: &str = "app.kubernetes.io/name=aether,app.kubernetes.io/component=store";
pub(crate) const NODES: usize = 3;

pub(crate) struct Release<'a> {
    test: &'a Test,
    system: Tools,
    before: Value,
}

impl<'a> Release<'a> {
    /// The release as it is now.
    pub(crate) async fn find(test: &'a Test) -> Result<Self> {
        let system = test.tools.in_namespace(SYSTEM_NAMESPACE);
        let values = system.helm(&["get", "values", "aether", "--output=json"]).await?;
        Ok(Self { test, system, before: serde_json::from_str(&values)? })
    }

    /// One store node on a claim, which has a copy of what the store has: the original is not touched.
    pub(crate) async fn move_to_claims(&self) -> Result<()> {
        let folder = self.before["store"]["persistence"]["hostPath"].as_str().context("the store has no directory")?;
        self.stop().await?;
        self.make_volumes().await?;
        let node = self.test.cluster()?.node(self.node_of(0))?;
        // The chart's store runs as nobody in particular, unless it has a directory of the node.
        let copy = format!("cp -a {folder}/. {FOLDER}/0/ && chown -R 65532:65532 {FOLDER}/0");
        node.run(&["sh", "-c", &copy]).await?;
        self.kubectl(&["delete", "statefulset", "aether-store"]).await?;
        self.upgrade(json!({})).await
    }

    /// Upgrades the release to these values of `store`, and waits until all is ready.
    pub(crate) async fn upgrade(&self, store: Value) -> Result<()> {
        let mut values = self.before.clone();
        let old = values["store"].take();
        values["store"] = json!({
            "clusterIP": old["clusterIP"], "podAnnotations": old["podAnnotations"],
            "persistence": {"size": "1Gi", "storageClassName": CLASS},
        });
        let all = values["store"].as_object_mut().context("an object")?;
        all.extend(store.as_object().context("values are an object")?.clone());
        self.helm(&values).await
    }

    /// As [`Release::upgrade`], from a chart in which the StatefulSet had another Service: it is refused, and goes on with the pod
    /// and the volume that are there once the StatefulSet alone is deleted, as CHANGELOG.md has it.
    pub(crate) async fn upgrade_from_an_older_chart(&self, store: Value) -> Result<()> {
        let set = self.kubectl(&["get", "statefulset", "aether-store", "--output=json"]).await?;
        let mut set: Value = serde_json::from_str(&set)?;
        let metadata = &set["metadata"];
        set["metadata"] =
            json!({"name": "aether-store", "labels": metadata["labels"], "annotations": metadata["annotations"]});
        set["spec"]["serviceName"] = "aether-store".into();
        let alone = ["delete", "statefulset", "aether-store", "--cascade=orphan"];
        self.kubectl(&alone).await?;
        self.system.apply(&set.to_string()).await?;
        let refused = self.upgrade(store.clone()).await.err().map(|error| format!("{error:#}")).unwrap_or_default();
        ensure!(refused.contains("--cascade=orphan"), "the upgrade is not refused with what to do: {refused}");
        self.kubectl(&alone).await?;
        let pods = self.pods().await?;
        ensure!(pods.len() == 1 && pod_ready(&pods[0]), "the pod did not stay: {} pods", pods.len());
        self.upgrade(store).await
    }

    /// Loses all volumes at once, and starts the nodes on new ones.
    pub(crate) async fn lose_all_volumes(&self) -> Result<()> {
        self.stop().await?;
        self.remove_volumes().await?;
        self.make_volumes().await?;
        self.kubectl(&["scale", "statefulset", "aether-store", &format!("--replicas={NODES}")]).await?;
        self.until_ready(NODES).await
    }

    /// The bucket as values of the chart, with its account in a Secret.
    pub(crate) async fn bucket(&self, endpoint: &str) -> Result<Value> {
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": CREDENTIALS},
            "stringData": {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET},
        });
        self.system.apply(&secret.to_string()).await?;
        let s3 = json!({
            "bucket": BUCKET, "endpoint": endpoint, "region": "us-east-1", "credentialsSecret": CREDENTIALS,
        });
        Ok(json!({"s3": s3}))
    }

    /// The release as it was found, and nothing of this one left.
    pub(crate) async fn give_back(self) -> Result<()> {
        self.kubectl(&["delete", "secret", CREDENTIALS, "--ignore-not-found"]).await?;
        self.kubectl(&["delete", "statefulset", "aether-store", "--ignore-not-found"]).await?;
        self.until_no_pods().await?;
        self.remove_volumes().await?;
        self.helm(&self.before).await
    }

    /// The store's pods, by name.
    pub(crate) async fn pods(&self) -> Result<Vec<Pod>> {
        let pods: Api<Pod> = Api::namespaced(self.test.client.clone(), SYSTEM_NAMESPACE);
        let mut pods = pods.list(&ListParams::default().labels(PODS)).await?.items;
        pods.sort_by_key(ResourceExt::name_any);
        Ok(pods)
    }

    pub(crate) async fn until_ready(&self, nodes: usize) -> Result<()> {
        wait::until(&format!("{nodes} nodes of the store are ready"), 2 * LIMIT, async || {
            let pods = self.pods().await?;
            let ready = pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none() && pod_ready(pod)).count();
            ensure!(ready == nodes && pods.len() == nodes, "{ready} of {} pods are ready", pods.len());
            Ok(Some(()))
        })
        .await
    }

    /// A figure of a store node.
    pub(crate) async fn metric(&self, pod: &str, name: &str) -> Result<u64> {
        let path = format!("/api/v1/namespaces/{SYSTEM_NAMESPACE}/pods/{pod}:9812/proxy/metrics");
        let text = self.kubectl(&["get", "--raw", &path]).await?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.with_context(|| format!("{pod} does not tell {name}"))?.parse().context("a number")
    }

    /// `kill -9` of the store's program on this node of the cluster; how many there were.
    pub(crate) async fn kill_on(&self, node: &str) -> Result<usize> {
        // The kernel keeps 15 characters of a program's name.
        let script = "for p in /proc/[0-9]*; do [ \"$(cat $p/comm 2>/dev/null)\" = aether-store-no ] && kill -9 ${p#/proc/} && echo; done; true";
        Ok(self.test.cluster()?.node(node)?.run(&["sh", "-c", script]).await?.lines().count())
    }

    /// Deletes pods of the store.
    pub(crate) async fn delete_pods(&self, pods: &[Pod], how: &[&str]) -> Result<()> {
        let names: Vec<String> = pods.iter().map(ResourceExt::name_any).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        self.kubectl(&[&["delete", "pod"][..], how, &names].concat()).await.map(drop)
    }

    /// The nodes of the cluster.
    pub(crate) fn nodes(&self) -> &[String] {
        &self.test.site.nodes
    }

    /// Runs kubectl in the namespace of the release; what it printed.
    pub(crate) async fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.system.kubectl(args).await
    }

    async fn helm(&self, values: &Value) -> Result<()> {
        let mut file = tempfile::NamedTempFile::new()?;
        file.write_all(values.to_string().as_bytes())?;
        let chart = product::top().join("charts/aether").display().to_string();
        let values = file.path().display().to_string();
        // As the harness installs it.
        let fixed = ["--skip-crds", "--wait", "--server-side=false", "--timeout=300s"];
        self.system.helm(&[&["upgrade", "aether", &chart, "--values", &values][..], &fixed].concat()).await.map(drop)
    }

    async fn stop(&self) -> Result<()> {
        self.kubectl(&["scale", "statefulset", "aether-store", "--replicas=0"]).await?;
        self.until_no_pods().await
    }

    async fn until_no_pods(&self) -> Result<()> {
        wait::until("no store node runs", LIMIT, async || Ok(self.pods().await?.is_empty().then_some(()))).await
    }

    /// Where the volume of a store node lies: the cluster has no storage of its own.
    fn node_of(&self, store_node: usize) -> &str {
        &self.test.site.nodes[store_node % self.test.site.nodes.len()]
    }

    async fn make_volumes(&self) -> Result<()> {
        for number in 0..NODES {
            let (node, path) = (self.node_of(number), format!("{FOLDER}/{number}"));
            self.test.cluster()?.node(node)?.run(&["mkdir", "-p", &path]).await?;
            let here = json!([{"matchExpressions": [
                {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}]);
            let claim = json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": SYSTEM_NAMESPACE,
                "name": format!("data-aether-store-{number}")});
            let volume = json!({
                "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": format!("{CLASS}-{number}")},
                "spec": {
                    "accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"}, "claimRef": claim,
                    "local": {"path": path}, "nodeAffinity": {"required": {"nodeSelectorTerms": here}},
                    "persistentVolumeReclaimPolicy": "Retain", "storageClassName": CLASS,
                },
            });
            self.system.apply(&volume.to_string()).await?;
        }
        Ok(())
    }

    /// Claims, volumes and what is in them. Nothing may use them any more.
    async fn remove_volumes(&self) -> Result<()> {
        for number in 0..NODES {
            let claim = format!("data-aether-store-{number}");
            self.kubectl(&["delete", "persistentvolumeclaim", &claim, "--ignore-not-found", "--timeout=60s"]).await?;
            let volume = format!("{CLASS}-{number}");
            self.kubectl(&["delete", "persistentvolume", &volume, "--ignore-not-found", "--timeout=60s"]).await?;
        }
        for node in self.test.cluster()?.nodes() {
            node.run(&["rm", "-rf", FOLDER]).await?;
        }
        Ok(())
    }
}
