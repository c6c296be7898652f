//! Checkpoints, restores and commands against an API server in memory.

mod common;

use std::sync::Arc;

use aether_api::conditions::{self, COMPLETE, FAILED, reason};
use aether_api::session::Durability;
use aether_api::{
    AetherCheckpoint, AetherCheckpointSpec, AetherCheckpointStatus, AetherCommand, AetherCommandSpec,
    AetherCommandStatus, AetherRestore, AetherRestoreSpec, AetherSession, names,
};
use common::{NAMESPACE, Operator, short};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use serde_json::json;

async fn prepared() -> Operator {
    let operator = Operator::new();
    operator.put_source("linux");
    operator.bound_session("fix", "linux").await;
    operator.set_head("fix", "bb/2");
    operator
}

fn put_checkpoint(operator: &Operator, name: &str) {
    let mut checkpoint =
        AetherCheckpoint::new(name, AetherCheckpointSpec { session: "fix".into(), ..Default::default() });
    checkpoint.metadata.namespace = Some(NAMESPACE.into());
    operator.api.put(&checkpoint);
}

async fn checkpoint(operator: &Operator, name: &str) -> AetherCheckpoint {
    let seen: AetherCheckpoint = operator.api.get(NAMESPACE, name).unwrap();
    aether_operator::checkpoint::reconcile(Arc::new(seen), operator.context.clone()).await.unwrap();
    operator.api.get(NAMESPACE, name).unwrap()
}

async fn restore(operator: &Operator) -> AetherRestore {
    let seen: AetherRestore = operator.api.get(NAMESPACE, "back").unwrap();
    aether_operator::restore::reconcile(Arc::new(seen), operator.context.clone()).await.unwrap();
    operator.api.get(NAMESPACE, "back").unwrap()
}

async fn command(operator: &Operator) -> AetherCommandStatus {
    let seen: AetherCommand = operator.api.get(NAMESPACE, "build").unwrap();
    aether_operator::command::reconcile(Arc::new(seen), operator.context.clone()).await.unwrap();
    operator.api.get::<AetherCommand>(NAMESPACE, "build").and_then(|command| command.status).unwrap_or_default()
}

fn put_command(operator: &Operator, change: impl FnOnce(&mut AetherCommandSpec)) {
    let mut spec = AetherCommandSpec { session: "fix".into(), command: vec!["make".into()], ..Default::default() };
    change(&mut spec);
    let mut command = AetherCommand::new("build", spec);
    command.metadata.namespace = Some(NAMESPACE.into());
    operator.api.put(&command);
}

fn pod_ends(operator: &Operator, exit_code: i32) {
    operator.api.change::<Pod>(NAMESPACE, "build", |pod| {
        let status = json!({"phase": "Failed", "containerStatuses": [{"name": "command", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": exit_code, "finishedAt": "2026-01-01T00:00:09Z"}}}]});
        pod.status = Some(serde_json::from_value(status).unwrap());
    });
}

#[tokio::test]
async fn a_checkpoint_of_a_session_that_nobody_holds_is_one_write() {
    let operator = prepared().await;
    put_checkpoint(&operator, "before");
    let taken = checkpoint(&operator, "before").await;
    assert_eq!(short(&operator.api.take_writes()), ["PATCH aethercheckpoints/status"]);
    let status = taken.status.unwrap();
    assert_eq!((status.root.as_deref(), status.durability), (Some("bb/2"), Some(Durability::Durable)));
    assert_eq!(status.base.unwrap().revision_root.as_deref(), Some("aa/1"));
    checkpoint(&operator, "before").await;
    assert!(operator.api.take_writes().is_empty());
}

#[tokio::test]
async fn a_held_session_and_a_missing_one() {
    let operator = prepared().await;
    operator.attach("fix", Some("n1"));
    put_checkpoint(&operator, "before");
    assert_eq!(checkpoint(&operator, "before").await.status, None, "the node takes it");
    operator.age::<AetherCheckpoint>("before");
    let status = checkpoint(&operator, "before").await.status.unwrap();
    assert_eq!(status.conditions[0].reason, reason::WAITING_FOR_NODE);
    operator.api.remove::<AetherSession>(NAMESPACE, "fix");
    let status = checkpoint(&operator, "before").await.status.unwrap();
    assert!(conditions::is_true(&status.conditions, FAILED));
}

#[tokio::test]
async fn a_restore_moves_the_head_once_after_a_safety_checkpoint() {
    let operator = prepared().await;
    put_checkpoint(&operator, "before");
    checkpoint(&operator, "before").await;
    operator.set_head("fix", "cc/3");
    let mut wanted = AetherRestore::new(
        "back",
        AetherRestoreSpec { session: "fix".into(), checkpoint: "before".into(), ttl_seconds_after_finished: None },
    );
    wanted.metadata.namespace = Some(NAMESPACE.into());
    operator.api.put(&wanted);
    operator.api.take_writes();
    assert_eq!(restore(&operator).await.status.unwrap().phase.as_deref(), Some("Running"));
    let safety = checkpoint(&operator, "back-safety").await.status.unwrap();
    assert_eq!(safety.root.as_deref(), Some("cc/3"), "the way back");
    let done = restore(&operator).await.status.unwrap();
    assert_eq!((done.phase.as_deref(), done.root.as_deref()), (Some("Succeeded"), Some("bb/2")));
    assert!(conditions::is_true(&done.conditions, COMPLETE));
    let session: AetherSession = operator.api.get(NAMESPACE, "fix").unwrap();
    assert_eq!(session.head_root(), Some("bb/2"));
    let expected = [
        "POST aethercheckpoints",
        "PATCH aetherrestores/status",
        "PATCH aethercheckpoints/status",
        "PATCH aethersessions/status",
        "PATCH aetherrestores/status",
    ];
    assert_eq!(short(&operator.api.take_writes()), expected);
    operator.set_head("fix", "dd/4");
    restore(&operator).await;
    assert!(operator.api.take_writes().is_empty(), "once means once");
}

#[tokio::test]
async fn a_restore_of_a_held_session_is_left_to_its_node() {
    let operator = prepared().await;
    put_checkpoint(&operator, "before");
    checkpoint(&operator, "before").await;
    operator.attach("fix", Some("n1"));
    let mut wanted = AetherRestore::new(
        "back",
        AetherRestoreSpec { session: "fix".into(), checkpoint: "before".into(), ttl_seconds_after_finished: None },
    );
    wanted.metadata.namespace = Some(NAMESPACE.into());
    operator.api.put(&wanted);
    operator.api.take_writes();
    restore(&operator).await;
    assert!(operator.api.take_writes().is_empty());
}

#[tokio::test]
async fn a_command_runs_once_and_its_exit_code_is_told() {
    let operator = prepared().await;
    put_command(&operator, |spec| spec.checkpoint_after = true);
    let status = command(&operator).await;
    assert_eq!(
        short(&operator.api.take_writes()),
        ["PATCH aethercommands/status", "POST pods"],
        "named before it is made"
    );
    assert_eq!((status.phase.as_deref(), status.pod_name.as_deref()), (Some("Pending"), Some("build")));
    command(&operator).await;
    assert!(operator.api.take_writes().is_empty());
    operator.api.change::<Pod>(NAMESPACE, "build", |pod| {
        let status = json!({"phase": "Running", "containerStatuses": [{"name": "command", "image": "", "imageID": "", "ready": true, "restartCount": 0,
            "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}]});
        pod.status = Some(serde_json::from_value(status).unwrap());
    });
    assert_eq!(command(&operator).await.phase.as_deref(), Some("Running"));
    pod_ends(&operator, 3);
    let status = command(&operator).await;
    assert_eq!((status.phase.as_deref(), status.exit_code), (Some("Failed"), Some(3)));
    assert!(status.started.is_some() && status.finished.is_some());
    assert_eq!(status.checkpoint.as_deref(), Some("build"));
    assert_eq!(operator.api.get::<AetherCheckpoint>(NAMESPACE, "build").unwrap().spec.session, "fix");
    operator.api.take_writes();
    operator.api.remove::<Pod>(NAMESPACE, "build");
    command(&operator).await;
    assert!(operator.api.take_writes().is_empty(), "it has run, and its pod is not made again");
}

#[tokio::test]
async fn a_command_of_an_earlier_ones_name_takes_a_checkpoint_of_its_own() {
    let operator = prepared().await;
    for round in 1..=2 {
        put_command(&operator, |spec| spec.checkpoint_after = true);
        command(&operator).await;
        pod_ends(&operator, 0);
        let taken = command(&operator).await.checkpoint.unwrap();
        assert_eq!(taken == "build", round == 1, "{taken}");
        assert_eq!(operator.api.all::<AetherCheckpoint>().len(), round);
        operator.api.remove::<AetherCommand>(NAMESPACE, "build");
        operator.api.remove::<Pod>(NAMESPACE, "build");
    }
}

#[tokio::test]
async fn only_automatic_checkpoints_of_this_very_session_are_pruned() {
    let operator = prepared().await;
    let uid = operator.api.get::<AetherSession>(NAMESPACE, "fix").unwrap().uid().unwrap();
    for (name, of) in [("a-old", "another"), ("b-old", &uid), ("c-new", &uid)] {
        let mut checkpoint =
            AetherCheckpoint::new(name, AetherCheckpointSpec { session: "fix".into(), ..Default::default() });
        checkpoint.metadata.namespace = Some(NAMESPACE.into());
        checkpoint.labels_mut().insert(names::ORIGIN_LABEL.into(), names::ORIGIN_AUTOMATIC.into());
        checkpoint.labels_mut().insert(names::SESSION_UID_LABEL.into(), of.into());
        operator.api.put(&checkpoint);
        let status = AetherCheckpointStatus { durability: Some(Durability::Durable), ..Default::default() };
        operator.api.change::<AetherCheckpoint>(NAMESPACE, name, |checkpoint| checkpoint.status = Some(status));
    }
    let left = || operator.api.all::<AetherCheckpoint>().iter().map(ResourceExt::name_any).collect::<Vec<_>>();
    checkpoint(&operator, "c-new").await;
    assert_eq!(left(), ["a-old", "b-old", "c-new"], "no more are asked for, which takes away none");
    operator.api.change::<AetherSession>(NAMESPACE, "fix", |session| {
        session.spec.checkpoints = Some(serde_json::from_value(json!({"interval": "1m", "keep": 1})).unwrap());
    });
    checkpoint(&operator, "c-new").await;
    assert_eq!(left(), ["a-old", "c-new"]);
}

#[tokio::test]
async fn a_deleted_pod_fails_its_command_for_good() {
    let operator = prepared().await;
    put_command(&operator, |_| {});
    command(&operator).await;
    operator.api.remove::<Pod>(NAMESPACE, "build");
    let status = command(&operator).await;
    let failed = conditions::get(&status.conditions, FAILED).unwrap();
    assert_eq!((failed.reason.as_str(), status.exit_code), (reason::POD_FAILED, None));
    command(&operator).await;
    assert!(operator.api.all::<Pod>().is_empty());
}

#[tokio::test]
async fn a_command_of_a_missing_session_fails_after_a_moments_grace() {
    let operator = Operator::new();
    put_command(&operator, |_| {});
    assert_eq!(command(&operator).await, AetherCommandStatus::default());
    operator.age::<AetherCommand>("build");
    let status = command(&operator).await;
    assert_eq!(conditions::get(&status.conditions, FAILED).unwrap().reason, reason::SESSION_NOT_FOUND);
    assert!(operator.api.all::<Pod>().is_empty());
}

#[tokio::test]
async fn a_pod_of_somebody_else_is_not_taken_for_the_commands() {
    let operator = prepared().await;
    let mut foreign = Pod::default();
    foreign.metadata.name = Some("build".into());
    foreign.metadata.namespace = Some(NAMESPACE.into());
    operator.api.put(&foreign);
    put_command(&operator, |_| {});
    let status = command(&operator).await;
    assert_eq!(conditions::get(&status.conditions, FAILED).unwrap().reason, reason::NAME_TAKEN);
}

#[tokio::test]
async fn a_finished_command_goes_when_its_time_is_over() {
    let operator = prepared().await;
    put_command(&operator, |spec| spec.ttl_seconds_after_finished = Some(60));
    command(&operator).await;
    pod_ends(&operator, 0);
    // The pod says that it ended long ago, so the time is over as soon as that is noted.
    command(&operator).await;
    let writes = short(&operator.api.take_writes());
    assert_eq!(writes[writes.len() - 2..], ["PATCH aethercommands/status", "DELETE aethercommands"]);
    assert!(operator.api.get::<AetherCommand>(NAMESPACE, "build").is_none());
}
