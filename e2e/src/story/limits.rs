//! What a session may write: the limit, raised while a pod works, by its spec and by a claim; and sessions in memory.

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::{Event, PersistentVolumeClaim};
use kube::api::ListParams;
use serde_json::json;

use super::{Story, limit};

/// Writes `$1` MiB into file `$2`, on disk when it ends; prints what went wrong.
const FILL: &str = r#"fill() { dd if=/dev/zero of="$2" bs=1M count="$1" conv=fsync 2>&1 >/dev/null | grep -o 'Disk quota exceeded\|No space left on device'; }"#;

/// A limit holds for its session alone and is raised under a running pod; that of a claim by the claim; memory forks too.
pub(super) async fn limits(story: &Story) -> Result<String> {
    story.source().await?;
    let by_spec = by_spec(story).await?;
    let by_claim = by_claim(story).await?;
    let in_memory = in_memory(story).await?;
    Ok(format!("{by_spec}; {by_claim}; {in_memory}"))
}

async fn by_spec(story: &Story) -> Result<&'static str> {
    story.apply(&session(story, "small", &json!({"limits": {"bytes": "32Mi", "inodes": 2000}}))?).await?;
    story.session("roomy").await?;
    story.pod("in-small", "small", Some(story.first_node())).await?;
    story.pod("in-roomy", "roomy", Some(story.first_node())).await?;
    ensure!(fill(story, "in-small", 64).await? == "Disk quota exceeded", "64 MiB fit into a limit of 32 MiB");
    ensure!(fill(story, "in-roomy", 64).await?.is_empty(), "the limit of another session is in the way");
    let told = async || {
        let field = "involvedObject.kind=AetherSession,involvedObject.name=small,reason=LimitReached";
        let events = story.api::<Event>().list(&ListParams::default().fields(field)).await?.items;
        ensure!(!events.is_empty(), "no event tells that session small reached its limit");
        Ok(())
    };
    story.poll("an event tells of the limit", limit(30), told).await?;
    story.exec("in-small", "rm big; echo again >after").await?;

    let wider = r#"{"spec": {"limits": {"bytes": "256Mi"}}}"#;
    story.kubectl(&["patch", "aethersession", "small", "--type=merge", "--patch", wider]).await?;
    story.poll("the wider limit holds", limit(30), async || fits(story, "in-small", 64).await).await?;

    // Inodes are counted, so more than that may be made in the seconds between two counts.
    let many = "mkdir -p many; i=0; while [ $i -lt 100 ]; do i=$((i + 1)); : >many/$1-$i || exit 1; done";
    let refused = async |round: u32| story.exec("in-small", &format!("set -- {round}; {many}")).await.is_err();
    let mut round = 0;
    while !refused(round).await {
        round += 1;
        ensure!(round < 300, "{round}00 files fit into a limit of 2,000");
    }
    story.exec("in-small", "rm -r many").await?;
    Ok("a session's limit holds for it alone and is raised under a running pod")
}

async fn by_claim(story: &Story) -> Result<&'static str> {
    story.apply(&story.sample("claim.yaml")?.replace("10Gi", "32Mi")).await?;
    story.pod("classy", "scratch", Some(story.first_node())).await?;
    ensure!(fill(story, "classy", 64).await? == "Disk quota exceeded", "64 MiB fit into a claim of 32 MiB");
    let wider = r#"{"spec": {"resources": {"requests": {"storage": "256Mi"}}}}"#;
    story.kubectl(&["patch", "pvc", "scratch", "--type=merge", "--patch", wider]).await?;
    story
        .until("scratch", "has the size it asks for", limit(150), |claim: &PersistentVolumeClaim| {
            let capacity = claim.status.as_ref().and_then(|status| status.capacity.as_ref()?.get("storage"));
            capacity.is_some_and(|size| size.0 == "256Mi")
        })
        .await?;
    fits(story, "classy", 64).await?;
    Ok("a claim's by the claim, through the kubelet")
}

async fn in_memory(story: &Story) -> Result<&'static str> {
    story.apply(&session(story, "quick", &json!({"medium": "Memory", "limits": {"bytes": "64Mi"}}))?).await?;
    story.pod("in-quick", "quick", Some(story.first_node())).await?;
    fits(story, "in-quick", 16).await?;
    story.exec("in-quick", "echo parent >mark").await?;
    story.aether(&["fork", "quick", "quicker"]).await?;
    story.pod("in-quicker", "quicker", Some(story.first_node())).await?;
    let seen = story.exec("in-quicker", "cat mark; stat -c %s big; git status --porcelain | wc -l").await?;
    ensure!(seen.lines().eq(["parent", "16777216", "2"]), "the fork in memory shows {seen:?}");
    for pod in ["in-quick", "in-quicker"] {
        ensure!(fill(story, pod, 128).await? == "Disk quota exceeded", "{pod}: 128 MiB fit into 64 MiB of memory");
    }
    Ok("a session in memory forks and has its limit as well")
}

/// The README's session under this name, with more in its spec.
fn session(story: &Story, name: &str, more: &serde_json::Value) -> Result<String> {
    let mut session: serde_json::Value = serde_yaml::from_str(&story.session_manifest(name))?;
    for (field, value) in more.as_object().into_iter().flatten() {
        session["spec"][field] = value.clone();
    }
    Ok(session.to_string())
}

/// Writes so many MiB; why that did not go, or nothing.
async fn fill(story: &Story, pod: &str, mebibytes: u32) -> Result<String> {
    Ok(story.exec(pod, &format!("{FILL}; fill {mebibytes} big || true")).await?.trim().to_owned())
}

async fn fits(story: &Story, pod: &str, mebibytes: u32) -> Result<()> {
    let refused = fill(story, pod, mebibytes).await?;
    ensure!(refused.is_empty(), "{mebibytes} MiB do not fit: {refused}");
    Ok(())
}
