//! Exports: the Job of a place, and what becomes of a commit whose place, Secret or claim is not there.

use std::sync::Arc;
use std::time::Duration;

use aether_api::approval::Decision;
use aether_api::commit::{CommitPhase, ExportTarget, Target};
use aether_api::review::ReviewRule;
use aether_api::{AetherCommit, AetherCommitSpec, AetherCommitStatus, AetherSource};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::runtime::controller::Action;
use serde_json::json;

use crate::common::{NAMESPACE, short};
use crate::world::{World, arguments};

fn places() -> ReviewRule {
    let places = json!([
        {"name": "results", "claim": {"name": "data", "path": "of/agents"}},
        {"name": "bucket", "s3": {"bucket": "b", "prefix": "p", "endpoint": "https://s3", "region": "r", "secretRef": {"name": "keys"}}},
    ]);
    ReviewRule { required: 0, exports: serde_json::from_value(places).unwrap(), ..ReviewRule::default() }
}

fn export(to: &str, path: Option<&str>) -> Target {
    let export = ExportTarget { to: to.into(), path: path.map(Into::into) };
    Target { export: Some(export), ..Target::default() }
}

#[tokio::test]
async fn an_export_to_a_claim_is_one_job_that_is_believed() {
    let world = World::new(places()).await;
    let name = world.commit(|spec| spec.target = export("results", None)).await;
    world.settled(&name).await;
    assert_eq!(world.reconcile(&name).await.phase, Some(CommitPhase::Running));
    // Two operators make one Job.
    let before: AetherCommit = world.operator.api.get(NAMESPACE, &name).unwrap();
    world.reconcile(&name).await;
    world.operator.api.change::<AetherCommit>(NAMESPACE, &name, |commit| commit.status = before.status.clone());
    world.reconcile(&name).await;
    let jobs = world.jobs();
    assert_eq!(jobs.len(), 1);
    let wanted = format!(
        "export folder --root=bb/2 --beneath=/export --path=of/agents/{name} --claim=data --store http://store"
    );
    assert_eq!(arguments(&jobs[0]).join(" "), wanted);
    let pod = serde_json::to_value(&jobs[0].spec.as_ref().unwrap().template.spec).unwrap();
    assert_eq!(pod["volumes"][1], json!({"name": "export", "persistentVolumeClaim": {"claimName": "data"}}));
    assert_eq!(pod["volumes"].as_array().unwrap().len(), 2, "{pod}");
    let container = &pod["containers"][0];
    assert_eq!(container["volumeMounts"][1], json!({"name": "export", "mountPath": "/export"}));
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
    let user = json!({"fsGroup": 65532, "fsGroupChangePolicy": "OnRootMismatch", "runAsGroup": 65532, "runAsNonRoot": true,
        "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}});
    assert_eq!(pod["securityContext"], user);

    let done = json!({"ok": true, "root": "bb/2", "place": format!("data/of/agents/{name}"), "files": 3, "written": 3,
        "bytes": 17, "warnings": ["owners"], "milliseconds": 5});
    // A pod with another claim in the place of this one.
    let elsewhere = |pod: &mut Pod| {
        let volumes = pod.spec.as_mut().unwrap().volumes.as_mut().unwrap();
        volumes[1].persistent_volume_claim.as_mut().unwrap().claim_name = "other".into();
    };
    world.pod(elsewhere, &done);
    assert_eq!(world.reconcile(&name).await.phase, Some(CommitPhase::Running));
    world.pod(|_| {}, &done);
    let status = world.reconcile(&name).await;
    assert_eq!(status.phase, Some(CommitPhase::Succeeded));
    assert_eq!(status.place, Some(format!("data/of/agents/{name}")));
    assert_eq!((&status.commit, &status.warnings[..]), (&None, &["owners".to_owned()][..]));
    let said = &status.conditions.iter().find(|condition| condition.type_ == "Complete").unwrap().message;
    assert_eq!(*said, format!("3 files, 17 bytes are at data/of/agents/{name}"));
}

#[tokio::test]
async fn an_export_to_a_bucket_has_the_places_secret_and_is_refused_where_something_is() {
    let world = World::new(places()).await;
    // A source that has nothing to do with git.
    world.operator.api.change::<AetherSource>(NAMESPACE, "linux", |source| source.spec.git = None);
    let name = world.commit(|spec| spec.target = export("bucket", Some("one/two"))).await;
    world.settled(&name).await;
    world.reconcile(&name).await;
    world.reconcile(&name).await;
    let jobs = world.jobs();
    let wanted = "export s3 --root=bb/2 --bucket=b --prefix=p/one/two --endpoint=https://s3 --region=r \
        --secret-dir /var/run/aether/secret --secret-name agents/keys --store http://store";
    assert_eq!(arguments(&jobs[0]).join(" "), wanted);
    let pod = serde_json::to_value(&jobs[0].spec.as_ref().unwrap().template.spec).unwrap();
    assert_eq!(pod["volumes"][1]["secret"]["secretName"], "keys");
    assert_eq!(pod["containers"][0]["volumeMounts"][1]["readOnly"], true);
    // Somebody has moved the place: that is another Job.
    let moved = |bucket: &str| {
        world.operator.api.change::<AetherSource>(NAMESPACE, "linux", |source| {
            source.spec.review.as_mut().unwrap().exports[1].s3.as_mut().unwrap().bucket = bucket.into();
        });
    };
    moved("elsewhere");
    let status = world.reconcile(&name).await;
    assert_eq!((status.phase, status.retries), (Some(CommitPhase::Running), Some(1)));
    assert!(world.jobs().is_empty());
    moved("b");
    world.operator.api.change::<AetherCommit>(NAMESPACE, &name, |commit| {
        commit.status.as_mut().unwrap().retry_at = Some(crate::common::now());
    });
    world.reconcile(&name).await;
    world.reconcile(&name).await;
    let there =
        json!({"ok": false, "reason": "TargetExists", "kind": "Permanent", "message": "export to another path"});
    world.pod(|_| {}, &there);
    let status = world.reconcile(&name).await;
    assert_eq!((status.phase, &status.place), (Some(CommitPhase::Failed), &None));
    let failed = status.conditions.iter().find(|condition| condition.type_ == "Failed").unwrap();
    assert_eq!((failed.reason.as_str(), failed.message.as_str()), ("TargetExists", "export to another path"));
}

#[tokio::test]
async fn what_a_job_would_wait_for_in_vain_is_said_and_waited_for() {
    let world = World::new(places()).await;
    let lacking = async |target: Target, what: &str, reason: &str| {
        let name = world.commit(|spec| spec.target = target).await;
        world.settled(&name).await;
        world.reconcile(&name).await;
        let status = world.reconcile(&name).await;
        assert_eq!(status.phase, Some(CommitPhase::Running));
        let said = status.conditions.iter().find(|condition| condition.type_ == "Complete").unwrap();
        assert!(said.reason == reason && said.message.contains(what), "{}: {}", said.reason, said.message);
        assert!(world.jobs().is_empty());
        name
    };
    let change = |field: &str| {
        world.operator.api.change::<AetherSource>(NAMESPACE, "linux", |source| {
            let exports = &mut source.spec.review.as_mut().unwrap().exports;
            exports[0].claim.as_mut().unwrap().name = field.into();
            exports[1].s3.as_mut().unwrap().secret_ref.as_mut().unwrap().name = field.into();
        });
    };
    change("gone");
    lacking(export("results", None), "PersistentVolumeClaim gone", "ClaimNotFound").await;
    let name = lacking(export("bucket", None), "Secret gone", "SecretNotFound").await;
    // However long that takes, nothing is written, and it is looked for less and less often.
    world.operator.api.take_writes();
    let pause = async |world: &World| {
        let seen: AetherCommit = world.operator.api.get(NAMESPACE, &name).unwrap();
        aether_operator::commit::reconcile(Arc::new(seen), world.operator.context.clone()).await.unwrap()
    };
    for _ in 0..5 {
        assert_eq!(pause(&world).await, Action::requeue(Duration::from_secs(10)));
    }
    assert_eq!(short(&world.operator.api.take_writes()), [""; 0]);
    world.operator.api.change::<AetherCommit>(NAMESPACE, &name, |commit| {
        let conditions = &mut commit.status.as_mut().unwrap().conditions;
        let complete = conditions.iter_mut().find(|condition| condition.type_ == "Complete").unwrap();
        complete.last_transition_time.0 -= jiff::SignedDuration::from_hours(1);
    });
    assert_eq!(pause(&world).await, Action::requeue(Duration::from_secs(600)));
    // Somebody thinks better of it, and then not.
    let no = world.say("joe", &name, "bb/2", Decision::Reject).await.unwrap();
    assert_eq!(world.reconcile(&name).await.phase, Some(CommitPhase::Rejected));
    world.withdraw("joe", &no).await;
    let status = world.reconcile(&name).await;
    assert_eq!((status.phase, status.releases), (Some(CommitPhase::Running), Some(2)));
    // When it is there it is counted once more before the Job is made.
    change("keys");
    let no = world.say("joe", &name, "bb/2", Decision::Reject).await.unwrap();
    assert_eq!(world.reconcile(&name).await.phase, Some(CommitPhase::Rejected));
    world.withdraw("joe", &no).await;
    world.reconcile(&name).await;
    world.reconcile(&name).await;
    assert_eq!(world.jobs().len(), 1);
}

#[tokio::test]
async fn a_commit_that_may_not_go_on_ends_with_its_job_unless_that_was_done() {
    let world = World::new(places()).await;
    let places = world.operator.api.get::<AetherSource>(NAMESPACE, "linux").unwrap().spec.review;
    let running = async || {
        world.operator.api.change::<AetherSource>(NAMESPACE, "linux", |source| source.spec.review = places.clone());
        let name = world.commit(|spec| spec.target = export("results", None)).await;
        world.settled(&name).await;
        world.reconcile(&name).await;
        world.reconcile(&name).await;
        assert_eq!(world.jobs().len(), 1);
        name
    };
    let taken_away =
        || world.operator.api.change::<AetherSource>(NAMESPACE, "linux", |source| source.spec.review = None);
    let failed = |status: &AetherCommitStatus| {
        status.conditions.iter().find(|condition| condition.type_ == "Failed").map(|failed| failed.message.clone())
    };
    let name = running().await;
    taken_away();
    let status = world.reconcile(&name).await;
    assert_eq!(status.phase, Some(CommitPhase::Failed));
    let said = failed(&status).unwrap();
    assert!(said.contains("spec.review.exports") && said.contains("is deleted"), "{said}");
    assert!(world.jobs().is_empty());

    let name = running().await;
    let done = json!({"ok": true, "root": "bb/2", "place": "data/x", "files": 3, "written": 3, "bytes": 17});
    world.pod(|_| {}, &done);
    taken_away();
    let status = world.reconcile(&name).await;
    assert_eq!((status.phase, status.place.as_deref()), (Some(CommitPhase::Succeeded), Some("data/x")));
    for job in world.jobs() {
        world.operator.api.remove::<Job>(NAMESPACE, &job.name_any());
    }

    let name = running().await;
    // Somebody's pod is not believed here either.
    world.pod(|pod| pod.spec.as_mut().unwrap().containers[0].image = Some("mine".into()), &done);
    world.operator.api.remove::<AetherSource>(NAMESPACE, "linux");
    let status = world.reconcile(&name).await;
    assert_eq!((status.phase, &status.place), (Some(CommitPhase::Failed), &None));
    assert!(failed(&status).unwrap().contains("does not exist any more") && world.jobs().is_empty());
}

#[tokio::test]
async fn nothing_goes_to_a_place_that_the_source_does_not_have() {
    let world = World::new(ReviewRule { required: 0, ..ReviewRule::default() }).await;
    let refused = async |target: Target| {
        let name = world.commit(|spec| spec.target = target).await;
        world.reconcile(&name).await;
        world.checkpoint(&name).await;
        let status = world.reconcile(&name).await;
        assert_eq!(status.phase, Some(CommitPhase::Failed));
        assert!(world.jobs().is_empty());
        status.conditions.into_iter().find(|condition| condition.type_ == "Failed").unwrap().message
    };
    let said = refused(export("results", None)).await;
    assert!(said.contains("spec.review.exports") && said.contains("{name: results, claim:"), "{said}");
    world.operator.api.change::<AetherSource>(NAMESPACE, "linux", |source| source.spec.review = Some(places()));
    let said = refused(export("other", None)).await;
    assert!(said.contains("it has results, bucket"), "{said}");
    // The webhook takes none that leaves its place, and what was written while it was away goes nowhere.
    let mut commit = AetherCommit::new(
        "out",
        AetherCommitSpec {
            session: Some("fix".into()),
            target: export("results", Some("../out")),
            ..Default::default()
        },
    );
    commit.metadata.namespace = Some(NAMESPACE.into());
    assert!(world.create("agent", &commit).await.unwrap_err().contains("without .."));
    world.operator.api.put(&commit);
    assert_eq!(world.reconcile("out").await.phase, Some(CommitPhase::Failed));
    // Nor one whose name, which is its folder then, is that of what another has not completed.
    commit.metadata.name = Some("results.partial".into());
    commit.spec.target = export("results", None);
    assert!(world.create("agent", &commit).await.unwrap_err().contains("\"results.partial\""));
    world.operator.api.put(&commit);
    assert_eq!(world.reconcile("results.partial").await.phase, Some(CommitPhase::Failed));
    // A place that is taken away while a commit waits is no place any more.
    let name = world.commit(|spec| spec.target = export("results", None)).await;
    assert_eq!(world.settled(&name).await.phase, Some(CommitPhase::Running));
    world.operator.api.change::<AetherSource>(NAMESPACE, "linux", |source| source.spec.review = None);
    let status = world.reconcile(&name).await;
    assert_eq!(status.phase, Some(CommitPhase::Failed));
    assert!(world.jobs().is_empty());
}
