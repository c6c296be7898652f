//! Commits and their approvals against an API server in memory, with the webhook in between as the API server has it.

#[path = "../common/mod.rs"]
mod common;
mod exports;
mod world;

use std::sync::Arc;

use aether_api::approval::Decision;
use aether_api::commit::{CommitPhase, PromoteTarget, Target};
use aether_api::review::{Check, ReviewRule};
use aether_api::{
    AetherApproval, AetherCheckpoint, AetherCheckpointSpec, AetherCommand, AetherCommandSpec, AetherCommit,
    AetherSession, AetherSource, names,
};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use serde_json::{Value, json};

use common::{NAMESPACE, short};
use world::{World, approval, arguments, git, pushed, two, user};

#[tokio::test]
async fn a_commit_waits_for_two_people_and_is_pushed_once() {
    let world = World::new(two()).await;
    let name = world.commit(|_| {}).await;
    assert!(name.starts_with("fix-") && name.len() == 9, "{name}");
    let status = world.settled(&name).await;
    assert_eq!((status.phase, status.root.as_deref()), (Some(CommitPhase::AwaitingApproval), Some("bb/2")));
    assert_eq!(status.base.as_ref().unwrap().commit.as_deref(), Some("c0ffee"));
    assert_eq!(status.makers, ["agent", "system:serviceaccount:aether-system:aether-operator"]);
    assert!(status.unknown_makers.is_empty(), "{:?}", status.unknown_makers);
    let approvals = status.approvals.unwrap();
    assert_eq!((approvals.have, approvals.need, &approvals.missing[..]), (0, 2, &["2 more approvals".to_owned()][..]));

    let jane = world.say("jane", &name, "bb/2", Decision::Approve).await.unwrap();
    assert_eq!(jane, names::approval_name(&name, "jane"));
    let status = world.reconcile(&name).await;
    assert_eq!(status.approvals.unwrap().by, ["jane"]);
    assert!(world.verdict(&jane).counts && world.jobs().is_empty());
    world.operator.api.take_writes();
    world.reconcile(&name).await;
    let writes = world.operator.api.take_writes();
    assert!(short(&writes).iter().all(|write| write == "POST subjectaccessreviews"), "{writes:?}");

    world.say("joe", &name, "bb/2", Decision::Approve).await.unwrap();
    assert_eq!(world.reconcile(&name).await.phase, Some(CommitPhase::Running));
    assert!(world.jobs().is_empty(), "who approved is written down first");
    world.reconcile(&name).await;
    world.reconcile(&name).await;
    let jobs = world.jobs();
    assert_eq!(jobs.len(), 1);
    let arguments = arguments(&jobs[0]).join(" ");
    for part in [
        "--base-commit c0ffee --base-root aa/1 --root bb/2 --commit-uid ",
        "--trailer=Approved-by=jane --trailer=Approved-by=joe",
        "--trailer=Requested-by=agent",
        "--trailer=Aether-Session=agents/fix",
        "--message=costs $$1 --author-name=agent --author-email=agent@users.aether.invalid",
    ] {
        assert!(arguments.contains(part), "{part}: {arguments}");
    }
    world.pod(|_| {}, &pushed());
    let status = world.reconcile(&name).await;
    assert_eq!((status.phase, status.commit.as_deref()), (Some(CommitPhase::Succeeded), Some("f00d")));
    assert_eq!(status.warnings, ["1 empty folder"]);
    world.operator.api.take_writes();
    world.reconcile(&name).await;
    assert!(world.operator.api.take_writes().is_empty());
}

#[tokio::test]
async fn nobody_speaks_in_anothers_name_or_without_the_right() {
    let world = World::new(ReviewRule::default()).await;
    let name = world.commit(|spec| spec.requested_by = Some(user("jane"))).await;
    let commit: AetherCommit = world.operator.api.get(NAMESPACE, &name).unwrap();
    assert_eq!(commit.spec.requested_by.unwrap().username, "agent", "what was sent is replaced");
    let early = world.say("jane", &name, "bb/2", Decision::Approve).await.unwrap_err();
    assert!(early.contains("not ready to be reviewed"), "{early}");
    world.settled(&name).await;
    let refused = world.say("outsider", &name, "bb/2", Decision::Approve).await.unwrap_err();
    assert!(refused.contains("outsider") && refused.contains("verb approve"), "{refused}");
    let mut forged = approval(&name, "bb/2", Decision::Approve);
    forged.spec.reviewer = Some(user("jane"));
    assert!(world.create("agent", &forged).await.unwrap_err().contains("agent may not decide"));
    forged.metadata.name = Some(names::approval_name(&name, "jane"));
    assert!(world.create("joe", &forged).await.unwrap_err().contains("one voice"));
    forged.metadata.name = None;
    let by_joe = world.create("joe", &forged).await.unwrap();
    let there: AetherApproval = world.operator.api.get(NAMESPACE, &by_joe).unwrap();
    assert_eq!(there.spec.reviewer.as_ref().unwrap().username, "joe");
    // The right is asked for again when it counts.
    world.operator.api.set_right("joe", "approve", "aethersources", NAMESPACE, "linux", false);
    let status = world.reconcile(&name).await;
    assert_eq!(status.phase, Some(CommitPhase::AwaitingApproval));
    assert!(world.verdict(&by_joe).reason.unwrap().contains("may not approve"));
}

#[tokio::test]
async fn what_was_written_while_the_webhook_was_away_does_not_count() {
    let world = World::new(ReviewRule::default()).await;
    let name = world.commit(|_| {}).await;
    world.settled(&name).await;
    let put = |approval: &AetherApproval| world.operator.api.put(approval);
    // Nobody stamped it.
    let mut forged = approval(&name, "bb/2", Decision::Approve);
    forged.metadata.name = Some(names::approval_name(&name, "jane"));
    forged.spec.reviewer = Some(user("jane"));
    put(&forged);
    assert_eq!(world.reconcile(&name).await.phase, Some(CommitPhase::AwaitingApproval));
    assert!(world.verdict(&forged.name_any()).reason.unwrap().contains("not signed"));
    // A genuine one whose tree somebody changed.
    let joe = world.say("joe", &name, "cc/3", Decision::Approve).await.unwrap();
    let status = world.reconcile(&name).await;
    assert_eq!(status.approvals.unwrap().stale, std::slice::from_ref(&joe));
    world.operator.api.change::<AetherApproval>(NAMESPACE, &joe, |approval| approval.spec.root = "bb/2".into());
    assert_eq!(world.reconcile(&name).await.phase, Some(CommitPhase::AwaitingApproval));
    assert!(world.verdict(&joe).reason.unwrap().contains("not what the operator signed"));
    // One that was withdrawn, and is put back by somebody who kept a copy.
    world.operator.api.remove::<AetherApproval>(NAMESPACE, &joe);
    let joe = world.say("joe", &name, "bb/2", Decision::Approve).await.unwrap();
    world.operator.api.change::<AetherApproval>(NAMESPACE, &joe, |approval| {
        let later = jiff::Timestamp::now() + jiff::SignedDuration::from_mins(10);
        approval.metadata.creation_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(later));
    });
    assert_eq!(world.reconcile(&name).await.phase, Some(CommitPhase::AwaitingApproval));
    assert!(world.verdict(&joe).reason.unwrap().contains("copy"));
    assert!(world.jobs().is_empty());
    // And a commit that was changed after it was asked for.
    world.operator.api.remove::<AetherApproval>(NAMESPACE, &joe);
    world.say("joe", &name, "bb/2", Decision::Approve).await.unwrap();
    let target = |branch: &str| {
        world.operator.api.change::<AetherCommit>(NAMESPACE, &name, |commit| commit.spec.target = git(branch));
    };
    target("main");
    assert_eq!(world.reconcile(&name).await.phase, Some(CommitPhase::Pending));
    target("agents/fix");
    assert_eq!(world.reconcile(&name).await.phase, Some(CommitPhase::Running));
    target("main");
    assert_eq!(world.reconcile(&name).await.phase, Some(CommitPhase::Pending), "also after it was released");
    assert!(world.jobs().is_empty());
}

#[tokio::test]
async fn makers_do_not_approve_their_own_work_and_a_rejection_blocks_until_withdrawn() {
    let world = World::new(ReviewRule::default()).await;
    world.operator.api.set_right("agent", "approve", "aethersources", NAMESPACE, "linux", true);
    let name = world.commit(|_| {}).await;
    world.settled(&name).await;
    let own = world.say("agent", &name, "bb/2", Decision::Approve).await.unwrap();
    assert_eq!(world.reconcile(&name).await.phase, Some(CommitPhase::AwaitingApproval));
    assert!(world.verdict(&own).reason.unwrap().contains("own work"));
    let no = world.say("joe", &name, "bb/2", Decision::Reject).await.unwrap();
    world.say("jane", &name, "bb/2", Decision::Approve).await.unwrap();
    let status = world.reconcile(&name).await;
    assert_eq!(
        (status.phase, &status.approvals.unwrap().rejected[..]),
        (Some(CommitPhase::Rejected), &["joe".to_owned()][..])
    );
    world.withdraw("joe", &no).await;
    assert_eq!(world.reconcile(&name).await.phase, Some(CommitPhase::Running));
}

#[tokio::test]
async fn the_maker_of_a_session_that_nobody_stamped_is_not_known() {
    let world = World::new(ReviewRule::default()).await;
    world.operator.api.change::<AetherSession>(NAMESPACE, "fix", |session| {
        // As if the session were joe's.
        let text = session.annotations()[names::CREATOR_ANNOTATION].replace("agent", "joe");
        session.annotations_mut().insert(names::CREATOR_ANNOTATION.into(), text);
    });
    let name = world.commit(|_| {}).await;
    let status = world.settled(&name).await;
    assert!(status.unknown_makers[0].contains("AetherSession fix"), "{:?}", status.unknown_makers);
    let jane = world.say("jane", &name, "bb/2", Decision::Approve).await.unwrap();
    assert_eq!(world.reconcile(&name).await.phase, Some(CommitPhase::AwaitingApproval));
    assert!(world.verdict(&jane).reason.unwrap().contains("one's own work"));
}

#[tokio::test]
async fn two_operators_make_one_job_and_only_what_was_asked_for_is_believed() {
    let world = World::new(ReviewRule { required: 0, ..ReviewRule::default() }).await;
    let name = world.commit(|_| {}).await;
    world.settled(&name).await;
    assert_eq!(world.reconcile(&name).await.phase, Some(CommitPhase::Running));
    // Another operator made the Job and was killed before it wrote that down.
    let before: AetherCommit = world.operator.api.get(NAMESPACE, &name).unwrap();
    world.reconcile(&name).await;
    world.operator.api.change::<AetherCommit>(NAMESPACE, &name, |commit| commit.status = before.status.clone());
    world.reconcile(&name).await;
    assert_eq!(world.jobs().len(), 1);
    // Somebody's pod under the Job's label, with another program.
    world.pod(|pod| pod.spec.as_mut().unwrap().containers[0].image = Some("mine".into()), &pushed());
    let status = world.reconcile(&name).await;
    assert_eq!((status.phase, &status.commit), (Some(CommitPhase::Running), &None));
    // The real one could not reach the server: another Job, later.
    let away = json!({"ok": false, "reason": "RepositoryNotFound", "kind": "Temporary", "message": "no answer"});
    world.pod(|_| {}, &away);
    let status = world.reconcile(&name).await;
    assert_eq!((status.phase, status.retries, &status.job), (Some(CommitPhase::Running), Some(1), &None));
    let first = world.jobs()[0].name_any();
    // Meanwhile somebody thinks better of it.
    let no = world.say("joe", &name, "bb/2", Decision::Reject).await.unwrap();
    world.operator.api.change::<AetherCommit>(NAMESPACE, &name, |commit| {
        commit.status.as_mut().unwrap().retry_at = Some(common::now());
    });
    assert_eq!(world.reconcile(&name).await.phase, Some(CommitPhase::Rejected));
    world.reconcile(&name).await;
    assert_eq!(world.jobs().len(), 1);
    world.withdraw("joe", &no).await;
    assert_eq!(world.reconcile(&name).await.phase, Some(CommitPhase::Running));
    world.reconcile(&name).await;
    let second = world.jobs().into_iter().find(|job| job.name_any() != first).expect("another Job");
    world.operator.api.remove::<Job>(NAMESPACE, &first);
    assert_eq!(world.jobs(), [second]);
    let conflict =
        json!({"ok": false, "reason": "Conflict", "kind": "Permanent", "message": "no", "conflicts": ["a", "b"]});
    world.pod(|_| {}, &conflict);
    let status = world.reconcile(&name).await;
    assert_eq!((status.phase, &status.conflicts[..]), (Some(CommitPhase::Failed), &["a".to_owned(), "b".into()][..]));
}

#[tokio::test]
async fn a_check_must_have_passed_on_the_same_tree() {
    let checks = vec![Check { name: "tests".into(), command: Some(vec!["make".into()]), ..Check::default() }];
    let world = World::new(ReviewRule { checks, required: 0, ..ReviewRule::default() }).await;
    let name = world.commit(|_| {}).await;
    let status = world.settled(&name).await;
    assert!(status.approvals.unwrap().missing[0].contains("check tests"));
    let spec = AetherCommandSpec {
        session: "fix".into(),
        command: vec!["make".into()],
        checkpoint_after: true,
        ..Default::default()
    };
    let mut command = AetherCommand::new("tests", spec);
    command.metadata.namespace = Some(NAMESPACE.into());
    world.create("agent", &command).await.unwrap();
    world.operator.api.change::<AetherSession>(NAMESPACE, "fix", |session| {
        let ready = aether_api::conditions::Wanted::yes("Ready", "Ready", "");
        aether_api::conditions::set(&mut session.status.as_mut().unwrap().conditions, ready, None);
    });
    let run = async || {
        let seen: AetherCommand = world.operator.api.get(NAMESPACE, "tests").unwrap();
        aether_operator::command::reconcile(Arc::new(seen), world.operator.context.clone()).await.unwrap();
    };
    run().await;
    world.operator.api.change::<Pod>(NAMESPACE, "tests", |pod| {
        let status = json!({"phase": "Succeeded", "containerStatuses": [{"name": "command", "image": "", "imageID": "",
            "ready": false, "restartCount": 0, "state": {"terminated": {"exitCode": 0}}}]});
        pod.status = Some(serde_json::from_value(status).unwrap());
    });
    run().await;
    assert_eq!(world.reconcile(&name).await.phase, Some(CommitPhase::AwaitingApproval), "its tree is not known yet");
    world.checkpoint("tests").await;
    assert_eq!(world.reconcile(&name).await.phase, Some(CommitPhase::Running));
}

#[tokio::test]
async fn a_promoted_tree_is_one_revision_that_the_next_import_leaves_alone() {
    let world = World::new(ReviewRule { required: 0, ..ReviewRule::default() }).await;
    let name = world.commit(|spec| spec.target = Target { promote: Some(PromoteTarget {}), ..Target::default() }).await;
    world.settled(&name).await;
    let before: AetherCommit = world.operator.api.get(NAMESPACE, &name).unwrap();
    world.reconcile(&name).await;
    // Again, as if the first had been killed before it wrote down what it did.
    world.operator.api.change::<AetherCommit>(NAMESPACE, &name, |commit| commit.status = before.status.clone());
    let status = world.reconcile(&name).await;
    assert_eq!((status.phase, status.revision.as_deref()), (Some(CommitPhase::Succeeded), Some("r2")));
    let source: AetherSource = world.operator.api.get(NAMESPACE, "linux").unwrap();
    let about = source.status.unwrap();
    assert_eq!((about.latest.as_deref(), about.revisions.len()), (Some("r2"), 2));
    assert_eq!(about.revisions[0].root, "bb/2");
    assert!(about.revisions[0].promoted.as_ref().unwrap().contains(&name));
}

/// Like [`World::new`], where the source has moved on to another revision and keeps no more than that.
async fn moved_on() -> World {
    let world = World::new(ReviewRule { required: 0, ..ReviewRule::default() }).await;
    world.operator.api.change::<AetherSource>(NAMESPACE, "linux", |source| {
        source.spec.revisions_to_keep = 1;
        let revision = &mut source.status.as_mut().unwrap().revisions[0];
        (revision.name, revision.root, revision.commit) = ("r2".into(), "cc/3".into(), Some("5eed".into()));
    });
    world
}

#[tokio::test]
async fn a_session_knows_the_git_commit_that_it_started_from_longer_than_the_source() {
    let world = moved_on().await;
    let name = world.commit(|_| {}).await;
    let status = world.settled(&name).await;
    assert_eq!(status.base.unwrap().commit.as_deref(), Some("c0ffee"));
    world.reconcile(&name).await;
    world.reconcile(&name).await;
    assert!(arguments(&world.jobs()[0]).join(" ").contains("--base-commit c0ffee --base-root aa/1"));
    world.operator.api.remove::<Job>(NAMESPACE, &world.jobs()[0].name_any());

    // So do its checkpoints, and what is made of them and of it.
    for (fork, origin) in [
        ("of-checkpoint", json!({"checkpoint": name, "claim": "None"})),
        ("of-session", json!({"session": "fix", "claim": "None"})),
    ] {
        let mut session = AetherSession::new(fork, serde_json::from_value(origin).unwrap());
        session.metadata.namespace = Some(NAMESPACE.into());
        world.create("agent", &session).await.unwrap();
        world.operator.session(fork).await;
        let made: AetherSession = world.operator.api.get(NAMESPACE, fork).unwrap();
        assert_eq!(made.status.unwrap().base.unwrap().commit.as_deref(), Some("c0ffee"), "{fork}");
    }
}

#[tokio::test]
async fn a_session_that_does_not_know_its_git_commit_has_it_of_the_source_as_long_as_that_does() {
    let older = |world: &World| {
        world.operator.api.change::<AetherSession>(NAMESPACE, "fix", |session| {
            session.status.as_mut().unwrap().base.as_mut().unwrap().commit = None;
        });
    };
    let world = World::new(ReviewRule { required: 0, ..ReviewRule::default() }).await;
    older(&world);
    let name = world.commit(|_| {}).await;
    assert_eq!(world.settled(&name).await.base.unwrap().commit.as_deref(), Some("c0ffee"));
    let world = moved_on().await;
    older(&world);
    let name = world.commit(|_| {}).await;
    let status = world.settled(&name).await;
    assert_eq!((status.phase, status.base.unwrap().commit), (Some(CommitPhase::Failed), None));
    let said = &status.conditions.iter().find(|condition| condition.type_ == "Failed").unwrap().message;
    assert!(said.contains("r1") && said.contains("promote"), "{said}");
}

#[tokio::test]
async fn a_checkpoint_that_a_commit_waits_with_stays() {
    let world = World::new(ReviewRule::default()).await;
    let spec = AetherCheckpointSpec { session: "fix".into(), ..Default::default() };
    let mut checkpoint = AetherCheckpoint::new("kept", spec);
    checkpoint.metadata.namespace = Some(NAMESPACE.into());
    checkpoint.spec.deletion_policy = aether_api::checkpoint::DeletionPolicy::WithSession;
    world.create("agent", &checkpoint).await.unwrap();
    world.checkpoint("kept").await;
    let name = world
        .commit(|spec| {
            spec.session = None;
            spec.checkpoint = Some("kept".into());
        })
        .await;
    assert_eq!(world.reconcile(&name).await.root.as_deref(), Some("bb/2"));
    world.operator.api.remove::<AetherSession>(NAMESPACE, "fix");
    aether_operator::sweep::sweep(&world.operator.context).await.unwrap();
    assert!(world.operator.api.get::<AetherCheckpoint>(NAMESPACE, "kept").is_some());
    world.operator.api.remove::<AetherCommit>(NAMESPACE, &name);
    aether_operator::sweep::sweep(&world.operator.context).await.unwrap();
    assert!(world.operator.api.get::<AetherCheckpoint>(NAMESPACE, "kept").is_none());
}

#[tokio::test]
async fn specs_cannot_be_changed_and_what_was_stamped_stays() {
    let world = World::new(ReviewRule::default()).await;
    let name = world.commit(|_| {}).await;
    let commit: AetherCommit = world.operator.api.get(NAMESPACE, &name).unwrap();
    let old = serde_json::to_value(&commit).unwrap();
    let mut applied = commit.clone();
    (applied.spec.requested_by, applied.spec.signature) = (None, None);
    let stored = world.ask("jane", "UPDATE", &applied, old.clone()).await.unwrap();
    assert_eq!(stored["spec"], old["spec"]);
    applied.spec.requested_by = Some(user("jane"));
    assert_eq!(world.ask("jane", "UPDATE", &applied, old.clone()).await.unwrap()["spec"], old["spec"]);
    applied.spec.target = git("main");
    assert!(world.ask("agent", "UPDATE", &applied, old).await.unwrap_err().contains("cannot be changed"));

    let spec = serde_json::from_value(json!({"checkpoint": "c", "path": "a", "text": "why?"})).unwrap();
    let mut note = aether_api::AetherNote::new("n", spec);
    note.metadata.namespace = Some(NAMESPACE.into());
    let stamped = world.ask("jane", "CREATE", &note, Value::Null).await.unwrap();
    assert_eq!(stamped["spec"]["author"]["username"], "jane");
    note.spec.resolved = true;
    let resolved = world.ask("joe", "UPDATE", &note, stamped.clone()).await.unwrap();
    assert_eq!(
        (&resolved["spec"]["author"], &resolved["spec"]["resolved"]),
        (&stamped["spec"]["author"], &json!(true))
    );
    note.spec.text = "I said something else".into();
    assert!(world.ask("joe", "UPDATE", &note, stamped).await.unwrap_err().contains("only resolved"));
}
