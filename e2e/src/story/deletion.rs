//! The end: in any order, with nothing left behind.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::api::{Api, ListParams};

use super::{Story, limit};
use crate::testing::SYSTEM_NAMESPACE;

/// A claim deleted by a user is made anew; objects end in any order; a namespace ends, also when the operator was away.
pub(super) async fn leave_nothing(story: &Story) -> Result<String> {
    story.source().await?;
    story.agent("gone", "last").await?;
    story.exec("last", "echo kept >kept").await?;
    story.aether(&["checkpoint", "gone", "--name", "gone-1", "--wait", "durable"]).await?;
    story.aether(&["fork", "gone", "gone-fork"]).await?;
    story.delete_pod("last").await?;

    let claims: Api<PersistentVolumeClaim> = Api::namespaced(story.cluster.client.clone(), &story.namespace);
    let uid = claims.get("gone").await?.metadata.uid;
    story.kubectl(&["delete", "pvc", "gone", "--wait=false"]).await?;
    story
        .poll("the claim is made anew and bound", limit(60), async || {
            let claim = claims.get("gone").await?;
            ensure!(claim.metadata.uid != uid, "it is the old one");
            let phase = claim.status.and_then(|status| status.phase).unwrap_or_default();
            ensure!(phase == "Bound", "it is {phase}");
            Ok(())
        })
        .await?;
    story.pod("again", "gone", Some("node-1")).await?;
    ensure!(story.exec("again", "cat kept").await?.trim() == "kept", "the session lost its files with the claim");

    // The parent before the fork, the session under its pod, the checkpoint last.
    story.kubectl(&["delete", "aethersession", "gone", "--wait=false"]).await?;
    story.delete_pod("again").await?;
    story.kubectl(&["delete", "aethersession", "gone-fork", "--timeout=60s"]).await?;
    story
        .kubectl(&["wait", "--for=delete", "aethersession/gone", "--timeout=60s"])
        .await
        .or_else(super::already_gone)?;
    story.kubectl(&["delete", "aethercheckpoint", "gone-1", "--timeout=60s"]).await?;
    story.nothing_left(|session| session == "gone" || session == "gone-fork").await?;

    // A namespace that is deleted while nobody reconciles.
    story.agent("orphan", "orphan").await?;
    story.kubectl(&["-n", SYSTEM_NAMESPACE, "scale", "deployment/aether-operator", "--replicas=0"]).await?;
    let ended = async {
        story
            .kubectl(&[
                "-n",
                SYSTEM_NAMESPACE,
                "wait",
                "--for=delete",
                "pod",
                "-l",
                "app.kubernetes.io/component=operator",
                "--timeout=60s",
            ])
            .await
            .or_else(super::already_gone)?;
        story.kubectl(&["delete", "namespace", &story.namespace, "--wait=false"]).await
    }
    .await;
    story.kubectl(&["-n", SYSTEM_NAMESPACE, "scale", "deployment/aether-operator", "--replicas=1"]).await?;
    ended?;
    story
        .kubectl(&["wait", "--for=delete", &format!("namespace/{}", story.namespace), "--timeout=120s"])
        .await
        .or_else(super::already_gone)?;
    story.nothing_left(|_| true).await?;
    Ok("sessions, checkpoints, claims and the namespace are gone; no mount, no upper, no PersistentVolume left".into())
}

impl Story {
    /// Waits until no node has anything of these sessions of the namespace, and no PersistentVolume points at their claims.
    async fn nothing_left(&self, concerns: impl Fn(&str) -> bool) -> Result<()> {
        let volumes: Api<PersistentVolume> = Api::all(self.cluster.client.clone());
        self.poll("nothing of the namespace is left", limit(90), async || {
            for volume in volumes.list(&ListParams::default()).await?.items {
                let claim = volume.spec.as_ref().and_then(|spec| spec.claim_ref.clone()).unwrap_or_default();
                let ours = claim.namespace.as_ref() == Some(&self.namespace)
                    && concerns(claim.name.as_deref().unwrap_or_default());
                ensure!(!ours, "PersistentVolume {:?} is left", volume.metadata.name);
            }
            for driver in self.driver_pods().await? {
                let list = self
                    .kubectl(&["-n", SYSTEM_NAMESPACE, "exec", &driver, "--", "aether-node", "list", "-o", "json"])
                    .await?;
                let list: serde_json::Value = serde_json::from_str(&list).context("aether-node list -o json")?;
                let left: Vec<_> = list
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter(|session| {
                        session["namespace"] == self.namespace && concerns(session["name"].as_str().unwrap_or_default())
                    })
                    .collect();
                ensure!(left.is_empty(), "{driver} still has {left:?}");
                // Fails where something is wrong.
                self.kubectl(&["-n", SYSTEM_NAMESPACE, "exec", &driver, "--", "aether-node", "fsck"]).await?;
            }
            Ok(())
        })
        .await
    }
}
