//! `kill -9` of our own parts under a pod that writes.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;

use super::{Story, limit};

/// A driver, an operator and a store node that are killed are not noticed by a running pod, and come back.
pub(super) async fn kill_our_parts(story: &Story) -> Result<String> {
    story.agent("steady", "looper").await?;
    story
        .exec(
            "looper",
            r#"
            nohup sh -c 'i=0; while [ ! -e /tmp/end ]; do i=$((i+1)); { echo $i >loop-$i && [ "$(cat loop-$i)" = $i ] && head -c 100 README.md >/dev/null && rm loop-$i; } || echo "error at $i" >>/tmp/errors; echo $i >>/tmp/rounds; done' >/tmp/log 2>&1 &
            "#,
        )
        .await?;
    for (part, program) in
        [("driver", "aether-csi-driver"), ("operator", "aether-operator"), ("store", "aether-store-node")]
    {
        let (rounds, restarts) = (rounds(story).await?, story.restarts().await?);
        story.kill_part(part, program).await?;
        story
            .poll(&format!("the writer goes on after {part} was killed"), limit(30), async || {
                ensure!(self::rounds(story).await? > rounds + 20, "it stands still");
                Ok(())
            })
            .await?;
        story
            .poll(&format!("{part} is back"), limit(120), async || {
                // The kubelet may not have noticed yet.
                ensure!(story.restarts().await? > restarts, "nothing was started again");
                story.parts_ready().await
            })
            .await?;
    }
    // Back and serving: a checkpoint needs all three.
    story.aether(&["checkpoint", "steady", "--name", "steady-1", "--wait", "durable"]).await?;
    story.pod("another", "steady", Some(story.first_node())).await?;
    let end =
        story.exec("looper", "touch /tmp/end; wc -l </tmp/rounds; cat /tmp/errors 2>/dev/null || echo none").await?;
    ensure!(end.trim().ends_with("none"), "the pod saw errors: {end}");
    Ok(format!(
        "{} rounds of write, read and delete, no error; all parts serve again",
        end.lines().next().unwrap_or_default()
    ))
}

async fn rounds(story: &Story) -> Result<i64> {
    story.exec("looper", "wc -l </tmp/rounds").await?.trim().parse().context("the writer has not begun")
}

impl Story {
    /// The driver's pod of a node.
    pub(super) async fn driver_on(&self, node: &str) -> Result<Pod> {
        let drivers = self.parts(Some("driver")).await?;
        let driver =
            drivers.into_iter().find(|pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(node));
        driver.with_context(|| format!("no driver runs on {node}"))
    }

    /// `kill -9` of a part's program, from the driver's pod on its node, which shares the node's process ids. The driver that is
    /// killed is that of the first node.
    pub async fn kill_part(&self, part: &str, program: &str) -> Result<()> {
        let node_of = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
        let node = match part {
            "driver" => self.first_node().to_owned(),
            _ => self.parts(Some(part)).await?.iter().find_map(node_of).with_context(|| format!("no {part} runs"))?,
        };
        let driver = self.driver_on(&node).await?.name_any();
        // The kernel keeps 15 characters of a program's name.
        let short: String = program.chars().take(15).collect();
        let script = format!(
            "for p in /proc/[0-9]*; do [ \"$(cat $p/comm 2>/dev/null)\" = '{short}' ] && echo ${{p#/proc/}}; done; true"
        );
        let pids = self.system_kubectl(&["exec", &driver, "--", "sh", "-c", &script]).await?;
        let pid = pids.lines().next().with_context(|| format!("{program} does not run on {node}"))?;
        // The exec may end with the driver's own container.
        let _ = self.system_kubectl(&["exec", &driver, "--", "kill", "-9", pid]).await;
        Ok(())
    }
}
