//! Sessions that nobody names: inline volumes and claims of class `aether`.

use std::time::Instant;

use aether_api::AetherSession;
use anyhow::{Result, ensure};
use futures::future::try_join_all;
use kube::api::ListParams;

use super::{Story, limit};

/// A pod with an inline volume, and one with a claim of the class, each get a session of their own.
pub(super) async fn inline_and_class(story: &Story) -> Result<String> {
    story.source().await?;
    story.apply(&impatient(&story.sample("inline.yaml")?)).await?;
    story.until_pod_ready("throwaway", limit(60)).await?;
    story.exec("throwaway", "git status --porcelain; echo mine >inline").await?;
    let begins = |name: &String| name.starts_with("throwaway") || name == "scratch";
    ensure!(story.sessions().await?.iter().any(begins), "the inline volume's session is not listed");

    story.apply(&story.sample("claim.yaml")?).await?;
    story.pod("classy", "scratch", Some(story.first_node())).await?;
    let seen = story.exec("classy", "git log --oneline | head -1; ls inline 2>&1 || true").await?;
    ensure!(seen.contains("No such file"), "two sessions share their changes: {seen}");

    story.delete_pod("throwaway").await?;
    story.delete_pod("classy").await?;
    story.kubectl(&["delete", "pvc", "scratch"]).await?;
    story
        .poll("their sessions end with them", limit(60), async || {
            let mut left = story.sessions().await?;
            left.retain(begins);
            ensure!(left.is_empty(), "still there: {left:?}");
            Ok(())
        })
        .await?;
    Ok("an inline volume and a claim of class aether each had a session, and took it with them".into())
}

/// Fifty pods with inline volumes at once; the time until every mount was served.
pub(super) async fn fifty_inline(story: &Story) -> Result<String> {
    story.source().await?;
    let sample = story.sample("inline.yaml")?;
    let manifests: Vec<String> =
        (1..=50).map(|i| impatient(&sample).replace("name: throwaway", &format!("name: inline-{i}"))).collect();
    let begun = Instant::now();
    story.apply(&manifests.join("\n---\n")).await?;
    try_join_all((1..=50).map(async |i| story.until_volumes_mounted(&format!("inline-{i}"), limit(300)).await)).await?;
    let took = begun.elapsed().as_secs_f64() * 1000.0;
    story.figure("forks_50_inline_ms", took);
    story.kubectl(&["delete", "pod", "--all", "--grace-period=0", "--wait=true"]).await?;
    Ok(format!("50 inline volumes mounted {took:.0} ms after the pods were applied"))
}

/// A pod that ends when it is deleted: `sleep` as a first process does not hear TERM.
fn impatient(pod: &str) -> String {
    pod.replacen("\nspec:\n", "\nspec:\n  terminationGracePeriodSeconds: 0\n", 1)
}

impl Story {
    /// The names of the namespace's sessions.
    pub async fn sessions(&self) -> Result<Vec<String>> {
        Ok(self
            .api::<AetherSession>()
            .list(&ListParams::default())
            .await?
            .items
            .into_iter()
            .filter_map(|session| session.metadata.name)
            .collect())
    }
}
