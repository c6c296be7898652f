//! What a pod says about the command it runs. Pure.

use aether_api::conditions::{COMPLETE, FAILED, Wanted, reason};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::build::{CONTAINER, INSTALLER};
use crate::pod;

/// The exit code of a command that ran into its time limit, as timeout(1) has it.
const TIMED_OUT: i32 = 124;

/// How far the command is.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Not begun; the text says what is in the way, if anything is.
    Pending(Option<String>),
    /// It runs since then.
    Running(Option<Time>),
    /// It ended.
    Ended(Ended),
}

/// How the command ended.
#[derive(Debug)]
pub(super) struct Ended {
    /// Its exit code, if it ever ran.
    pub exit_code: Option<i32>,
    /// When it began.
    pub started: Option<Time>,
    /// When it ended; absent when nobody saw it end.
    pub finished: Option<Time>,
    /// `Complete` or `Failed`.
    pub condition: Wanted,
}

/// Reads the pod. `None` for a pod that was there and is gone.
pub(super) fn outcome(pod: Option<&Pod>, has_timeout: bool) -> Outcome {
    let Some(pod) = pod else {
        return Outcome::Ended(lost("its pod was deleted before the command ended, or never made; it is not run again, because it may have run: make another AetherCommand".into()));
    };
    if let Some(end) = pod::terminated(pod, CONTAINER) {
        let condition = match end.exit_code {
            0 => Wanted::yes(COMPLETE, reason::DONE, "the command ended with exit code 0"),
            TIMED_OUT if has_timeout => Wanted::yes(FAILED, reason::TIMED_OUT, "the command ran into its time limit"),
            // What Kubernetes says of a program that could not be started at all.
            code if end.reason.as_deref() == Some("ContainerCannotRun")
                || end.reason.as_deref() == Some("StartError") =>
            {
                let message = end.message.as_deref().unwrap_or("no details");
                Wanted::yes(
                    FAILED,
                    reason::POD_FAILED,
                    format!("the container could not be started (exit code {code}): {message}"),
                )
            }
            code if end.reason.as_deref() == Some("OOMKilled") => Wanted::yes(
                FAILED,
                reason::EXITED,
                format!(
                    "the command was killed for want of memory (exit code {code}): raise spec.resources.limits.memory"
                ),
            ),
            code => Wanted::yes(FAILED, reason::EXITED, format!("the command ended with exit code {code}")),
        };
        let ended = Ended {
            exit_code: Some(end.exit_code),
            started: end.started_at.clone(),
            finished: end.finished_at.clone(),
            condition,
        };
        return Outcome::Ended(ended);
    }
    if let Some(end) = pod::terminated(pod, INSTALLER).filter(|end| end.exit_code != 0) {
        let message = end.message.as_deref().unwrap_or("no details");
        return Outcome::Ended(lost(format!(
            "container {INSTALLER} ended with exit code {}: {message}",
            end.exit_code
        )));
    }
    if let Some(why) = pod::is_lost(pod) {
        return Outcome::Ended(lost(why));
    }
    if pod::is_running(pod, CONTAINER) {
        let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
        let state = statuses.and_then(|all| all.iter().find(|status| status.name == CONTAINER)?.state.as_ref());
        return Outcome::Running(state.and_then(|state| state.running.as_ref()?.started_at.clone()));
    }
    Outcome::Pending(pod::trouble(pod))
}

fn lost(message: String) -> Ended {
    Ended {
        exit_code: None,
        started: None,
        finished: None,
        condition: Wanted::yes(FAILED, reason::POD_FAILED, message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(status: Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "build"}, "status": status})).unwrap()
    }

    fn ended(status: Value, has_timeout: bool) -> Ended {
        match outcome(Some(&pod(status)), has_timeout) {
            Outcome::Ended(ended) => ended,
            other => panic!("{other:?}"),
        }
    }

    fn exit(code: i32, why: &str) -> Value {
        json!({"phase": "Failed", "containerStatuses": [{"name": "command", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": code, "reason": why, "startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T00:00:09Z"}}}]})
    }

    #[test]
    fn exit_codes_are_as_in_a_shell() {
        let done = ended(exit(0, "Completed"), true);
        assert_eq!((done.exit_code, done.condition.type_), (Some(0), COMPLETE));
        let failed = ended(exit(3, "Error"), false);
        assert_eq!((failed.exit_code, failed.condition.reason.as_str()), (Some(3), reason::EXITED));
        assert_eq!(ended(exit(124, "Error"), true).condition.reason, reason::TIMED_OUT);
        assert_eq!(
            ended(exit(124, "Error"), false).condition.reason,
            reason::EXITED,
            "without a limit 124 is the command's own"
        );
        assert!(ended(exit(137, "OOMKilled"), false).condition.message.contains("memory"));
    }

    #[test]
    fn a_pod_that_was_killed_or_deleted_is_not_the_commands_fault() {
        let evicted =
            ended(json!({"phase": "Failed", "reason": "Evicted", "message": "the node was low on memory"}), false);
        assert_eq!((evicted.exit_code, evicted.condition.reason.as_str()), (None, reason::POD_FAILED));
        assert!(evicted.condition.message.contains("low on memory"));
        assert!(matches!(outcome(None, false), Outcome::Ended(ended) if ended.condition.reason == reason::POD_FAILED));
    }

    #[test]
    fn what_keeps_it_from_starting_is_told() {
        let waiting = json!({"phase": "Pending", "containerStatuses": [{"name": "command", "image": "nosuch:1", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}}]});
        assert!(
            matches!(outcome(Some(&pod(waiting)), false), Outcome::Pending(Some(message)) if message.contains("nosuch:1"))
        );
        let unschedulable = json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes"}]});
        assert!(
            matches!(outcome(Some(&pod(unschedulable)), false), Outcome::Pending(Some(message)) if message.contains("0/2 nodes"))
        );
        let usual = json!({"phase": "Pending", "containerStatuses": [{"name": "command", "image": "x", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"waiting": {"reason": "PodInitializing"}}}]});
        assert!(matches!(outcome(Some(&pod(usual)), false), Outcome::Pending(None)));
    }
}
