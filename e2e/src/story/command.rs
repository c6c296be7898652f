//! Commands in worker pods: output, exit codes, time limits.

use anyhow::{Result, ensure};

use super::Story;

/// `kubectl aether run` behaves as the command itself would.
pub(super) async fn run_commands(story: &Story) -> Result<String> {
    story.source().await?;
    story.session("tasks").await?;
    let good = story
        .aether_code(&[
            "run",
            "tasks",
            "--",
            "sh",
            "-c",
            "git rev-parse --is-inside-work-tree; echo left by a command >from-command",
        ])
        .await?;
    ensure!(good.code == 0 && good.stdout.trim() == "true", "a good command: {good:?}");

    let seen = story.aether_code(&["run", "tasks", "--", "cat", "from-command"]).await?;
    ensure!(
        seen.code == 0 && seen.stdout.trim() == "left by a command",
        "the next command does not see the last one's file: {seen:?}"
    );

    let bad = story.aether_code(&["run", "tasks", "--", "sh", "-c", "echo one; echo two; exit 3"]).await?;
    ensure!(bad.code == 3 && bad.stdout == "one\ntwo\n", "a failing command: {bad:?}");

    let slow =
        story.aether_code(&["run", "tasks", "--timeout", "1s", "--", "sh", "-c", "echo begun; sleep 600"]).await?;
    ensure!(slow.code == 124 && slow.stdout.contains("begun"), "a timed-out command: {slow:?}");

    let missing = story.aether_code(&["run", "tasks", "--", "no-such-program"]).await?;
    ensure!(missing.code == 127, "a command that does not exist: {missing:?}");
    Ok(format!("exit codes 0, 3, 124 and 127 as in a shell; one run takes {:.1} s", seen.took.as_secs_f64()))
}
