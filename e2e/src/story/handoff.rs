//! One writer at a time: a handoff between nodes, and takeover from a lost one.

use std::time::{Duration, Instant};

use aether_api::{AetherCheckpoint, AetherSession, names, session::Durability};
use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Event;
use kube::api::{Api, ListParams};

use super::{Story, limit, say};

/// A second writer waits and is told for whom; a reader does not wait.
pub(super) async fn hand_over(story: &Story) -> Result<String> {
    story.agent("baton", "first").await?;
    story.exec("first", "echo 'from node 1' >baton; mkdir -p deep/er; echo x >deep/er/file; rm SUPPORT.md").await?;

    let second = story.second_node()?;
    story.create_pod("second", "baton", Some(second), false).await?;
    let event = story.until_event("second", story.first_node(), limit(30)).await?;
    say(&event);
    ensure!(event.contains("baton"), "the event does not name the session: {event}");

    let begun = Instant::now();
    // By an inline volume: a kubelet mounts one claim for one pod at a time, so that on this node a reader by the claim would
    // queue behind the waiting writer.
    let mut reader: serde_json::Value = serde_yaml::from_str(&story.sample("pod.yaml")?)?;
    reader["metadata"]["name"] = "reader".into();
    reader["spec"]["affinity"] = super::on(second);
    reader["spec"]["volumes"][0] = serde_json::json!({"name": "workspace", "csi": {"driver": names::CSI_DRIVER, "readOnly": true, "volumeAttributes": {"session": "baton"}}});
    story.apply(&reader.to_string()).await?;
    story.until_pod_ready("reader", limit(60)).await?;
    let reader = begun.elapsed();
    let refused = story.exec("reader", "touch new 2>&1 || true").await?;
    ensure!(refused.contains("Read-only"), "a readOnly mount can be written: {refused}");
    ensure!(!story.pod_is_ready("second").await?, "two writers on two nodes");

    let begun = Instant::now();
    story.delete_pod("first").await?;
    story.until_pod_ready("second", limit(60)).await?;
    let took = begun.elapsed().as_secs_f64() * 1000.0;
    story.figure("handoff_ms", took);
    let found = story
        .exec("second", "cat baton deep/er/file; ls SUPPORT.md 2>&1 || true; git status --porcelain | wc -l")
        .await?;
    ensure!(
        found.contains("from node 1") && found.contains("No such file"),
        "node 2 does not find everything: {found}"
    );
    Ok(format!(
        "second writer waited with an event, reader up in {:.1} s, handoff {took:.0} ms from the deletion of the first pod",
        reader.as_secs_f64()
    ))
}

/// The network of a node is cut under a running pod; what was durable goes on elsewhere, what was not comes back.
pub(super) async fn lose_a_node(story: &Story) -> Result<String> {
    let node = story.site().cluster()?.node(story.second_node()?)?;
    story.session_on_second_node("echo unsaved >unsaved").await?;
    let epoch = attachment_epoch(story).await?;
    node.network().cut().await?;
    let taken = timed_take_over(story).await;
    node.network().heal().await?;
    let line = recovered(story, epoch, taken?, "cut").await?;
    let still = story.exec("heir", "ls; echo goes on >after").await?;
    ensure!(!still.contains("unsaved"), "the old node's changes were merged");
    Ok(line)
}

/// All processes of a node end at once; it comes back with its disk.
pub(super) async fn kill_a_node(story: &Story) -> Result<String> {
    let (cluster, name) = (story.site().cluster()?, story.second_node()?);
    story.session_on_second_node("echo unsaved >unsaved; sync unsaved").await?;
    let epoch = attachment_epoch(story).await?;
    cluster.node(name)?.kill().await?;
    let taken = timed_take_over(story).await;
    cluster.start_node(name).await?;
    recovered(story, epoch, taken?, "kill").await
}

async fn attachment_epoch(story: &Story) -> Result<i64> {
    let session: AetherSession = story.get("lost").await?;
    let attachment = session.status.and_then(|status| status.attachment).context("the session is not attached")?;
    ensure!(attachment.node.as_deref() == Some(story.second_node()?), "held by {:?}", attachment.node);
    Ok(attachment.epoch)
}

/// Waits for what the old node had unsaved, in a checkpoint of its own.
async fn recovered(story: &Story, epoch: i64, taken: Duration, since: &str) -> Result<String> {
    let recovered = names::recovered_checkpoint_name("lost", epoch);
    let checkpoint: AetherCheckpoint = story
        .until(&recovered, "is durable", limit(180), |checkpoint: &AetherCheckpoint| {
            checkpoint.status.as_ref().is_some_and(|status| status.durability == Some(Durability::Durable))
        })
        .await?;
    ensure!(checkpoint.status.and_then(|status| status.root).is_some(), "{recovered} has no tree");
    let diff = story.aether(&["diff", "--checkpoint", &recovered, "--name-only", "--color=never"]).await?.stdout;
    ensure!(diff.contains("unsaved"), "{recovered} lacks what was unsaved: {}", super::head(&diff));
    Ok(format!("taken over {:.1} s after the {since}, the unsaved rest is {recovered}", taken.as_secs_f64()))
}

async fn timed_take_over(story: &Story) -> Result<Duration> {
    let begun = Instant::now();
    take_over(story).await?;
    Ok(begun.elapsed())
}

async fn take_over(story: &Story) -> Result<()> {
    // As a person would who knows that the node is gone: the pod object is removed without its kubelet.
    story.kubectl(&["delete", "pod", "doomed", "--force", "--grace-period=0", "--wait=false"]).await?;
    story.create_pod("heir", "lost", Some(story.first_node()), false).await?;
    story.until_pod_ready("heir", limit(120)).await?;
    let seen = story.exec("heir", "cat saved; ls unsaved 2>&1 || true").await?;
    ensure!(seen.contains("saved") && seen.contains("No such file"), "not the last durable tree: {seen}");
    Ok(())
}

impl Story {
    /// A pod on the second node with a checkpointed session and changes that are not.
    async fn session_on_second_node(&self, unsaved: &str) -> Result<()> {
        self.source().await?;
        self.session("lost").await?;
        self.pod("doomed", "lost", Some(self.second_node()?)).await?;
        self.exec("doomed", "echo saved >saved").await?;
        self.aether(&["checkpoint", "lost", "--name", "lost-1", "--wait", "durable"]).await?;
        self.exec("doomed", unsaved).await.map(drop)
    }

    /// Waits for an event on a pod whose message contains `text`, and returns the message.
    pub async fn until_event(&self, pod: &str, text: &str, limit: Duration) -> Result<String> {
        let events: Api<Event> = self.api();
        let selector = ListParams::default().fields(&format!("involvedObject.name={pod}"));
        self.poll(&format!("pod {pod} has an event that says {text:?}"), limit, async || {
            let list = events.list(&selector).await?;
            let found = list
                .items
                .iter()
                .filter_map(|event| event.message.clone())
                .find(|message| message.contains(text) && message.contains("session"));
            found.with_context(|| {
                format!(
                    "its events: {:?}",
                    list.items.iter().filter_map(|event| event.message.as_deref()).collect::<Vec<_>>()
                )
            })
        })
        .await
    }
}
