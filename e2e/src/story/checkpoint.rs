//! Checkpoints while edits go on, and the diff of a session.

use std::time::Instant;

use aether_api::{AetherCheckpoint, session::Durability};
use anyhow::{Context, Result, ensure};

use super::{Story, limit, say};

/// `Local` at once, `Durable` soon after, and a writer that never stops.
pub(super) async fn checkpoint_and_diff(story: &Story) -> Result<String> {
    story.agent("check", "scribe").await?;
    // One of each thing that git shows in a way of its own.
    story
        .exec(
            "scribe",
            r#"
            set -eu
            echo 'an edited line' >>README.md
            git mv CHANGELOG.md HISTORY.md 2>/dev/null || mv CHANGELOG.md HISTORY.md
            chmod +x code-of-conduct.md
            printf '\000\001\002binary\377' >picture.bin
            ln -s README.md link
            rm SUPPORT.md
            mkdir -p scratch
            nohup sh -c 'i=0; while [ ! -e stop ]; do i=$((i+1)); echo $i >>scratch/log; echo $i >scratch/file-$((i % 100)); done' >/dev/null 2>&1 &
            "#,
        )
        .await?;
    let begun = Instant::now();
    story.aether(&["checkpoint", "check", "--name", "check-1", "-m", "first stop", "--wait", "local"]).await?;
    let command = begun.elapsed();
    let durable: AetherCheckpoint = story
        .until("check-1", "is durable", limit(60), |checkpoint: &AetherCheckpoint| {
            checkpoint.status.as_ref().is_some_and(|status| status.durability == Some(Durability::Durable))
        })
        .await?;
    // The times in the status have whole seconds.
    let stored = begun.elapsed();
    let status = durable.status.clone().context("a durable checkpoint has a status")?;
    ensure!(
        status.durable_time >= status.local_time && status.local_time.is_some(),
        "durable before it was taken: {status:?}"
    );
    story.figure("checkpoint_local_ms", command.as_secs_f64() * 1000.0);
    story.figure("checkpoint_durable_ms", stored.as_secs_f64() * 1000.0);
    story.figure("checkpoint_frozen_ms", status.frozen_microseconds.unwrap_or_default() as f64 / 1000.0);

    let went_on = story.exec("scribe", "a=$(wc -l <scratch/log); sleep 0.5; b=$(wc -l <scratch/log); touch stop; echo $a $b; [ $b -gt $a ] && echo yes").await?;
    ensure!(went_on.trim().ends_with("yes"), "the writer did not go on: {went_on}");

    let diff = story.aether(&["diff", "--checkpoint", "check-1", "--color=never"]).await?.stdout;
    for (what, shown) in [
        ("the edit", "an edited line\n"),
        ("the rename", "rename to HISTORY.md"),
        ("the new mode", "new mode 100755"),
        ("the binary file", "Binary files /dev/null and b/picture.bin differ"),
        ("the symbolic link", "new file mode 120000"),
        ("the deletion", "deleted file mode 100644"),
    ] {
        ensure!(diff.contains(shown), "the diff lacks {what} ({shown}):\n{}", super::head(&diff));
    }
    let stat = story.aether(&["diff", "check", "--stat", "--color=always"]).await?.stdout;
    ensure!(stat.contains("README.md") && stat.contains("files changed"), "no --stat: {}", super::head(&stat));
    ensure!(stat.contains("\x1b["), "no colour though it was asked for");
    say(stat.lines().last().unwrap_or_default().trim());
    Ok(format!(
        "Local after {:.0} ms (pod frozen {:.1} ms), Durable after {:.0} ms, the writer never stopped",
        command.as_secs_f64() * 1000.0,
        status.frozen_microseconds.unwrap_or_default() as f64 / 1000.0,
        stored.as_secs_f64() * 1000.0
    ))
}
