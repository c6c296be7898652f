//! Back to a checkpoint, with the session mounted and a process at work in it.

use aether_api::{AetherCheckpoint, AetherRestore};
use anyhow::{Context, Result, ensure};
use kube::api::ListParams;

use super::Story;

/// Restores a mounted session under a running process.
pub(super) async fn restore_in_place(story: &Story) -> Result<String> {
    story.agent("undo", "worker").await?;
    story.exec("worker", "set -e; echo good >state; mkdir -p kept/dir; echo 1 >kept/dir/one; git mv docs documents 2>/dev/null || mv docs documents").await?;
    story.aether(&["checkpoint", "undo", "--name", "good", "--wait", "durable"]).await?;
    // A process with its working directory and an open file inside, across the restore.
    story
        .exec(
            "worker",
            r#"
            set -e
            nohup sh -c 'cd kept/dir; exec 3<../../state; while [ ! -e /tmp/end ]; do sleep 0.1; done; cat <&3 >/tmp/old-contents; cat one >/tmp/relative; pwd -P >/tmp/where' >/tmp/log 2>&1 &
            sleep 0.3
            echo bad >state.new; mv state.new state
            mv kept moved; rm -rf api; echo junk >junk; chmod 600 README.md; mv documents docs
            "#,
        )
        .await?;
    let before = story.exec("worker", "cat state; ls -d api junk moved 2>&1 || true").await?;
    ensure!(before.contains("bad"), "the edits did not happen: {before}");

    story.aether(&["restore", "undo", "good", "--yes"]).await?;
    let after = story
        .exec("worker", "touch /tmp/end; set -e; cat state; ls -d api kept/dir/one documents; ls -d junk moved 2>&1 || true; stat -c %a README.md; while [ ! -s /tmp/where ]; do sleep 0.05; done; cat /tmp/old-contents /tmp/relative /tmp/where")
        .await?;
    for (what, text) in [
        ("the file's contents", "good\n"),
        ("the deleted directory", "api\n"),
        ("the moved directory", "kept/dir/one"),
        ("the mode", "644\n"),
        ("the process's directory", "/workspace/kept/dir"),
    ] {
        ensure!(after.contains(text), "{what} did not come back: {after}");
    }
    ensure!(!after.lines().any(|line| line == "junk" || line == "moved"), "what came later is still there: {after}");

    let restore = story
        .api::<AetherRestore>()
        .list(&ListParams::default())
        .await?
        .items
        .into_iter()
        .find(|restore| restore.spec.session == "undo");
    let status = restore.and_then(|restore| restore.status).context("the restore has a status")?;
    let safety = status.safety_checkpoint.context("status.safetyCheckpoint")?;
    let _: AetherCheckpoint = story.get(&safety).await?;
    let diff = story.aether(&["diff", "--checkpoint", &safety, "--name-only", "--color=never"]).await?.stdout;
    ensure!(diff.contains("junk"), "the safety checkpoint {safety} lacks what was undone: {}", super::head(&diff));
    Ok(format!(
        "{} paths changed under a running process; the way back is {safety}",
        status.changed_paths.unwrap_or_default()
    ))
}
