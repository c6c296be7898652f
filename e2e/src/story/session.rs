//! A session in a pod: read, edit, create, delete, rename a directory, and what git says of it.

use anyhow::{Result, ensure};

use super::measure::median;
use super::{Story, say};

/// Apply, bind, mount, work.
pub(super) async fn work_in_a_session(story: &Story) -> Result<String> {
    story.source().await?;
    let bound = story.session("work").await?;
    let ready = story.pod("agent", "work", Some(story.first_node())).await?;
    say(&format!("claim bound after {bound:.0} ms, pod running after {ready:.0} ms"));

    let report = story
        .exec(
            "agent",
            r#"
            set -eu
            [ "$(id -u)" = 1000 ]
            [ "$(stat -c %u:%g README.md)" = 1000:1000 ]
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
    let tracked: i64 = super::value(&report, "tracked")?;
    let (in_repository, _) = story.tracked().await?;
    ensure!(tracked == in_repository, "the pod sees {tracked} tracked files, the repository has {in_repository}");
    ensure!(report.contains("2 files changed"), "git diff does not show the edit and the deletion: {report}");
    let (first, again) = git_status(story).await?;
    Ok(format!(
        "{tracked} files, edits seen by git; git status {first:.0} ms in a new session, {again:.0} ms again (medians of 5)"
    ))
}

/// The first `git status` in new sessions, and the second. In a pod that mounts five, by the pod's own clock, around the
/// program alone: neither `kubectl exec` nor anything of the mount is in it. Nothing has looked into those sessions before;
/// the node has had their base mounted.
async fn git_status(story: &Story) -> Result<(f64, f64)> {
    let names: Vec<String> = (1..=5).map(|i| format!("fresh-{i}")).collect();
    for name in &names {
        story.session(name).await?;
    }
    story.pod_of_many("fresh", &names).await?;
    let report = story
        .exec(
            "fresh",
            r#"
            # bash's own clock in microseconds; `date` would be one more process in what is timed.
            now() { t=${EPOCHREALTIME/[.,]/}; }
            # So that git's own pages are in memory: only the session is new.
            git version >/dev/null
            for session in /sessions/*; do
                cd $session
                now; began=$t; status=$(git status --porcelain); now; first=$((t - began))
                [ -z "$status" ] || { echo "$session is not clean: $status" >&2; exit 1; }
                now; began=$t; status=$(git status --porcelain); now
                echo "$first $((t - began))"
            done
            "#,
        )
        .await?;
    story.delete_pod("fresh").await?;
    let (mut first, mut again) = (Vec::new(), Vec::new());
    for line in report.lines() {
        let mut microseconds = line.split_whitespace().map(str::parse::<f64>);
        if let (Some(Ok(one)), Some(Ok(two))) = (microseconds.next(), microseconds.next()) {
            first.push(one / 1000.0);
            again.push(two / 1000.0);
        }
    }
    ensure!(first.len() == names.len(), "not {} times two times: {report}", names.len());
    let (first, again) = (median(&mut first), median(&mut again));
    story.figure("git_status_first_ms", first);
    story.figure("git_status_again_ms", again);
    Ok((first, again))
}
