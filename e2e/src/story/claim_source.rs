//! A source that is a directory in a claim: read as it is, whoever owns its files, and nothing beside it.

use aether_api::{AetherSource, conditions};
use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Node, PersistentVolume};
use kube::ResourceExt;
use kube::api::Api;
use serde_json::json;

use super::{Story, limit};

/// What is imported is `tree`: five files and a link. One file is root's alone.
const FILL: &str = "set -e; cd /data; mkdir -p tree/sub; echo outside >outside
    printf 'one\\n' >tree/plain; printf x >'tree/näme with space'; head -c 3000000 /dev/urandom >tree/large
    printf '#!/bin/sh\\necho ran\\n' >tree/sub/run; chmod 755 tree/sub/run; ln -s sub/run tree/link
    chown -Rh 1000:1000 tree; printf 'secret\\n' >tree/locked; chmod 600 tree/locked";
/// Names, kinds, modes, owners, links and contents of the tree in the working directory.
const LIST: &str =
    "find . -mindepth 1 -printf '%P %y %m %U %l\\n' | sort; find . -type f -exec sha256sum {} + 2>/dev/null | sort";

/// A directory in a claim becomes a source; its sessions have its files, modes, owners and links.
pub(super) async fn import_a_claim(story: &Story) -> Result<String> {
    source(story, "no-claim", "no-such-claim", "tree").await?;
    refused(story, "no-claim", conditions::reason::CLAIM_NOT_FOUND, "no-such-claim").await?;

    let volume = VolumeOnNode::create(story, "data").await?;
    let told = play(story).await;
    let removed = volume.remove(story).await;
    let told = told?;
    removed.map(|()| told)
}

async fn play(story: &Story) -> Result<String> {
    story.exec("filler", FILL).await?;
    let expected = story.exec("filler", &format!("cd /data/tree && {LIST}")).await?;
    source(story, "from-claim", "data", "tree").await?;
    let ready = story.until_source_ready("from-claim").await?;
    let revision = ready.status.context("a status")?.revisions.into_iter().next().context("a revision")?;
    ensure!(revision.files == 5, "{} files imported, 5 are there", revision.files);
    ensure!(revision.commit.is_none(), "a directory has no commit: {:?}", revision.commit);

    story.session_of("of-claim", "from-claim").await?;
    story.pod("of-claim", "of-claim", None).await?;
    let seen = story.exec("of-claim", &format!("{LIST}; sub/run; cat locked 2>&1 || true; echo mine >plain")).await?;
    // Root's file is there, as root's: whoever could read it through a session could not read it in the claim.
    for line in expected.lines().filter(|line| !line.ends_with("./locked")) {
        ensure!(seen.contains(line), "the session lacks {line:?}:\n{seen}");
    }
    ensure!(seen.contains("Permission denied"), "root's file of mode 600 opened for uid 1000:\n{seen}");
    ensure!(seen.contains("\nran\n"), "sub/run did not run:\n{seen}");
    ensure!(!seen.contains("outside"), "what is beside the directory was imported:\n{seen}");
    let untouched = story.exec("filler", "cat /data/tree/plain").await?;
    ensure!(untouched == "one\n", "the session's change reached the claim: {untouched:?}");

    source(story, "no-directory", "data", "no-such-directory").await?;
    refused(story, "no-directory", conditions::reason::INVALID, "no-such-directory").await?;

    story.delete_pod("of-claim").await?;
    story.kubectl(&["delete", "aethersession", "of-claim", "--timeout=60s"]).await?;
    Ok(format!("{} files, {} bytes from a claim, with their modes, owners and links", revision.files, revision.bytes))
}

async fn source(story: &Story, name: &str, claim: &str, path: &str) -> Result<()> {
    let source = json!({
        "apiVersion": "aether.dev/v1alpha1", "kind": "AetherSource", "metadata": {"name": name},
        "spec": {"claim": {"claimName": claim, "path": path}},
    });
    story.apply(&source.to_string()).await
}

/// Waits until the source says why it is not ready, naming what is wrong.
async fn refused(story: &Story, name: &str, reason: &str, named: &str) -> Result<()> {
    let what = format!("has Ready=False with reason {reason} and a message that names {named}");
    story
        .until(name, &what, limit(90), |source: &AetherSource| {
            let conditions = source.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
            conditions::get(conditions, conditions::READY)
                .is_some_and(|ready| ready.status == "False" && ready.reason == reason && ready.message.contains(named))
        })
        .await
        .map(drop)
}

/// A directory of the first node as a volume with a claim, in the place of a cluster's storage, and the pod `filler`
/// that has it at `/data` as root.
pub(super) struct VolumeOnNode {
    name: String,
}

impl VolumeOnNode {
    pub(super) async fn create(story: &Story, claim: &str) -> Result<Self> {
        let name = format!("aether-e2e-{}", story.namespace);
        let nodes: Api<Node> = Api::all(story.test.client.clone());
        let node = nodes.get(story.first_node()).await?;
        let hostname = node.labels().get("kubernetes.io/hostname").context("the node has no label of its host name")?;
        let here = json!([{"matchExpressions": [
            {"key": "kubernetes.io/hostname", "operator": "In", "values": [hostname]}]}]);
        let volume = json!({
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name},
            "spec": {
                "accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"}, "persistentVolumeReclaimPolicy": "Retain",
                "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": story.namespace, "name": claim},
                // In memory, so that it never outlives the node.
                "hostPath": {"path": format!("/run/{name}"), "type": "DirectoryOrCreate"},
                "nodeAffinity": {"required": {"nodeSelectorTerms": here}},
            },
        });
        let bound = json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": claim},
            "spec": {
                "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}},
                "storageClassName": "", "volumeName": name,
            },
        });
        let filler = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "filler"},
            "spec": {
                "terminationGracePeriodSeconds": 0,
                "containers": [{
                    "name": "filler", "image": story.site().tools_image, "command": ["sleep", "infinity"],
                    "volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "run", "mountPath": "/host/run"}],
                }],
                "volumes": [
                    {"name": "data", "persistentVolumeClaim": {"claimName": claim}},
                    // To remove the directory itself at the end.
                    {"name": "run", "hostPath": {"path": "/run", "type": "Directory"}},
                ],
            },
        });
        let this = Self { name };
        for manifest in [volume, bound, filler] {
            if let Err(error) = story.apply(&manifest.to_string()).await {
                this.remove(story).await.ok();
                return Err(error);
            }
        }
        match story.until_pod_ready("filler", limit(120)).await {
            Ok(()) => Ok(this),
            Err(error) => {
                this.remove(story).await.ok();
                Err(error)
            }
        }
    }

    pub(super) async fn remove(self, story: &Story) -> Result<()> {
        let emptied =
            story.exec("filler", &format!("find /data -mindepth 1 -delete && rmdir /host/run/{}", self.name)).await;
        // Claims go with the namespace; a volume has none.
        let volumes: Api<PersistentVolume> = Api::all(story.test.client.clone());
        match volumes.delete(&self.name, &Default::default()).await {
            Err(kube::Error::Api(status)) if status.is_not_found() => {}
            deleted => drop(deleted.with_context(|| format!("cannot delete PersistentVolume {}", self.name))?),
        }
        emptied.map(drop)
    }
}
