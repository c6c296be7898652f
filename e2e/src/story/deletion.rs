//! The end: in any order, with nothing left behind.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::ResourceExt;
use kube::api::{Api, ListParams};

use super::{Story, limit};

/// A claim deleted by a user is made anew; objects end in any order; a namespace ends, also when the operator was away.
pub(super) async fn leave_nothing(story: &Story) -> Result<String> {
    story.source().await?;
    story.agent("gone", "last").await?;
    story.exec("last", "echo kept >kept").await?;
    story.aether(&["checkpoint", "gone", "--name", "gone-1", "--wait", "durable"]).await?;
    story.aether(&["fork", "gone", "gone-fork"]).await?;
    story.delete_pod("last").await?;

    let claims: Api<PersistentVolumeClaim> = story.api();
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
    story.pod("again", "gone", Some(story.first_node())).await?;
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

    if let Some(why) = story.site().others_at_work().await? {
        story.leave_out("the end of a namespace while the operator is down", why);
        return Ok("sessions, checkpoints and claims are gone; no mount, no upper, no PersistentVolume left".into());
    }
    namespace_without_operator(story).await?;
    Ok("sessions, checkpoints, claims and the namespace are gone; no mount, no upper, no PersistentVolume left".into())
}

/// A namespace that is deleted while nobody reconciles.
async fn namespace_without_operator(story: &Story) -> Result<()> {
    story.agent("orphan", "orphan").await?;
    let operators: Api<Deployment> = Api::namespaced(story.test.client.clone(), &story.site().system_namespace);
    let replicas = operators.get("aether-operator").await?.spec.and_then(|spec| spec.replicas).unwrap_or(1);
    let scale = async |replicas: i32| {
        story.system_kubectl(&["scale", "deployment/aether-operator", &format!("--replicas={replicas}")]).await
    };
    scale(0).await?;
    let ended = async {
        story
            .poll("the operator is down", limit(60), async || {
                ensure!(story.parts(Some("operator")).await?.is_empty(), "its pod is there");
                Ok(())
            })
            .await?;
        story.kubectl(&["delete", "namespace", &story.namespace, "--wait=false"]).await?;
        story
            .kubectl(&["wait", "--for=delete", &format!("namespace/{}", story.namespace), "--timeout=120s"])
            .await
            .or_else(super::already_gone)
    }
    .await;
    scale(replicas).await?;
    ended?;
    // What has no namespace waits for the operator.
    story.nothing_left(|_| true).await
}

impl Story {
    /// Waits until no node has anything of these sessions of the namespace, and no PersistentVolume points at their claims.
    async fn nothing_left(&self, concerns: impl Fn(&str) -> bool) -> Result<()> {
        let volumes: Api<PersistentVolume> = Api::all(self.test.client.clone());
        self.poll("nothing of the namespace is left", limit(90), async || {
            for volume in volumes.list(&ListParams::default()).await?.items {
                let claim = volume.spec.as_ref().and_then(|spec| spec.claim_ref.clone()).unwrap_or_default();
                let ours = claim.namespace.as_ref() == Some(&self.namespace)
                    && concerns(claim.name.as_deref().unwrap_or_default());
                ensure!(!ours, "PersistentVolume {:?} is left", volume.metadata.name);
            }
            for driver in self.parts(Some("driver")).await? {
                let driver = driver.name_any();
                let list = self.system_kubectl(&["exec", &driver, "--", "aether-node", "list", "-o", "json"]).await?;
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
                self.system_kubectl(&["exec", &driver, "--", "aether-node", "fsck"]).await?;
            }
            Ok(())
        })
        .await
    }
}
