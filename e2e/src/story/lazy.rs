//! A session on a node that never saw its source: it works before its contents are there, and whatever happens to the lazy layer
//! meanwhile.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use serde_json::json;

use super::claim_source::VolumeOnNode;
use super::{Story, limit, milliseconds, say};

/// A git repository of files that nobody has seen before. The index is such that `git status` needs no contents, as the importer of
/// a git source makes it.
const FILL: &str = "set -e; mkdir -p /data/tree/files; cd /data/tree
    for i in $(seq -w 1 80); do head -c 500000 /dev/urandom >files/$i; done; sha256sum files/* >SUMS
    find . -type f -exec touch -d '1 hour ago' {} +
    export HOME=/tmp; git init -q -b main; git config core.checkStat minimal; git config core.trustctime false
    git config user.name agent; git config user.email agent@example.org; git add .; git commit -qm one
    chown -R 1000:1000 .";
/// Reads every file and compares it, slowly, so that there is time for something to happen; from the end, since the background
/// begins at the beginning.
const READ_ALL: &str = "cd /workspace; for file in $(ls -r files); do \
    grep \"files/$file\" SUMS | sha256sum --check --quiet || echo $file >>/tmp/wrong; echo $file >>/tmp/read; sleep 0.1; done \
    >>/tmp/wrong 2>&1; touch /tmp/done";

/// Mounted at once, read right while the server of the layer is killed and its pod replaced, complete in the end.
pub(super) async fn work_before_contents_are_here(story: &Story) -> Result<String> {
    if story.parts(Some("lazy")).await?.is_empty() {
        let why = "the lazy layer is not installed (chart value lazy.enabled), so contents come before the first mount";
        story.leave_out("lazy_pod_ready_ms, lazy_git_status_ms, lazy_complete_ms", why.into());
        return Ok("left out".into());
    }
    let volume = VolumeOnNode::create(story, "unseen").await?;
    let told = play(story).await;
    let removed = volume.remove(story).await;
    let told = told?;
    removed.map(|()| told)
}

async fn play(story: &Story) -> Result<String> {
    story.exec("filler", FILL).await?;
    let source = json!({
        "apiVersion": "aether.dev/v1alpha1", "kind": "AetherSource", "metadata": {"name": "unseen"},
        "spec": {"claim": {"claimName": "unseen", "path": "tree"}, "hydration": "OnDemand"},
    });
    story.apply(&source.to_string()).await?;
    story.until_source_ready("unseen").await?;
    story.session_of("early", "unseen").await?;

    let node = story.second_node().unwrap_or(story.first_node());
    let begun = Instant::now();
    let ready = story.pod("early", "early", Some(node)).await?;
    story.figure("lazy_pod_ready_ms", ready);
    let incomplete = incomplete(story, node).await?;
    // Only the harness's cluster is known to have a limit on the bandwidth of the background.
    ensure!(incomplete > 0 || story.site().cluster().is_err(), "all contents are here: nothing is shown");
    say(&format!("pod ready after {ready:.0} ms on {node}; trees that are not complete there: {incomplete}"));

    story.exec("early", &format!("nohup sh -c '{}' >/dev/null 2>&1 &", READ_ALL.replace('\'', r"'\''"))).await?;
    let status = story
        .exec(
            "early",
            "t=${EPOCHREALTIME/[.,]/}; git status --porcelain; echo took=$((${EPOCHREALTIME/[.,]/} - t)); git log -1 --format=%s",
        )
        .await?;
    let lines: Vec<&str> = status.lines().collect();
    ensure!(lines.len() == 2 && lines[1] == "one", "git does not find a clean working copy: {status}");
    let git: f64 = super::value(&status, "took")?;
    story.figure("lazy_git_status_ms", git / 1000.0);

    for _ in 0..3 {
        story.kill_lazy_server(node).await?;
        let read = files_read(story).await?;
        story
            .poll("files are read after the server was killed", limit(30), async || {
                ensure!(files_read(story).await? > read + 3, "the reader stands still");
                Ok(())
            })
            .await?;
    }
    // The pod itself: it ends when nobody needs it any more, and another takes its place.
    let lazy = story.lazy_on(node).await?;
    story.system_kubectl(&["delete", "pod", &lazy.name_any(), "--timeout=180s"]).await?;
    story
        .poll("another pod of the lazy layer is ready", limit(120), async || {
            ensure!(story.lazy_on(node).await?.uid() != lazy.uid(), "it is the same pod");
            story.parts_ready().await
        })
        .await?;

    story
        .poll("all files were read", limit(120), async || {
            story.exec("early", "cat /tmp/done && wc -l </tmp/read").await
        })
        .await?;
    let wrong = story.exec("early", "cat /tmp/wrong").await?;
    ensure!(wrong.trim().is_empty(), "reads failed: {wrong}");
    let files = files_read(story).await?;
    ensure!(files == 80, "{files} of 80 files were read");
    story
        .poll("all contents are here", limit(180), async || {
            ensure!(self::incomplete(story, node).await? == 0, "some are missing");
            Ok(())
        })
        .await?;
    let complete = milliseconds(begun.elapsed());
    story.figure("lazy_complete_ms", complete);
    story.exec("early", "cd /workspace && sha256sum --check --quiet SUMS && git fsck --no-progress").await?;
    story.delete_pod("early").await?;
    story.kubectl(&["delete", "aethersession", "early", "--timeout=60s"]).await?;
    Ok(format!(
        "pod ready after {ready:.0} ms, git status {:.0} ms; {files} files read right while the layer's server was killed three times and its pod replaced; all contents there after {:.1} s",
        git / 1000.0,
        complete / 1000.0
    ))
}

async fn files_read(story: &Story) -> Result<i64> {
    story.exec("early", "touch /tmp/read; wc -l </tmp/read").await?.trim().parse().context("a number of files")
}

/// How many trees the driver of a node knows whose contents are not all there.
async fn incomplete(story: &Story, node: &str) -> Result<i64> {
    const METRIC: &str = "aether_driver_incomplete_trees ";
    let driver = story.driver_on(node).await?;
    let container = driver.spec.as_ref().and_then(|spec| spec.containers.first()).context("a container")?;
    let http = container.args.iter().flatten().find_map(|argument| argument.strip_prefix("--http=0.0.0.0:"));
    let port = http.context("the driver has no argument --http=0.0.0.0:PORT")?;
    let script = format!("exec 3<>/dev/tcp/127.0.0.1/{port}; printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3");
    let told = story.system_kubectl(&["exec", &driver.name_any(), "--", "bash", "-c", &script]).await?;
    let value = told.lines().find_map(|line| line.strip_prefix(METRIC)).context("the driver does not tell")?;
    value.trim().parse().context("a number of trees")
}

impl Story {
    /// The pod of the lazy layer of a node.
    async fn lazy_on(&self, node: &str) -> Result<Pod> {
        let pods = self.parts(Some("lazy")).await?;
        let mut here = pods.into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none());
        here.find(|pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(node))
            .with_context(|| format!("no pod of the lazy layer on {node}"))
    }

    /// `kill -9` of the process that answers readers; the one that holds the connection to the kernel starts another.
    async fn kill_lazy_server(&self, node: &str) -> Result<()> {
        let driver = self.driver_on(node).await?.name_any();
        let script = r#"for p in /proc/[0-9]*; do tr '\0' ' ' <$p/cmdline 2>/dev/null | grep -q '^[^ ]*aether-lazy serve ' && kill -9 ${p#/proc/} && echo killed; done; true"#;
        let told = self.system_kubectl(&["exec", &driver, "--", "bash", "-c", script]).await?;
        ensure!(told.contains("killed"), "no server of the lazy layer runs on {node}");
        Ok(())
    }
}
