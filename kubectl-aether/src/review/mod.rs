//! What people do about commits: ask for one, look, remark, decide. What counts is decided by the operator alone; these
//! commands write what the person says, and show what it said.

pub(crate) mod commit;
pub(crate) mod compare;
pub(crate) mod decide;
pub(crate) mod history;
pub(crate) mod note;
pub(crate) mod show;
pub(crate) mod waiting;

use aether_api::commit::{CommitPhase, History, Target};
use aether_api::{AetherCheckpoint, AetherCommit, AetherNoteSpec, names};
use anyhow::Result;

use crate::cluster::{Cluster, explain};

/// Who the cluster takes the caller for, however they logged in. API servers before 1.28 do not say, but Aether's own part of the
/// API does; `None` where nobody says.
async fn me(cluster: &Cluster) -> Result<Option<String>> {
    const OF_KUBERNETES: &str = "authentication.k8s.io/v1";
    let ours = format!("{}/{}", names::REVIEW_GROUP, names::VERSION);
    for group in [OF_KUBERNETES, &ours] {
        let question = serde_json::json!({"kind": "SelfSubjectReview", "apiVersion": group});
        let request = http::Request::post(format!("/apis/{group}/selfsubjectreviews"))
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(question.to_string().into_bytes())?;
        match cluster.client.request::<serde_json::Value>(request).await {
            Ok(review) => return Ok(review["status"]["userInfo"]["username"].as_str().map(Into::into)),
            // 503 is what an API server says whose part of the API is not there.
            Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404 | 503) => {}
            Err(error) => return Err(explain(error, "ask the cluster who you are")),
        }
    }
    Ok(None)
}

/// The session that a commit is of, as far as it is known.
fn session_of(commit: &AetherCommit) -> Option<&str> {
    commit.status.as_ref().and_then(|status| status.session.as_deref()).or(commit.spec.session.as_deref())
}

/// The tree that a commit shows.
fn root_of(commit: &AetherCommit) -> Option<&str> {
    commit.status.as_ref().and_then(|status| status.root.as_deref())
}

/// Who asked for a commit.
fn requester(commit: &AetherCommit) -> Option<&str> {
    commit.spec.requested_by.as_ref().map(|by| by.username.as_str())
}

/// How far a commit is.
pub(crate) fn phase(commit: &AetherCommit) -> &'static str {
    match commit.status.as_ref().and_then(|status| status.phase) {
        None | Some(CommitPhase::Pending) => "Pending",
        Some(CommitPhase::AwaitingApproval) => "AwaitingApproval",
        Some(CommitPhase::Rejected) => "Rejected",
        Some(CommitPhase::Running) => "Running",
        Some(CommitPhase::Succeeded) => "Succeeded",
        Some(CommitPhase::Failed) => "Failed",
    }
}

/// Whether a decision on it can still change anything.
fn undecided(commit: &AetherCommit) -> bool {
    let phase = commit.status.as_ref().and_then(|status| status.phase);
    !commit.finished() && !matches!(phase, Some(CommitPhase::Running | CommitPhase::Succeeded | CommitPhase::Failed))
}

/// Where a commit goes, in words.
pub(crate) fn target(target: &Target) -> String {
    if let Some(git) = &target.git {
        let rebased = if git.rebase { " (rebased)" } else { "" };
        let kept = if git.history == History::Keep { " (with the session's own commits)" } else { "" };
        return format!("branch {}{rebased}{kept}", git.branch);
    }
    if target.promote.is_some() {
        return "new revision".into();
    }
    match &target.export {
        Some(export) => match &export.path {
            Some(path) => format!("place {}:{path}", export.to),
            None => format!("place {}", export.to),
        },
        None => "nowhere".into(),
    }
}

/// `path:from-to` of a note.
pub(crate) fn place(note: &AetherNoteSpec) -> String {
    match &note.lines {
        None => note.path.clone(),
        Some(lines) => format!("{}:{}", note.path, range(lines.from, lines.to)),
    }
}

/// `12-14`, or `12` of one line.
fn range(from: u32, to: u32) -> String {
    if from == to { from.to_string() } else { format!("{from}-{to}") }
}

/// The session of a note's checkpoint.
fn session_of_checkpoint<'a>(checkpoint: &str, checkpoints: &'a [AetherCheckpoint]) -> Option<&'a str> {
    checkpoints
        .iter()
        .find(|other| other.metadata.name.as_deref() == Some(checkpoint))
        .map(|checkpoint| checkpoint.spec.session.as_str())
}

/// As much of a tree's name as a person compares.
fn short(root: &str) -> String {
    root.chars().take(12).collect()
}

#[cfg(test)]
mod tests {
    use aether_api::commit::{ExportTarget, GitTarget, PromoteTarget};
    use aether_api::note::Lines;

    use super::*;

    #[test]
    fn targets_and_places_in_words() {
        let git = GitTarget { branch: "main".into(), rebase: true, ..Default::default() };
        assert_eq!(target(&Target { git: Some(git), ..Default::default() }), "branch main (rebased)");
        let git = GitTarget { branch: "main".into(), history: History::Keep, ..Default::default() };
        let said = target(&Target { git: Some(git), ..Default::default() });
        assert_eq!(said, "branch main (with the session's own commits)");
        assert_eq!(target(&Target { promote: Some(PromoteTarget {}), ..Default::default() }), "new revision");
        let export = |path: Option<&str>| {
            let export = ExportTarget { to: "results".into(), path: path.map(Into::into) };
            target(&Target { export: Some(export), ..Default::default() })
        };
        assert_eq!((export(None), export(Some("a/b"))), ("place results".into(), "place results:a/b".into()));
        let mut note = AetherNoteSpec { path: "a".into(), ..Default::default() };
        assert_eq!(place(&note), "a");
        note.lines = Some(Lines { from: 3, to: 3 });
        assert_eq!(place(&note), "a:3");
        note.lines = Some(Lines { from: 3, to: 4 });
        assert_eq!(place(&note), "a:3-4");
    }
}
