//! `kill -9` of our own parts under a pod that writes.

use anyhow::{Context, Result, ensure};

use super::{Story, limit};
use crate::testing::SYSTEM_NAMESPACE;

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
    for part in ["aether-csi-driver", "aether-operator", "aether-store-node"] {
        let (rounds, restarts) = (rounds(story).await?, story.restarts().await?);
        story.kill_part(part).await?;
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
    story.pod("another", "steady", Some("node-1")).await?;
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
    /// `kill -9` of a program of ours on node 1, from the driver's pod, which shares the node's process ids.
    pub async fn kill_part(&self, program: &str) -> Result<()> {
        // The kernel keeps 15 characters of a program's name.
        let short: String = program.chars().take(15).collect();
        for driver in self.driver_pods().await? {
            let script = format!(
                "for p in /proc/[0-9]*; do [ \"$(cat $p/comm 2>/dev/null)\" = '{short}' ] && echo ${{p#/proc/}}; done; true"
            );
            let pids = self.kubectl(&["-n", SYSTEM_NAMESPACE, "exec", &driver, "--", "sh", "-c", &script]).await?;
            let Some(pid) = pids.lines().next() else { continue };
            // The exec may end with the driver's own container.
            let _ = self.kubectl(&["-n", SYSTEM_NAMESPACE, "exec", &driver, "--", "kill", "-9", pid]).await;
            return Ok(());
        }
        anyhow::bail!("{program} runs on no node")
    }
}
