//! A session in a pod: read, edit, create, delete, rename a directory, and what git says of it.

use anyhow::{Result, ensure};

use super::{Story, say};

/// Apply, bind, mount, work.
pub(super) async fn work_in_a_session(story: &Story) -> Result<String> {
    story.source().await?;
    let bound = story.session("work").await?;
    let ready = story.pod("agent", "work", Some("node-1")).await?;

    let report = story
        .exec(
            "agent",
            r#"
            set -eu
            [ "$(id -u)" = 1000 ]
            [ "$(stat -c %u:%g README.md)" = 1000:1000 ]
            began=$(date +%s%N); status=$(git status --porcelain); ended=$(date +%s%N)
            [ -z "$status" ] || { echo "a fresh session is not clean: $status" >&2; exit 1; }
            echo "first_status_us=$(( (ended - began) / 1000 ))"
            echo "tracked=$(git ls-files | wc -l)"
            head -c 64 LICENSES/LICENSE >/dev/null
            echo 'an edit' >>README.md
            echo 'a new file' >NEW.md
            rm SUPPORT.md
            mv docs documentation
            echo "status_lines=$(git status --porcelain --untracked-files=all | wc -l)"
            git diff --stat -- README.md SUPPORT.md | tail -1
            "#,
        )
        .await?;
    let status: f64 = super::value(&report, "first_status_us")?;
    let tracked: i64 = super::value(&report, "tracked")?;
    let (in_repository, _) = story.tracked().await?;
    ensure!(tracked == in_repository, "the pod sees {tracked} tracked files, the repository has {in_repository}");
    ensure!(report.contains("2 files changed"), "git diff does not show the edit and the deletion: {report}");
    story.figure("git_status_first_ms", status / 1000.0);
    say(&format!("claim bound after {bound} ms, pod running after {ready} ms"));
    Ok(format!("{tracked} files, first git status {:.0} ms, edits seen by git", status / 1000.0))
}
