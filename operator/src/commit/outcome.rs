//! What a Job and its pod say about a commit. Pure.

use aether_api::AetherCommit;
use aether_api::commit::AetherCommitStatus;
use aether_api::conditions::reason;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use serde::Deserialize;

use super::job::CONTAINER;
use crate::pod;

/// How far a commit is.
#[derive(Debug, PartialEq)]
pub(super) enum Outcome {
    /// It is on its way; the text says what is in the way, if anything is.
    Running(Option<String>),
    /// It is done.
    Done(Done),
    /// It is not.
    Failed(Failure),
}

/// What was done.
#[derive(Debug, Deserialize, PartialEq)]
#[serde(untagged)]
pub(super) enum Done {
    Pushed {
        commit: String,
        #[serde(default)]
        warnings: Vec<String>,
    },
    Exported {
        place: String,
        files: u64,
        bytes: u64,
        #[serde(default)]
        found: bool,
        #[serde(default)]
        warnings: Vec<String>,
    },
}

impl Done {
    /// Writes it down, and says it.
    pub(super) fn tell(self, commit: &AetherCommit, status: &mut AetherCommitStatus) -> String {
        match self {
            Self::Pushed { commit: id, warnings } => {
                let branch = commit.spec.target.git.as_ref().map_or("", |git| &git.branch);
                let message = format!("commit {id} is on branch {branch}");
                (status.commit, status.warnings) = (Some(id), warnings);
                message
            }
            Self::Exported { place, files, bytes, found, warnings } => {
                let earlier = if found { ", where an earlier run had put them" } else { "" };
                let message = format!("{files} files, {bytes} bytes are at {place}{earlier}");
                (status.place, status.warnings) = (Some(place), warnings);
                message
            }
        }
    }
}

/// Why nothing was.
#[derive(Debug, PartialEq)]
pub(super) struct Failure {
    pub reason: String,
    pub message: String,
    pub conflicts: Vec<String>,
    /// Whether the same may succeed later.
    pub temporary: bool,
}

/// The committer's last words.
#[derive(Deserialize)]
struct Report {
    ok: bool,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    conflicts: Vec<String>,
    #[serde(flatten)]
    rest: serde_json::Value,
}

/// The reasons that a committer may give; any other word becomes `CommitFailed`.
const REASONS: [&str; 13] = [
    reason::REPOSITORY_NOT_FOUND,
    reason::AUTHENTICATION_FAILED,
    reason::SECRET_INVALID,
    reason::INVALID,
    reason::BASE_NOT_FOUND,
    reason::BRANCH_MOVED,
    reason::CONFLICT,
    reason::NOTHING_TO_COMMIT,
    reason::PUSH_REJECTED,
    reason::TARGET_EXISTS,
    reason::BUCKET_NOT_FOUND,
    reason::TREE_INCOMPLETE,
    reason::COMMIT_FAILED,
];

/// Reads the Job and its newest pod, which must be known to be genuine.
pub(super) fn outcome(job: &Job, pod: Option<&Pod>) -> Outcome {
    if let Some(end) = pod.and_then(|pod| pod::terminated(pod, CONTAINER)) {
        let words = end.message.as_deref().unwrap_or_default().trim();
        return report(words).unwrap_or_else(|| {
            let why = end.reason.as_deref().unwrap_or("Error");
            temporary(format!("the commit ended with exit code {} ({why}): {words}", end.exit_code))
        });
    }
    let conditions = job.status.as_ref().and_then(|status| status.conditions.as_ref());
    let is_end = |type_: &str| ["Failed", "Complete"].contains(&type_);
    let ended = conditions.and_then(|all| all.iter().find(|one| is_end(&one.type_) && one.status == "True"));
    if let Some(ended) = ended {
        let why = pod.and_then(pod::is_lost);
        let why = why.or_else(|| ended.message.clone()).or_else(|| ended.reason.clone()).unwrap_or_default();
        return temporary(format!("its Job ended without a result: {why}"));
    }
    Outcome::Running(pod.and_then(pod::trouble))
}

/// What may have been done or not, and is found out by doing it again: the committer finds what was done before.
pub(super) fn temporary(message: String) -> Outcome {
    let reason = reason::COMMIT_FAILED.into();
    Outcome::Failed(Failure { reason, message, conflicts: Vec::new(), temporary: true })
}

/// The committer's own report; `None` when the words are not one.
fn report(words: &str) -> Option<Outcome> {
    let report: Report = serde_json::from_str(words).ok()?;
    if report.ok {
        return serde_json::from_value(report.rest).ok().map(Outcome::Done);
    }
    let known = REASONS.contains(&report.reason.as_str());
    Some(Outcome::Failed(Failure {
        reason: if known { report.reason } else { reason::COMMIT_FAILED.into() },
        message: report.message,
        conflicts: report.conflicts,
        temporary: report.kind == "Temporary",
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(message: &str) -> Outcome {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p"}, "status": {"containerStatuses": [{
            "name": CONTAINER, "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": 1, "reason": "Error", "message": message}}}]}}))
        .unwrap();
        outcome(&Job::default(), Some(&pod))
    }

    #[test]
    fn the_last_words_say_what_was_done_or_why_not() {
        let done = Done::Pushed { commit: "c1".into(), warnings: vec!["w".into()] };
        assert_eq!(
            of(r#"{"ok":true,"commit":"c1","tree":"t","warnings":["w"],"milliseconds":3}"#),
            Outcome::Done(done)
        );
        let words = r#"{"ok":false,"reason":"Conflict","kind":"Permanent","message":"no","conflicts":["a"]}"#;
        assert!(
            matches!(of(words), Outcome::Failed(f) if !f.temporary && f.reason == reason::CONFLICT && f.conflicts == ["a"])
        );
        let Outcome::Done(done) = of(
            r#"{"ok":true,"root":"aa/1","place":"results/one","found":true,"files":6,"written":0,"bytes":9,"milliseconds":3}"#,
        ) else {
            panic!("not done")
        };
        let (commit, mut status) = (AetherCommit::new("c", Default::default()), AetherCommitStatus::default());
        let said = done.tell(&commit, &mut status);
        assert_eq!(said, "6 files, 9 bytes are at results/one, where an earlier run had put them");
        assert_eq!(status.place.as_deref(), Some("results/one"));
        let words = r#"{"ok":false,"reason":"TargetExists","kind":"Permanent","message":"no"}"#;
        assert!(matches!(of(words), Outcome::Failed(f) if !f.temporary && f.reason == reason::TARGET_EXISTS));
        let words = r#"{"ok":false,"reason":"Sulking","kind":"Temporary","message":"no"}"#;
        assert!(matches!(of(words), Outcome::Failed(f) if f.temporary && f.reason == reason::COMMIT_FAILED));
        // A result without a commit or a place is none.
        assert!(matches!(of(r#"{"ok":true}"#), Outcome::Failed(f) if f.temporary));
        assert!(matches!(of("Killed"), Outcome::Failed(f) if f.temporary && f.message.contains("Killed")));
    }
}
