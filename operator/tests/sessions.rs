//! Sessions against an API server in memory: how many writes they cost, and that nothing is written twice.

mod common;

use aether_api::checkpoint::DeletionPolicy;
use aether_api::conditions::{self, READY, Wanted, reason};
use aether_api::names;
use aether_api::session::{ClaimPolicy, SourceReference};
use aether_api::{AetherCheckpoint, AetherCheckpointSpec, AetherCheckpointStatus, AetherSession, AetherSessionSpec};
use common::{NAMESPACE, Operator, now, short};
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::ResourceExt;

fn session(operator: &Operator, name: &str) -> AetherSession {
    operator.api.get(NAMESPACE, name).expect("the session exists")
}

fn ready_reason(operator: &Operator, name: &str) -> String {
    let status = session(operator, name).status.expect("a status");
    conditions::get(&status.conditions, READY).expect("a Ready condition").reason.clone()
}

#[tokio::test]
async fn a_session_costs_three_writes_and_then_none() {
    let operator = Operator::new();
    operator.put_source("linux");
    operator.put_session("fix", "linux");
    operator.session("fix").await;
    let made = operator.api.take_writes();
    assert_eq!(short(&made), ["POST persistentvolumeclaims", "POST persistentvolumes"]);

    operator.session("fix").await;
    assert!(operator.api.take_writes().is_empty(), "waiting for the binder is not worth a write");

    let claim: PersistentVolumeClaim = operator.api.get(NAMESPACE, "fix").unwrap();
    assert_eq!(claim.spec.as_ref().unwrap().volume_name, None);
    let volume = operator.api.all::<PersistentVolume>().pop().unwrap();
    let reserved = volume.spec.clone().unwrap().claim_ref.unwrap();
    assert_eq!((reserved.name.as_deref(), reserved.uid), (Some("fix"), claim.uid()));
    operator.bind("fix", &volume.name_any());

    operator.session("fix").await;
    assert_eq!(short(&operator.api.take_writes()), ["PATCH aethersessions/status"]);
    let status = session(&operator, "fix").status.unwrap();
    assert_eq!((status.phase.as_deref(), status.claim_name.as_deref()), (Some("Bound"), Some("fix")));
    assert_eq!(status.base.unwrap().revision.as_deref(), Some("r1"));
    assert!(session(&operator, "fix").finalizers().is_empty(), "it can go while nobody reconciles");
    assert!(conditions::is_true(&status.conditions, READY));

    for _ in 0..3 {
        operator.session("fix").await;
    }
    assert!(operator.api.take_writes().is_empty(), "nothing changed, so nothing is written");
}

#[tokio::test]
async fn attaching_and_releasing_costs_the_operator_nothing() {
    let operator = Operator::new();
    operator.put_source("linux");
    operator.bound_session("fix", "linux").await;
    operator.attach("fix", Some("n1"));
    operator.session("fix").await;
    operator.set_head("fix", "bb/2");
    operator.attach("fix", None);
    operator.session("fix").await;
    assert!(operator.api.take_writes().is_empty());
    assert_eq!(session(&operator, "fix").head_root(), Some("bb/2"), "the node's part of the status is left alone");
}

#[tokio::test]
async fn a_deleted_claim_is_made_anew_with_a_new_volume() {
    let operator = Operator::new();
    operator.put_source("linux");
    let before = operator.bound_session("fix", "linux").await;
    operator.api.remove::<PersistentVolumeClaim>(NAMESPACE, "fix");
    operator.session("fix").await;
    let writes = short(&operator.api.take_writes());
    let expected = ["POST persistentvolumeclaims", "DELETE persistentvolumes", "POST events", "POST persistentvolumes"];
    assert_eq!(writes, expected);
    let claim: PersistentVolumeClaim = operator.api.get(NAMESPACE, "fix").unwrap();
    let volume = operator.api.all::<PersistentVolume>().pop().unwrap();
    assert_eq!(volume.spec.clone().unwrap().claim_ref.unwrap().uid, claim.uid());
    operator.bind("fix", &volume.name_any());
    operator.session("fix").await;
    assert!(operator.api.take_writes().is_empty(), "the session is as it was");
    assert_eq!(session(&operator, "fix").status.unwrap().base, before.status.unwrap().base);
}

#[tokio::test]
async fn a_foreign_claim_of_the_name_is_reported_and_left_alone() {
    let operator = Operator::new();
    operator.put_source("linux");
    let mut foreign = PersistentVolumeClaim::default();
    foreign.metadata.name = Some("fix".into());
    foreign.metadata.namespace = Some(NAMESPACE.into());
    operator.api.put(&foreign);
    operator.put_session("fix", "linux");
    operator.session("fix").await;
    assert_eq!(ready_reason(&operator, "fix"), reason::NAME_TAKEN);
    assert!(operator.api.all::<PersistentVolume>().is_empty());
    operator.api.take_writes();
    operator.session("fix").await;
    assert!(operator.api.take_writes().is_empty(), "told once");
}

#[tokio::test]
async fn what_a_person_must_mend_is_told_at_once_and_heals() {
    let operator = Operator::new();
    operator.put_session("fix", "linux");
    operator.session("fix").await;
    assert_eq!(ready_reason(&operator, "fix"), reason::SOURCE_NOT_FOUND);
    assert!(short(&operator.api.take_writes()).contains(&"POST events".to_owned()));
    operator.put_source("linux");
    operator.session("fix").await;
    assert_eq!(operator.api.all::<PersistentVolumeClaim>().len(), 1);
}

#[tokio::test]
async fn a_broken_spec_makes_nothing() {
    let operator = Operator::new();
    let source = SourceReference { name: "linux".into(), ..Default::default() };
    operator.put_session_of(
        "fix",
        AetherSessionSpec { source: Some(source), session: Some("other".into()), ..Default::default() },
    );
    operator.session("fix").await;
    assert_eq!(ready_reason(&operator, "fix"), reason::INVALID);
    assert!(operator.api.all::<PersistentVolumeClaim>().is_empty());
}

#[tokio::test]
async fn a_fork_of_a_held_session_waits_for_its_node_and_then_costs_three_writes() {
    let operator = Operator::new();
    operator.put_source("linux");
    let parent = operator.bound_session("fix", "linux").await;
    operator.attach("fix", Some("n1"));
    operator.put_session_of("fork", AetherSessionSpec { session: Some("fix".into()), ..Default::default() });
    operator.session("fork").await;
    assert!(operator.api.take_writes().is_empty(), "it waits quietly");
    operator.api.change::<AetherSession>(NAMESPACE, "fork", |fork| {
        fork.status.get_or_insert_default().forked_from = Some(aether_api::session::ForkedFrom {
            session: "fix".into(),
            uid: parent.uid().unwrap(),
            node: Some("n1".into()),
            snapshot: Some("snap".into()),
            time: now(),
            consistency: aether_api::session::Consistency::PointInTime,
            frozen_microseconds: Some(10),
            durable: false,
        });
    });
    operator.session("fork").await;
    let volume = names::volume_name(&session(&operator, "fork").uid().unwrap());
    operator.bind("fork", &volume);
    operator.session("fork").await;
    assert_eq!(
        short(&operator.api.take_writes()),
        ["POST persistentvolumeclaims", "POST persistentvolumes", "PATCH aethersessions/status"]
    );
    let status = session(&operator, "fork").status.unwrap();
    let base = status.base.unwrap();
    assert_eq!(
        (base.root, base.revision_root.as_deref()),
        (None, Some("aa/1")),
        "the node stamps the root when it is digested"
    );
    assert_eq!(status.forked_from.unwrap().snapshot.as_deref(), Some("snap"));

    // The only copy of the moment is on that node, and that for a while.
    operator.api.change::<AetherSession>(NAMESPACE, "fork", |fork| {
        let moment = fork.status.as_mut().and_then(|status| status.forked_from.as_mut()).unwrap();
        moment.time.0 -= jiff::SignedDuration::from_mins(1);
    });
    operator.api.remove::<Node>("", "n1");
    operator.session("fork").await;
    assert_eq!(ready_reason(&operator, "fork"), reason::WAITING_FOR_NODE);
    operator.attach("fix", Some("n1"));
    operator.session("fork").await;
    assert_eq!(ready_reason(&operator, "fork"), reason::READY, "it came back");

    // And it has lost its disk.
    operator.api.change::<AetherSession>(NAMESPACE, "fork", |fork| {
        let failed = Wanted::yes(conditions::FAILED, reason::NODE_FAILED, "the moment is gone");
        conditions::set(&mut fork.status.get_or_insert_default().conditions, failed, None);
    });
    operator.session("fork").await;
    assert_eq!(ready_reason(&operator, "fork"), reason::NODE_FAILED);
}

#[tokio::test]
async fn a_fork_of_a_session_that_nobody_holds_starts_at_its_head() {
    let operator = Operator::new();
    operator.put_source("linux");
    operator.bound_session("fix", "linux").await;
    operator.set_head("fix", "bb/2");
    operator.put_session_of("fork", AetherSessionSpec { session: Some("fix".into()), ..Default::default() });
    operator.session("fork").await;
    operator.bind("fork", &names::volume_name(&session(&operator, "fork").uid().unwrap()));
    operator.session("fork").await;
    let status = session(&operator, "fork").status.unwrap();
    assert_eq!(status.base.unwrap().root.as_deref(), Some("bb/2"));
    assert!(status.forked_from.unwrap().durable);
    assert_eq!(operator.api.take_writes().len(), 3);
}

/// Deletes as a user would. No write is left to be counted.
async fn delete(operator: &Operator, name: &str) {
    let sessions: kube::Api<AetherSession> = kube::Api::namespaced(operator.api.client(), NAMESPACE);
    sessions.delete(name, &Default::default()).await.unwrap();
    assert!(operator.api.get::<AetherSession>(NAMESPACE, name).is_none(), "it is gone at once");
    operator.api.take_writes();
}

#[tokio::test]
async fn the_end_takes_claim_and_its_own_checkpoints_and_last_the_volume() {
    let operator = Operator::new();
    operator.put_source("linux");
    let uid = operator.bound_session("fix", "linux").await.uid();
    let others = operator.bound_session("other", "linux").await.uid();
    for (name, deletion_policy, session_uid) in [
        ("kept", DeletionPolicy::Keep, &uid),
        ("going", DeletionPolicy::WithSession, &uid),
        ("of-another", DeletionPolicy::WithSession, &others),
    ] {
        let mut checkpoint =
            AetherCheckpoint::new(name, AetherCheckpointSpec { session: "fix".into(), message: None, deletion_policy });
        checkpoint.metadata.namespace = Some(NAMESPACE.into());
        checkpoint.status = Some(AetherCheckpointStatus { session_uid: session_uid.clone(), ..Default::default() });
        operator.api.put(&checkpoint);
    }
    operator.volumes().await;
    assert!(operator.api.take_writes().is_empty(), "nothing of a session that exists is touched");

    delete(&operator, "fix").await;
    operator.volumes().await;
    let writes = short(&operator.api.take_writes());
    assert_eq!(writes, ["DELETE aethercheckpoints", "DELETE persistentvolumeclaims", "DELETE persistentvolumes"]);
    let left: Vec<String> = operator.api.all::<AetherCheckpoint>().iter().map(ResourceExt::name_any).collect();
    assert_eq!(left, ["kept", "of-another"]);
    let left: Vec<String> = operator.api.all::<PersistentVolume>().iter().map(ResourceExt::name_any).collect();
    assert_eq!(left, [names::volume_name(&others.unwrap())]);
    operator.volumes().await;
    assert!(operator.api.take_writes().is_empty());
}

#[tokio::test]
async fn the_volume_stays_for_as_long_as_a_pod_uses_the_claim() {
    let operator = Operator::new();
    operator.put_source("linux");
    operator.bound_session("fix", "linux").await;
    operator.api.change::<PersistentVolumeClaim>(NAMESPACE, "fix", |claim| {
        claim.metadata.finalizers = Some(vec!["kubernetes.io/pvc-protection".into()]);
    });
    delete(&operator, "fix").await;
    for expected in [&["DELETE persistentvolumeclaims"][..], &[]] {
        operator.volumes().await;
        assert_eq!(short(&operator.api.take_writes()), expected, "asked once");
    }
    assert_eq!(operator.api.all::<PersistentVolume>().len(), 1);

    // A session of the same name does not get the claim, and says why not only when that lasts.
    operator.put_session("fix", "linux");
    operator.session("fix").await;
    assert!(operator.api.take_writes().is_empty());
    operator.volumes().await;
    assert!(operator.api.take_writes().is_empty());

    operator.api.remove::<PersistentVolumeClaim>(NAMESPACE, "fix");
    operator.volumes().await;
    assert_eq!(short(&operator.api.take_writes()), ["DELETE persistentvolumes"]);
    operator.session("fix").await;
    operator.volumes().await;
    assert_eq!(short(&operator.api.take_writes()), ["POST persistentvolumeclaims", "POST persistentvolumes"]);
}

#[tokio::test]
async fn a_namespace_that_went_while_nobody_reconciled_leaves_nothing() {
    let operator = Operator::new();
    operator.put_source("linux");
    operator.bound_session("stays", "linux").await;
    operator.bound_session("goes", "linux").await;
    operator.api.remove::<AetherSession>(NAMESPACE, "goes");
    operator.api.remove::<PersistentVolumeClaim>(NAMESPACE, "goes");
    operator.api.take_writes();
    aether_operator::sweep::sweep(&operator.context).await.unwrap();
    assert_eq!(short(&operator.api.take_writes()), ["DELETE persistentvolumes"]);
    assert_eq!(operator.api.all::<PersistentVolume>().len(), 1);
    aether_operator::sweep::sweep(&operator.context).await.unwrap();
    assert!(operator.api.take_writes().is_empty());
}

#[tokio::test]
async fn a_session_of_an_inline_volume_is_left_to_the_driver() {
    let operator = Operator::new();
    operator.put_source("linux");
    let source = SourceReference { name: "linux".into(), ..Default::default() };
    operator.put_session_of(
        "inline",
        AetherSessionSpec { source: Some(source), claim: ClaimPolicy::None, ..Default::default() },
    );
    operator.api.change::<AetherSession>(NAMESPACE, "inline", |session| {
        session.metadata.owner_references = Some(vec![OwnerReference {
            api_version: "v1".into(),
            kind: "Pod".into(),
            name: "p".into(),
            uid: "p-1".into(),
            ..Default::default()
        }]);
    });
    operator.session("inline").await;
    assert!(operator.api.take_writes().is_empty());
}

#[tokio::test]
async fn a_claim_of_our_class_gets_a_session_and_a_volume_and_nobody_elses_does() {
    let operator = Operator::new();
    operator.put_source("linux");
    for (name, provisioner) in [("aether", names::CSI_DRIVER), ("disk", "disk.example.org")] {
        let mut class = StorageClass { provisioner: provisioner.into(), ..Default::default() };
        class.metadata.name = Some(name.into());
        operator.api.put(&class);
        let mut claim: PersistentVolumeClaim = serde_json::from_value(serde_json::json!({
            "metadata": {"name": format!("work-{name}"), "namespace": NAMESPACE, "annotations": {names::CLAIM_SOURCE_ANNOTATION: "linux"}},
            "spec": {"storageClassName": name, "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "3Gi"}}}
        }))
        .unwrap();
        operator.api.put(&claim);
        claim = operator.api.get(NAMESPACE, &format!("work-{name}")).unwrap();
        aether_operator::provision::reconcile(std::sync::Arc::new(claim), operator.context.clone()).await.unwrap();
    }
    let sessions: Vec<String> = operator.api.all::<AetherSession>().iter().map(ResourceExt::name_any).collect();
    assert_eq!(sessions, ["work-aether"]);
    operator.session("work-aether").await;
    let volume = operator.api.all::<PersistentVolume>().pop().unwrap();
    assert_eq!(volume.spec.as_ref().unwrap().storage_class_name.as_deref(), Some("aether"));
    operator.bind("work-aether", &volume.name_any());
    operator.session("work-aether").await;
    operator.api.take_writes();
    let claim: PersistentVolumeClaim = operator.api.get(NAMESPACE, "work-aether").unwrap();
    aether_operator::provision::reconcile(std::sync::Arc::new(claim), operator.context.clone()).await.unwrap();
    operator.session("work-aether").await;
    assert!(operator.api.take_writes().is_empty());
    assert!(conditions::is_true(&session(&operator, "work-aether").status.unwrap().conditions, READY));
}

#[tokio::test]
async fn an_expired_session_is_deleted() {
    let operator = Operator::new();
    operator.put_source("linux");
    operator.bound_session("fix", "linux").await;
    operator.api.change::<AetherSession>(NAMESPACE, "fix", |session| {
        session.spec.time_to_live = Some(std::time::Duration::from_secs(600).into())
    });
    operator.session("fix").await;
    assert!(operator.api.take_writes().iter().all(|write| write.method != "DELETE"), "it has ten minutes");
    operator.age::<AetherSession>("fix");
    operator.session("fix").await;
    assert!(operator.api.get::<AetherSession>(NAMESPACE, "fix").is_none());
}
