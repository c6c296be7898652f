//! What a Job and its pod say about an import. Pure.

use aether_api::conditions::reason;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use serde::Deserialize;

use super::job::CONTAINER;
use crate::pod;

/// How far an import is.
#[derive(Debug, PartialEq)]
pub(super) enum Outcome {
    /// Its pod has not begun; the text says what is in the way, if anything is.
    Starting(Option<String>),
    /// It runs; its log says how far it is.
    Running,
    /// It succeeded.
    Imported(Imported),
    /// The ref still means the commit of the newest revision, or the bucket's listing is its, so nothing was imported.
    Unchanged,
    /// It failed.
    Failed { reason: String, message: String },
}

/// What was imported.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub(super) struct Imported {
    pub root: String,
    pub files: i64,
    pub bytes: i64,
    #[serde(default)]
    pub commit: Option<String>,
    #[serde(default)]
    pub listing: Option<String>,
    #[serde(default)]
    pub milliseconds: i64,
}

/// A line of the importer's log.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub(super) struct Progress {
    pub phase: String,
    #[serde(default)]
    pub files: i64,
    #[serde(default)]
    pub bytes: i64,
}

/// The importer's last words.
#[derive(Deserialize)]
struct Report {
    ok: bool,
    #[serde(default)]
    unchanged: bool,
    #[serde(default)]
    reason: Option<String>,
    #[serde(default)]
    message: Option<String>,
    #[serde(flatten)]
    rest: serde_json::Value,
}

/// The reasons that an importer may give; any other word becomes `ImportFailed`.
const REASONS: [&str; 7] = [
    reason::REPOSITORY_NOT_FOUND,
    reason::BUCKET_NOT_FOUND,
    reason::REF_NOT_FOUND,
    reason::AUTHENTICATION_FAILED,
    reason::SECRET_INVALID,
    reason::INVALID,
    reason::IMPORT_FAILED,
];

/// Reads the Job and its newest pod, which must be known to be genuine.
pub(super) fn outcome(job: Option<&Job>, pod: Option<&Pod>) -> Outcome {
    let Some(job) = job else { return failed("its Job was deleted before the import ended".into()) };
    if let Some(end) = pod.and_then(|pod| pod::terminated(pod, CONTAINER)) {
        let words = end.message.as_deref().unwrap_or_default().trim();
        return report(words).unwrap_or_else(|| {
            let why = end.reason.as_deref().unwrap_or("Error");
            failed(match words {
                "" => format!("the import ended with exit code {} ({why}) and said nothing", end.exit_code),
                words => format!("the import ended with exit code {} ({why}): {words}", end.exit_code),
            })
        });
    }
    let conditions = job.status.as_ref().and_then(|status| status.conditions.as_ref());
    let ended = conditions.and_then(|all| {
        all.iter()
            .find(|condition| ["Failed", "Complete"].contains(&condition.type_.as_str()) && condition.status == "True")
    });
    if let Some(ended) = ended {
        if let Some(why) = pod.and_then(pod::is_lost) {
            return failed(why);
        }
        let why = ended.message.as_deref().or(ended.reason.as_deref()).unwrap_or("no details");
        return failed(format!("its Job ended without a result: {why}"));
    }
    match pod {
        Some(pod) if pod::is_running(pod, CONTAINER) => Outcome::Running,
        Some(pod) => Outcome::Starting(pod::trouble(pod)),
        None => Outcome::Starting(None),
    }
}

pub(super) fn failed(message: String) -> Outcome {
    Outcome::Failed { reason: reason::IMPORT_FAILED.into(), message }
}

/// The importer's own report; `None` when the words are not one.
fn report(words: &str) -> Option<Outcome> {
    let report: Report = serde_json::from_str(words).ok()?;
    if report.ok && report.unchanged {
        return Some(Outcome::Unchanged);
    }
    if report.ok {
        return serde_json::from_value(report.rest).ok().map(Outcome::Imported);
    }
    let message = report.message.unwrap_or_else(|| "no details".into());
    let given = report.reason.as_deref().filter(|given| REASONS.contains(given));
    Some(Outcome::Failed { reason: given.unwrap_or(reason::IMPORT_FAILED).into(), message })
}

/// The last line of a log that tells of progress.
pub(super) fn progress(log: &str) -> Option<Progress> {
    log.lines().rev().find_map(|line| serde_json::from_str(line).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn ended(exit_code: i32, message: &str) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "status": {"phase": "Failed", "containerStatuses": [{
            "name": "importer", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": exit_code, "reason": "Error", "message": message}}}]}}))
        .unwrap()
    }

    fn of(pod: &Pod) -> Outcome {
        outcome(Some(&Job::default()), Some(pod))
    }

    #[test]
    fn a_result_is_read_from_the_last_words() {
        let words = r#"{"ok":true,"root":"ab/1","files":2,"bytes":3,"commit":"c","milliseconds":4}"#;
        let imported = Imported {
            root: "ab/1".into(),
            files: 2,
            bytes: 3,
            commit: Some("c".into()),
            listing: None,
            milliseconds: 4,
        };
        assert_eq!(of(&ended(0, words)), Outcome::Imported(imported));
        let words = r#"{"ok":true,"files":0,"bytes":0,"commit":"c","milliseconds":4,"unchanged":true}"#;
        assert_eq!(of(&ended(0, words)), Outcome::Unchanged);
        let words = r#"{"ok":false,"reason":"RefNotFound","message":"no branch x"}"#;
        assert_eq!(
            of(&ended(1, words)),
            Outcome::Failed { reason: "RefNotFound".into(), message: "no branch x".into() }
        );
        let words = r#"{"ok":false,"reason":"made up","message":"m"}"#;
        assert!(matches!(of(&ended(1, words)), Outcome::Failed { reason, .. } if reason == reason::IMPORT_FAILED));
    }

    #[test]
    fn an_end_without_a_result_shows_what_was_said_last() {
        assert!(
            matches!(of(&ended(137, "out of memory")), Outcome::Failed { message, .. } if message.contains("137") && message.contains("out of memory"))
        );
        let job: Job = serde_json::from_value(json!({"metadata": {}, "status": {"conditions": [{"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "too long"}]}})).unwrap();
        assert!(matches!(outcome(Some(&job), None), Outcome::Failed { message, .. } if message.contains("too long")));
        assert!(matches!(outcome(None, None), Outcome::Failed { message, .. } if message.contains("deleted")));
        assert_eq!(outcome(Some(&Job::default()), None), Outcome::Starting(None));
    }

    #[test]
    fn progress_is_the_last_line_that_is_one() {
        let log = "{\"phase\":\"Cloning\",\"files\":1,\"bytes\":2}\n{\"phase\":\"Scanning\",\"files\":5,\"bytes\":9,\"filesTotal\":7}\nnoise\n";
        assert_eq!(progress(log), Some(Progress { phase: "Scanning".into(), files: 5, bytes: 9 }));
        assert_eq!(progress("noise"), None);
    }
}
