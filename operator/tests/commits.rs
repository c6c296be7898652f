//! Commits and their approvals against an API server in memory, with the webhook in between as the API server has it.

mod common;

use std::sync::Arc;
use std::time::Duration;

use aether_api::approval::Decision;
use aether_api::commit::{CommitPhase, ExportTarget, GitTarget, PromoteTarget, Target};
use aether_api::identity::Identity;
use aether_api::review::{Check, ReviewRule};
use aether_api::source::GitSource;
use aether_api::{
    AetherApproval, AetherApprovalSpec, AetherApprovalStatus, AetherCheckpoint, AetherCheckpointSpec, AetherCommand,
    AetherCommandSpec, AetherCommit, AetherCommitSpec, AetherCommitStatus, AetherSession, AetherSource, names,
};
use aether_operator::admission::{Admission, Request};
use aether_operator::context::Context;
use aether_operator::pins::Pins;
use aether_operator::signature::{self, Keys};
use clap::Parser;
use common::{NAMESPACE, Operator, short};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Namespace, PersistentVolumeClaim, Pod, Secret};
use kube::runtime::controller::Action;
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

struct World {
    operator: Operator,
    admission: Admission,
}

fn user(name: &str) -> Identity {
    Identity { username: name.into(), groups: vec!["system:authenticated".into()], ..Identity::default() }
}

/// What the API server does with a JSON Patch that only adds and replaces members.
fn patched(mut object: Value, changes: &Value) -> Value {
    for change in changes.as_array().unwrap() {
        let path = change["path"].as_str().unwrap();
        let (parent, member) = path.rsplit_once('/').unwrap();
        let member = member.replace("~1", "/");
        object.pointer_mut(parent).unwrap()[member] = change["value"].clone();
    }
    object
}

impl World {
    /// A session of the agent with a saved tree, a git source with a rule, and two reviewers.
    async fn new(rule: ReviewRule) -> Self {
        let api = aether_testkit::ApiServer::new();
        let arguments = "aether-operator --store http://store --importer-image i:1 --worker-image w:1 --command-image t:1 --committer-image committer:1";
        let config = aether_operator::config::Config::parse_from(arguments.split(' '));
        let audit = common::audit(&api);
        let context = Arc::new(Context::new(api.client(), config, Pins::nowhere(), audit.clone()));
        let operator = Operator { api: api.clone(), context };
        signature::rotate(&api.client(), "aether-system", jiff::Timestamp::now()).await.unwrap();
        let keyring = operator.context.keyring.clone();
        keyring.set(Keys::read(&api.get("aether-system", signature::SECRET).unwrap()));
        let events = operator.context.events.clone();
        let world = Self { admission: Admission { client: api.client(), keyring, audit, events }, operator };
        let mut namespace = Namespace::default();
        namespace.metadata.name = Some(NAMESPACE.into());
        api.put(&namespace);
        world.operator.put_source("linux");
        api.change::<AetherSource>(NAMESPACE, "linux", |source| {
            source.spec.empty = None;
            source.spec.git = Some(GitSource { url: "https://git/linux".into(), ..GitSource::default() });
            source.spec.review = Some(rule);
            source.status.as_mut().unwrap().revisions[0].commit = Some("c0ffee".into());
        });
        let mut session = AetherSession::new(
            "fix",
            serde_json::from_value(json!({"source": {"name": "linux"}, "claim": "Create"})).unwrap(),
        );
        session.metadata.namespace = Some(NAMESPACE.into());
        world.create("agent", &session).await.unwrap();
        world.operator.session("fix").await;
        let made: AetherSession = api.get(NAMESPACE, "fix").unwrap();
        world.operator.bind("fix", &names::volume_name(&made.uid().unwrap()));
        world.operator.session("fix").await;
        world.operator.set_head("fix", "bb/2");
        let mut secret = Secret::default();
        (secret.metadata.name, secret.metadata.namespace) = (Some("keys".into()), Some(NAMESPACE.into()));
        api.put(&secret);
        let mut claim = PersistentVolumeClaim::default();
        (claim.metadata.name, claim.metadata.namespace) = (Some("data".into()), Some(NAMESPACE.into()));
        api.put(&claim);
        for reviewer in ["jane", "joe"] {
            api.set_right(reviewer, "approve", "aethersources", NAMESPACE, "linux", true);
        }
        api.take_writes();
        world
    }

    async fn ask<K: Resource<DynamicType = ()> + Serialize>(
        &self,
        who: &str,
        operation: &str,
        object: &K,
        old: Value,
    ) -> Result<Value, String> {
        let request = |object: &Value| -> Request {
            serde_json::from_value(json!({
                "uid": "q", "kind": {"kind": K::kind(&())}, "operation": operation, "namespace": NAMESPACE,
                "userInfo": user(who), "object": object, "oldObject": old,
            }))
            .unwrap()
        };
        let given = serde_json::to_value(object).unwrap();
        let changes = self.admission.mutate(&request(&given)).await?;
        let stamped = patched(given, &serde_json::to_value(changes).unwrap());
        self.admission.validate(&request(&stamped)).await?;
        Ok(stamped)
    }

    /// Creates an object as this user; says its name.
    async fn create<K>(&self, who: &str, object: &K) -> Result<String, String>
    where
        K: Resource<DynamicType = ()> + Serialize + DeserializeOwned,
    {
        let stamped: K = serde_json::from_value(self.ask(who, "CREATE", object, Value::Null).await?).unwrap();
        self.operator.api.put(&stamped);
        Ok(stamped.meta().name.clone().unwrap())
    }

    async fn commit(&self, change: impl FnOnce(&mut AetherCommitSpec)) -> String {
        let mut spec =
            AetherCommitSpec { session: Some("fix".into()), target: git("agents/fix"), ..Default::default() };
        change(&mut spec);
        let mut commit = AetherCommit::new("", spec);
        commit.metadata.namespace = Some(NAMESPACE.into());
        commit.metadata.name = None;
        commit.metadata.generate_name = Some("fix-".into());
        self.create("agent", &commit).await.unwrap()
    }

    async fn say(&self, who: &str, commit: &str, root: &str, decision: Decision) -> Result<String, String> {
        self.create(who, &approval(commit, root, decision)).await
    }

    async fn withdraw(&self, who: &str, name: &str) {
        let approval: AetherApproval = self.operator.api.get(NAMESPACE, name).unwrap();
        self.ask(who, "DELETE", &approval, serde_json::to_value(&approval).unwrap()).await.unwrap();
        self.operator.api.remove::<AetherApproval>(NAMESPACE, name);
    }

    async fn reconcile(&self, name: &str) -> AetherCommitStatus {
        let seen: AetherCommit = self.operator.api.get(NAMESPACE, name).unwrap();
        aether_operator::commit::reconcile(Arc::new(seen), self.operator.context.clone()).await.unwrap();
        self.operator.api.get::<AetherCommit>(NAMESPACE, name).unwrap().status.unwrap()
    }

    /// Until the checkpoint of the commit is taken and its tree is known.
    async fn settled(&self, name: &str) -> AetherCommitStatus {
        self.reconcile(name).await;
        self.checkpoint(name).await;
        let status = self.reconcile(name).await;
        assert!(status.root.is_some(), "{:?}", status.conditions);
        status
    }

    /// What the webhook and the operator do when somebody made a checkpoint.
    async fn checkpoint(&self, name: &str) {
        let mut there: AetherCheckpoint = self.operator.api.get(NAMESPACE, name).unwrap();
        let by = there.annotations().contains_key(names::CREATOR_ANNOTATION);
        if !by {
            self.create("system:serviceaccount:aether-system:aether-operator", &there).await.unwrap();
            there = self.operator.api.get(NAMESPACE, name).unwrap();
        }
        aether_operator::checkpoint::reconcile(Arc::new(there), self.operator.context.clone()).await.unwrap();
    }

    fn verdict(&self, approval: &str) -> AetherApprovalStatus {
        self.operator.api.get::<AetherApproval>(NAMESPACE, approval).unwrap().status.unwrap()
    }

    fn jobs(&self) -> Vec<Job> {
        self.operator.api.all()
    }

    /// What the kubelet says of the only Job's pod, which is as the Job says.
    fn pod(&self, change: impl FnOnce(&mut Pod), message: &Value) {
        let job = self.jobs().pop().expect("a Job");
        let template = job.spec.as_ref().unwrap().template.clone();
        let mut pod = Pod { metadata: template.metadata.unwrap_or_default(), spec: template.spec, ..Pod::default() };
        pod.metadata.name = Some(format!("{}-x", job.name_any()));
        pod.metadata.namespace = job.namespace();
        pod.labels_mut().insert("job-name".into(), job.name_any());
        pod.metadata.owner_references = job.controller_owner_ref(&()).map(|owner| vec![owner]);
        let state = json!({"terminated": {"exitCode": 0, "message": message.to_string()}});
        pod.status = Some(
            serde_json::from_value(json!({"containerStatuses": [{"name": "committer", "image": "", "imageID": "",
                "ready": false, "restartCount": 0, "state": state}]}))
            .unwrap(),
        );
        change(&mut pod);
        self.operator.api.put(&pod);
    }
}

fn git(branch: &str) -> Target {
    let git = GitTarget { branch: branch.into(), message: "costs $1".into(), ..GitTarget::default() };
    Target { git: Some(git), ..Target::default() }
}

fn approval(commit: &str, root: &str, decision: Decision) -> AetherApproval {
    let spec = AetherApprovalSpec { commit: commit.into(), root: root.into(), decision, ..Default::default() };
    let mut approval = AetherApproval::new("", spec);
    approval.metadata.namespace = Some(NAMESPACE.into());
    approval.metadata.name = None;
    approval.metadata.generate_name = Some(format!("{commit}-"));
    approval
}

fn arguments(job: &Job) -> Vec<String> {
    job.spec.as_ref().unwrap().template.spec.as_ref().unwrap().containers[0].args.clone().unwrap()
}

const PUSHED: &str = r#"{"ok":true,"commit":"f00d","tree":"t","branch":"agents/fix","warnings":["1 empty folder"]}"#;

fn pushed() -> Value {
    serde_json::from_str(PUSHED).unwrap()
}

fn two() -> ReviewRule {
    ReviewRule { required: 2, ..ReviewRule::default() }
}

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
        commit.status.as_mut().unwrap().retry_at = Some(common::now());
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
