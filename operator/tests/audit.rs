//! The audit log of the product: which lines there are after what, each once, by whom; who may withdraw what; and what happens while
//! the log cannot be written, when its end is lost, and when somebody deletes what the operator was not asked about.

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aether_api::approval::Decision::{self, Approve, Reject};
use aether_api::commit::{AetherCommitStatus, CommitPhase, PromoteTarget, Target};
use aether_api::identity::Identity;
use aether_api::names::{self, approval_name};
use aether_api::review::ReviewRule;
use aether_api::{
    AetherApproval, AetherApprovalSpec, AetherCheckpoint, AetherCommit, AetherCommitSpec, AetherNote, AetherSession,
    AetherSource, conditions,
};
use aether_audit::{Entry, Head, Log, Object, Verb};
use aether_cas::{Blob, MemoryStore, Store, StoreError};
use aether_credentials::Credentials;
use aether_operator::admission::{Admission, Request};
use aether_operator::audit::anchor::NAME;
use aether_operator::audit::{Audit, ClusterAnchor, IN_TIME};
use aether_operator::config::Config;
use aether_operator::context::Context;
use aether_operator::events::Events;
use aether_operator::orphans::Orphans;
use aether_operator::pins::{AUDIT_LOG, CHECKPOINT, Pins};
use aether_operator::signature::{self, Keys, Statement};
use aether_testkit::{ApiServer, Fate};
use bytes::Bytes;
use clap::Parser;
use common::store::Roots;
use common::{NAMESPACE, Operator, audit_in};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

const SYSTEM: &str = "aether-system";
const OPERATOR: &str = "system:serviceaccount:aether-system:aether-operator";

/// A store in memory, which may be away.
struct Fickle {
    store: MemoryStore,
    away: AtomicBool,
    /// How long each answer takes.
    pause: Mutex<Duration>,
}

impl Fickle {
    fn here(&self) -> Result<&MemoryStore, StoreError> {
        if self.away.load(Ordering::SeqCst) { Err(StoreError::Closed("memory".into())) } else { Ok(&self.store) }
    }
}

#[async_trait::async_trait]
impl Store for Fickle {
    async fn find_missing(&self, blobs: &[Blob]) -> Result<Vec<Blob>, StoreError> {
        self.here()?.find_missing(blobs).await
    }

    async fn read(&self, blob: Blob) -> Result<Bytes, StoreError> {
        let pause = *self.pause.lock().unwrap();
        tokio::time::sleep(pause).await;
        self.here()?.read(blob).await
    }

    async fn read_batch(&self, blobs: &[Blob]) -> Result<Vec<Bytes>, StoreError> {
        self.here()?.read_batch(blobs).await
    }

    async fn fetch_to(&self, blob: Blob, path: &Path) -> Result<(), StoreError> {
        self.here()?.fetch_to(blob, path).await
    }

    async fn write_batch(&self, blobs: Vec<(Blob, Bytes)>) -> Result<(), StoreError> {
        self.here()?.write_batch(blobs).await
    }

    async fn write_file(&self, blob: Blob, path: &Path) -> Result<(), StoreError> {
        self.here()?.write_file(blob, path).await
    }
}

fn user(name: &str) -> Identity {
    Identity { username: name.into(), groups: vec!["system:authenticated".into()], ..Identity::default() }
}

/// Operators of one cluster, each with a webhook of its own.
struct World {
    api: ApiServer,
    store: Arc<Fickle>,
    operators: Vec<(Arc<Context>, Admission)>,
    made: AtomicUsize,
}

impl World {
    /// A session of the agent with a saved tree, of a source that takes what two have approved; so many operators.
    async fn new(operators: usize) -> Self {
        let api = ApiServer::new();
        let store =
            Arc::new(Fickle { store: MemoryStore::new(), away: AtomicBool::new(false), pause: Mutex::default() });
        signature::rotate(&api.client(), SYSTEM, Timestamp::now()).await.unwrap();
        let mut world = Self { api: api.clone(), store, operators: Vec::new(), made: AtomicUsize::new(1) };
        (0..operators).for_each(|_| world.start());
        let mut namespace = Namespace::default();
        namespace.metadata.name = Some(NAMESPACE.into());
        api.put(&namespace);
        let operator = Operator { api: api.clone(), context: world.operators[0].0.clone() };
        operator.put_source("linux");
        api.change::<AetherSource>(NAMESPACE, "linux", |source| {
            source.spec.review = Some(ReviewRule { required: 2, ..ReviewRule::default() });
        });
        let spec = json!({"source": {"name": "linux"}, "claim": "Create"});
        let mut session = AetherSession::new("fix", serde_json::from_value(spec).unwrap());
        session.metadata.namespace = Some(NAMESPACE.into());
        world.create("agent", &session).await.unwrap();
        operator.session("fix").await;
        let made: AetherSession = api.get(NAMESPACE, "fix").unwrap();
        operator.bind("fix", &names::volume_name(&made.uid().unwrap()));
        operator.session("fix").await;
        operator.set_head("fix", "bb/2");
        for reviewer in ["jane", "joe"] {
            api.set_right(reviewer, "approve", "aethersources", NAMESPACE, "linux", true);
        }
        api.set_right("paula", "withdraw", "aethersources", NAMESPACE, "linux", true);
        world
    }

    /// One more operator, which remembers nothing.
    fn start(&mut self) {
        let arguments =
            "aether-operator --store http://store --importer-image i:1 --worker-image w:1 --command-image t:1";
        let audit = audit_in(&self.api, self.store.clone(), Pins::nowhere());
        let config = Config::parse_from(arguments.split(' '));
        let context = Arc::new(Context::new(self.api.client(), config, Pins::nowhere(), audit.clone()));
        let keyring = context.keyring.clone();
        keyring.set(Keys::read(&self.api.get(SYSTEM, signature::SECRET).unwrap()));
        let events = context.events.clone();
        self.operators.push((context, Admission { client: self.api.client(), keyring, audit, events }));
    }

    /// What the API server does with a request: asks all operators, as it may ask again.
    async fn ask<K: Resource<DynamicType = ()>>(
        &self,
        who: &str,
        operation: &str,
        object: Value,
        old: &Value,
        dry: bool,
    ) -> Result<Value, String> {
        let request = |object: &Value| -> Request {
            serde_json::from_value(json!({
                "uid": "q", "kind": {"kind": K::kind(&())}, "operation": operation, "namespace": NAMESPACE,
                "userInfo": user(who), "object": object, "oldObject": old, "dryRun": dry,
            }))
            .unwrap()
        };
        let mut stamped = object;
        for change in
            serde_json::to_value(self.operators[0].1.mutate(&request(&stamped)).await?).unwrap().as_array().unwrap()
        {
            let (parent, member) = change["path"].as_str().unwrap().rsplit_once('/').unwrap();
            stamped.pointer_mut(parent).unwrap()[member.replace("~1", "/")] = change["value"].clone();
        }
        if operation == "CREATE" {
            // As the API server does before it asks validating webhooks.
            let uid = format!("u-{}", self.made.fetch_add(1, Ordering::SeqCst));
            let given = &mut stamped["metadata"]["uid"];
            *given = given.as_str().map_or(uid.into(), Into::into);
        }
        for (_, admission) in &self.operators {
            admission.validate(&request(&stamped)).await?;
        }
        Ok(stamped)
    }

    async fn create<K>(&self, who: &str, object: &K) -> Result<String, String>
    where
        K: Resource<DynamicType = ()> + Serialize + DeserializeOwned,
    {
        let object = serde_json::to_value(object).unwrap();
        let stamped: K =
            serde_json::from_value(self.ask::<K>(who, "CREATE", object, &Value::Null, false).await?).unwrap();
        self.api.put(&stamped);
        Ok(stamped.meta().name.clone().unwrap())
    }

    async fn withdraw(&self, who: &str, approval: &str) -> Result<(), String> {
        let old = serde_json::to_value(self.api.get::<AetherApproval>(NAMESPACE, approval).unwrap()).unwrap();
        self.ask::<AetherApproval>(who, "DELETE", Value::Null, &old, false).await?;
        self.api.remove::<AetherApproval>(NAMESPACE, approval);
        Ok(())
    }

    /// A commit that waits for approvals.
    async fn commit(&self, name: &str) {
        let target = Target { promote: Some(PromoteTarget {}), ..Target::default() };
        let spec = AetherCommitSpec { session: Some("fix".into()), target, ..AetherCommitSpec::default() };
        let mut commit = AetherCommit::new(name, spec);
        commit.metadata.namespace = Some(NAMESPACE.into());
        self.create("agent", &commit).await.unwrap();
        self.reconcile(name).await;
        let there: AetherCheckpoint = self.api.get(NAMESPACE, name).unwrap();
        self.create(OPERATOR, &there).await.unwrap();
        let there = self.api.get(NAMESPACE, name).unwrap();
        aether_operator::checkpoint::reconcile(Arc::new(there), self.operators[0].0.clone()).await.unwrap();
        let status = self.reconcile(name).await;
        assert_eq!(status.phase, Some(CommitPhase::AwaitingApproval), "{:?}", status.conditions);
    }

    async fn say(&self, who: &str, commit: &str, decision: Decision) -> String {
        let spec = AetherApprovalSpec { commit: commit.into(), root: "bb/2".into(), decision, ..Default::default() };
        let mut approval = AetherApproval::new(&approval_name(commit, who), spec);
        approval.metadata.namespace = Some(NAMESPACE.into());
        self.create(who, &approval).await.unwrap()
    }

    /// By all operators, of which each may think that it leads.
    async fn reconcile(&self, name: &str) -> AetherCommitStatus {
        for (context, _) in &self.operators {
            let seen: AetherCommit = self.api.get(NAMESPACE, name).unwrap();
            aether_operator::commit::reconcile(Arc::new(seen), context.clone()).await.unwrap();
        }
        self.api.get::<AetherCommit>(NAMESPACE, name).unwrap().status.unwrap()
    }

    async fn entries(&self) -> Vec<Entry> {
        let client = self.api.client();
        let anchor = ClusterAnchor::new(&client, SYSTEM, Pins::nowhere(), Events::new(&client, "reader"));
        let mut entries = Vec::new();
        let log = Log { store: &self.store.store, anchor: &anchor };
        log.verify([], |entry| entries.push(entry)).await.unwrap();
        entries
    }

    /// `ACTOR VERB NAME` of each line.
    async fn lines(&self) -> Vec<String> {
        let said = |entry: &Entry| format!("{} {:?} {}", entry.actor, entry.verb, entry.object.name);
        self.entries().await.iter().map(said).collect()
    }

    fn told(&self, reason: &str) -> Vec<String> {
        let events = self.api.all::<Event>().into_iter().filter(|event| event.reason.as_deref() == Some(reason));
        events.filter_map(|event| event.note).collect()
    }
}

#[tokio::test]
async fn each_change_is_one_line_by_whoever_made_it_however_many_operators_there_are() {
    let world = World::new(2).await;
    world.commit("c").await;
    let jane = world.say("jane", "c", Reject).await;
    assert_eq!(world.reconcile("c").await.phase, Some(CommitPhase::Rejected));
    world.reconcile("c").await;
    world.withdraw("jane", &jane).await.unwrap();
    assert_eq!(world.reconcile("c").await.phase, Some(CommitPhase::AwaitingApproval));
    world.say("jane", "c", Approve).await;
    world.reconcile("c").await;
    // Said and taken back before any operator looked.
    let joe = world.say("joe", "c", Reject).await;
    world.withdraw("paula", &joe).await.unwrap();
    world.say("joe", "c", Approve).await;
    let status = loop {
        let status = world.reconcile("c").await;
        if status.finished.is_some() {
            break status;
        }
    };
    assert_eq!(status.phase, Some(CommitPhase::Succeeded));
    world.reconcile("c").await;
    let expected = [
        "agent Requested c".to_owned(),
        format!("jane Rejected {jane}"),
        format!("jane Withdrawn {jane}"),
        format!("jane Approved {jane}"),
        format!("joe Rejected {joe}"),
        format!("paula Withdrawn {joe}"),
        format!("joe Approved {joe}"),
        format!("{OPERATOR} Released c"),
        format!("{OPERATOR} Succeeded c"),
    ];
    assert_eq!(world.lines().await, expected);
    assert!(world.entries().await.iter().all(|entry| entry.root.as_deref() == Some("bb/2")));
    let withdrawn = world.told("Withdrawn");
    assert!(withdrawn.iter().any(|note| note == "paula withdraws what joe has said (Reject)"), "{withdrawn:?}");
}

#[tokio::test]
async fn an_operator_that_is_killed_between_line_and_status_writes_no_line_again() {
    let mut world = World::new(1).await;
    world.commit("c").await;
    world.say("jane", "c", Approve).await;
    world.say("joe", "c", Approve).await;
    // Each write of a status that the API server takes is the last thing that the operator does; or it does not come to it.
    for kill in 0..12 {
        let before: AetherCommit = world.api.get(NAMESPACE, "c").unwrap();
        if before.finished() {
            break;
        }
        world.reconcile("c").await;
        if kill % 2 == 0 {
            world.api.change::<AetherCommit>(NAMESPACE, "c", |commit| commit.status = before.status.clone());
        }
        world.operators.clear();
        world.start();
    }
    let jane = approval_name("c", "jane");
    let joe = approval_name("c", "joe");
    let mut lines = world.lines().await;
    lines[1..3].sort();
    let mut voices = [format!("jane Approved {jane}"), format!("joe Approved {joe}")];
    voices.sort();
    let [first, second] = voices;
    let released = format!("{OPERATOR} Released c");
    assert_eq!(lines, ["agent Requested c".to_owned(), first, second, released, format!("{OPERATOR} Succeeded c")]);
}

#[tokio::test]
async fn only_the_reviewer_or_the_sources_people_withdraw_what_was_said() {
    let world = World::new(1).await;
    world.commit("c").await;
    let jane = world.say("jane", "c", Reject).await;
    world.reconcile("c").await;
    let refused = world.withdraw("joe", &jane).await.unwrap_err();
    for word in ["joe may not withdraw what jane has said", "verb withdraw", "agents/linux"] {
        assert!(refused.contains(word), "{refused}");
    }
    assert!(world.withdraw("agent", &jane).await.is_err());
    let old = serde_json::to_value(world.api.get::<AetherApproval>(NAMESPACE, &jane).unwrap()).unwrap();
    world.ask::<AetherApproval>("jane", "DELETE", Value::Null, &old, true).await.unwrap();
    assert_eq!(world.lines().await.len(), 2, "nothing came of any of that");
    world.withdraw("paula", &jane).await.unwrap();
    assert_eq!(world.lines().await[2], format!("paula Withdrawn {jane}"));

    // What goes with its commit or its namespace, whoever sees to that, is not withdrawn.
    let collector = "system:serviceaccount:kube-system:generic-garbage-collector";
    let joe = world.say("joe", "c", Approve).await;
    world.reconcile("c").await;
    let lines = world.lines().await.len();
    let old = serde_json::to_value(world.api.get::<AetherApproval>(NAMESPACE, &joe).unwrap()).unwrap();
    let goes = async |who| world.ask::<AetherApproval>(who, "DELETE", Value::Null, &old, false).await.map(drop);
    assert!(goes(collector).await.is_err(), "nobody deletes the commit");
    let now = || Some(Time(Timestamp::from_second(Timestamp::now().as_second()).unwrap()));
    world.api.change::<Namespace>("", NAMESPACE, |namespace| namespace.metadata.deletion_timestamp = now());
    goes("system:serviceaccount:kube-system:namespace-controller").await.unwrap();
    world.api.change::<Namespace>("", NAMESPACE, |namespace| namespace.metadata.deletion_timestamp = None);
    world.api.change::<AetherCommit>(NAMESPACE, "c", |commit| {
        commit.metadata.deletion_timestamp = now();
        commit.metadata.finalizers = Some(vec!["foregroundDeletion".into()]);
    });
    goes(collector).await.unwrap();
    world.api.remove::<AetherCommit>(NAMESPACE, "c");
    goes(collector).await.unwrap();
    assert_eq!(world.lines().await.len(), lines);
}

#[tokio::test]
async fn a_rejection_that_was_deleted_behind_the_operators_back_stands() {
    let world = World::new(1).await;
    world.commit("c").await;
    let jane = world.say("jane", "c", Reject).await;
    world.reconcile("c").await;
    world.say("joe", "c", Approve).await;
    world.api.remove::<AetherApproval>(NAMESPACE, &jane);
    for _ in 0..2 {
        let status = world.reconcile("c").await;
        assert_eq!(status.phase, Some(CommitPhase::Rejected));
        assert_eq!(status.approvals.unwrap().rejected, ["jane"]);
        let approved = conditions::get(&status.conditions, conditions::APPROVED).unwrap().message.clone();
        assert!(approved.contains("stands until jane decides again"), "{approved}");
    }
    // She may say the same and take that back, or something else.
    world.say("jane", "c", Reject).await;
    world.withdraw("jane", &jane).await.unwrap();
    assert_eq!(world.reconcile("c").await.phase, Some(CommitPhase::AwaitingApproval));
    world.say("jane", "c", Reject).await;
    world.reconcile("c").await;
    world.api.remove::<AetherApproval>(NAMESPACE, &jane);
    assert_eq!(world.reconcile("c").await.phase, Some(CommitPhase::Rejected));
    world.say("jane", "c", Approve).await;
    assert_eq!(world.reconcile("c").await.phase, Some(CommitPhase::Running));
}

#[tokio::test]
async fn an_approval_that_names_a_tree_at_any_length_is_written_down_and_withdrawn_and_none_is_taken_any_more() {
    let world = World::new(1).await;
    world.commit("c").await;
    let jane = world.say("jane", "c", Reject).await;
    let commit: AetherCommit = world.api.get(NAMESPACE, "c").unwrap();
    let keys = world.operators[0].1.keyring.keys().unwrap();
    // As an operator signed it that took any length.
    world.api.change::<AetherApproval>(NAMESPACE, &jane, |approval| {
        approval.spec.root = "a".repeat(100_000);
        let statement = Statement::approval(NAMESPACE, &jane, &approval.spec, &commit.uid().unwrap());
        approval.spec.signature = Some(keys.sign(&statement, common::now()));
    });
    assert_eq!(world.reconcile("c").await.phase, Some(CommitPhase::Rejected));
    world.withdraw("jane", &jane).await.unwrap();
    assert_eq!(world.reconcile("c").await.phase, Some(CommitPhase::AwaitingApproval));
    let of_it = format!("jane Withdrawn {jane}");
    assert!(world.lines().await.contains(&of_it), "{:?}", world.lines().await);
    let spec = AetherApprovalSpec { commit: "c".into(), root: "a".repeat(129), ..Default::default() };
    let mut approval = AetherApproval::new(&jane, spec);
    approval.metadata.namespace = Some(NAMESPACE.into());
    assert!(world.create("jane", &approval).await.unwrap_err().contains("spec.root is no tree"));
}

#[tokio::test]
async fn a_rejection_stands_that_was_written_down_and_deleted_before_the_commit_said_so() {
    let mut world = World::new(1).await;
    world.commit("c").await;
    let jane = world.say("jane", "c", Reject).await;
    let before: AetherCommit = world.api.get(NAMESPACE, "c").unwrap();
    world.reconcile("c").await;
    // Killed after the line; and nobody was asked who deletes it.
    world.api.change::<AetherCommit>(NAMESPACE, "c", |commit| commit.status = before.status.clone());
    world.api.remove::<AetherApproval>(NAMESPACE, &jane);
    world.operators.clear();
    world.start();
    world.api.set_right("ann", "approve", "aethersources", NAMESPACE, "linux", true);
    for who in ["joe", "ann"] {
        world.say(who, "c", Approve).await;
    }
    for _ in 0..2 {
        let status = world.reconcile("c").await;
        assert_eq!(status.phase, Some(CommitPhase::Rejected));
        assert_eq!(status.approvals.unwrap().rejected, ["jane"]);
        let approved = conditions::get(&status.conditions, conditions::APPROVED).unwrap().message.clone();
        assert!(approved.contains("make another AetherCommit of AetherCheckpoint c"), "{approved}");
    }
}

#[tokio::test]
async fn what_many_have_to_say_is_written_at_once_also_when_somebody_cannot_wait() {
    let world = World::new(1).await;
    let audit = &world.operators[0].0.audit;
    audit.tell(&[entry(0)], Timestamp::now(), IN_TIME).await.unwrap();
    *world.store.pause.lock().unwrap() = Duration::from_millis(200);
    world.api.take_writes();
    let hasty = [entry(1)];
    let first = audit.tell(&hasty, Timestamp::now(), Duration::from_millis(50)).await.unwrap_err();
    assert!(first.contains("the store and ConfigMap aether-audit took longer than"), "{first}");
    let hasty = [entry(2)];
    let second = audit.tell(&hasty, Timestamp::now(), Duration::from_millis(50)).await.unwrap_err();
    assert!(second.contains("others, who came before, took longer than"), "{second}");
    let others: Vec<[Entry; 1]> = (3..23).map(|number| [entry(number)]).collect();
    let telling = others.iter().map(|entries| audit.tell(entries, Timestamp::now(), IN_TIME));
    for told in futures::future::join_all(telling).await {
        told.unwrap();
    }
    let moved = world.api.take_writes().iter().filter(|write| write.plural == "configmaps").count();
    assert_eq!(moved, 2, "once for who did not wait, and once for all others");
    let uids: Vec<String> = world.entries().await.into_iter().map(|entry| entry.object.uid).collect();
    let expected: Vec<String> = (0..23).filter(|number| *number != 2).map(|number: usize| number.to_string()).collect();
    assert_eq!(uids, expected, "who was refused before their turn has done nothing");
}

#[tokio::test]
async fn nothing_goes_on_while_it_cannot_be_written_down() {
    let world = World::new(1).await;
    world.commit("c").await;
    let away = |away| world.store.away.store(away, Ordering::SeqCst);
    let jane = world.say("jane", "c", Reject).await;
    away(true);
    let status = world.reconcile("c").await;
    assert_eq!(
        status.phase,
        Some(CommitPhase::AwaitingApproval),
        "what was said is not seen before it is written down"
    );
    let approved = conditions::get(&status.conditions, conditions::APPROVED).unwrap();
    assert_eq!(approved.reason, conditions::reason::AUDIT_LOG_UNAVAILABLE);
    assert!(approved.message.contains("the audit log cannot be written") && approved.message.contains("docs/audit.md"));
    assert_eq!(world.told(conditions::reason::AUDIT_LOG_UNAVAILABLE).len(), 1);
    assert!(world.api.get::<AetherApproval>(NAMESPACE, &jane).unwrap().status.is_none());
    let refused = world.withdraw("jane", &jane).await.unwrap_err();
    assert!(refused.contains("cannot be withdrawn now") && refused.contains("audit log"), "{refused}");
    away(false);
    world.withdraw("jane", &jane).await.unwrap();
    for who in ["jane", "joe"] {
        world.say(who, "c", Approve).await;
    }
    // Who approved is written, and then that it is released is not.
    let seen: AetherCommit = world.api.get(NAMESPACE, "c").unwrap();
    let store = world.store.clone();
    world.api.before_writes(move |write| {
        if write.plural == "aetherapprovals" {
            store.away.store(true, Ordering::SeqCst);
        }
        Fate::Answered
    });
    aether_operator::commit::reconcile(Arc::new(seen), world.operators[0].0.clone()).await.unwrap();
    let status = world.api.get::<AetherCommit>(NAMESPACE, "c").unwrap().status.unwrap();
    assert_eq!(status.phase, Some(CommitPhase::AwaitingApproval));
    world.api.before_writes(|_| Fate::Answered);
    away(false);
    assert_eq!(world.reconcile("c").await.phase, Some(CommitPhase::Running));
    away(true);
    let status = world.reconcile("c").await;
    assert_eq!((status.phase, status.finished.is_some()), (Some(CommitPhase::Running), false));
    let complete = conditions::get(&status.conditions, conditions::COMPLETE).unwrap();
    assert_eq!(complete.reason, conditions::reason::AUDIT_LOG_UNAVAILABLE);
    away(false);
    assert_eq!(world.reconcile("c").await.phase, Some(CommitPhase::Succeeded));
    let verbs: Vec<Verb> = world.entries().await.iter().map(|entry| entry.verb).collect();
    let expected = [Verb::Requested, Verb::Rejected, Verb::Withdrawn, Verb::Approved, Verb::Approved, Verb::Released];
    assert_eq!(verbs, [&expected[..], &[Verb::Succeeded]].concat());
    let source: AetherSource = world.api.get(NAMESPACE, "linux").unwrap();
    assert_eq!(source.status.unwrap().revisions.len(), 2, "it was promoted once");
}

#[tokio::test]
async fn a_note_is_a_line_each_time_that_it_is_turned() {
    let world = World::new(2).await;
    let spec = json!({"checkpoint": "c", "path": "a", "text": "why?"});
    let mut note = AetherNote::new("n", serde_json::from_value(spec).unwrap());
    note.metadata.namespace = Some(NAMESPACE.into());
    let dry = world.ask::<AetherNote>("jane", "CREATE", serde_json::to_value(&note).unwrap(), &Value::Null, true).await;
    dry.unwrap();
    world.create("jane", &note).await.unwrap();
    for (generation, resolved, who) in [(1, true, "agent"), (2, false, "jane"), (3, true, "agent"), (4, true, "joe")] {
        world.api.change::<AetherNote>(NAMESPACE, "n", |note| note.metadata.generation = Some(generation));
        let old = serde_json::to_value(world.api.get::<AetherNote>(NAMESPACE, "n").unwrap()).unwrap();
        let mut new = old.clone();
        new["spec"]["resolved"] = resolved.into();
        world.ask::<AetherNote>(who, "UPDATE", new, &old, true).await.unwrap();
        let mut new = old.clone();
        new["spec"]["resolved"] = resolved.into();
        let stored: AetherNote =
            serde_json::from_value(world.ask::<AetherNote>(who, "UPDATE", new, &old, false).await.unwrap()).unwrap();
        world.api.put(&stored);
    }
    assert_eq!(world.lines().await, ["jane Noted n", "agent Resolved n", "jane Reopened n", "agent Resolved n"]);
    assert!(world.told("Reopened").iter().any(|told| told == "by jane: why?"));
    world.store.away.store(true, Ordering::SeqCst);
    note.metadata.name = Some("other".into());
    assert!(world.create("jane", &note).await.unwrap_err().contains("audit log"));
}

fn entry(number: usize) -> Entry {
    let object =
        Object { kind: "AetherNote".into(), namespace: NAMESPACE.into(), name: "n".into(), uid: number.to_string() };
    Entry { time: Timestamp::now(), actor: "jane".into(), verb: Verb::Noted, object, root: None, occasion: 0 }
}

/// An audit log whose tree is pinned in a store that knows roots.
struct Pinned {
    api: ApiServer,
    store: Arc<MemoryStore>,
    roots: Roots,
    address: String,
}

impl Pinned {
    async fn new() -> Self {
        let roots = Roots::default();
        let address = roots.serve().await;
        Self { api: ApiServer::new(), store: Arc::new(MemoryStore::new()), roots, address }
    }

    fn pins(&self) -> Pins {
        Pins::connect(&self.address, &Credentials::default()).unwrap()
    }

    fn audit(&self) -> Arc<Audit> {
        audit_in(&self.api, self.store.clone(), self.pins())
    }

    async fn count(&self) -> u64 {
        let client = self.api.client();
        let anchor = ClusterAnchor::new(&client, SYSTEM, self.pins(), Events::new(&client, "reader"));
        Log { store: self.store.as_ref(), anchor: &anchor }.verify([], |_| {}).await.unwrap().count
    }

    fn end(&self) -> String {
        let data = self.api.get::<ConfigMap>(SYSTEM, NAME).unwrap().data.unwrap();
        format!("{:0>20}-{}", data["lines"], data["hash"])
    }
}

#[tokio::test]
async fn operators_at_one_time_lose_no_line_and_leave_one_pin() {
    let world = Pinned::new().await;
    let writers = (0..3usize).map(|writer| {
        let audit = world.audit();
        tokio::spawn(async move {
            for number in 0..8 {
                audit
                    .tell(&[entry(writer * 100 + number), entry(1000 + number)], Timestamp::now(), IN_TIME)
                    .await
                    .unwrap();
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    assert_eq!(world.count().await, 3 * 8 + 8);
    world.audit().tell(&[entry(5000)], Timestamp::now(), IN_TIME).await.unwrap();
    assert_eq!(world.roots.names(AUDIT_LOG), [world.end()], "what others had pinned is given up");
}

#[tokio::test]
async fn killed_at_any_write_the_log_is_whole_and_the_line_is_there_once() {
    let world = Pinned::new().await;
    for number in 0..6 {
        // The answer to the ConfigMap's write is lost, so that the writer does not know; another comes with the same line.
        let mut first = true;
        world.api.before_writes(move |write| {
            let lost = write.plural == "configmaps" && std::mem::take(&mut first);
            if lost { Fate::AnswerLost } else { Fate::Answered }
        });
        world.audit().tell(&[entry(number)], Timestamp::now(), IN_TIME).await.unwrap_err();
        world.audit().tell(&[entry(number)], Timestamp::now(), IN_TIME).await.unwrap();
        assert_eq!(world.count().await, number as u64 + 1);
        // Pinned, and killed before the ConfigMap was moved: that pin is ahead, and then given up.
        let ahead = format!("{:0>20}-{}", number + 2, aether_cas::Digest::of(b"another line"));
        world.roots.0.lock().unwrap().push(aether_proto::store::v1::Root {
            name: ahead.clone(),
            tree: Blob::of(b"x").to_string(),
            ..common::store::root(NAME, AUDIT_LOG)
        });
        assert_eq!(world.count().await, number as u64 + 1, "the ConfigMap says what the log is");
    }
    world.audit().tell(&[entry(100)], Timestamp::now(), IN_TIME).await.unwrap();
    assert_eq!(world.roots.names(AUDIT_LOG), [world.end()]);
}

#[tokio::test]
async fn a_lost_end_is_found_again_in_the_pins_and_begins_no_other_log() {
    let world = Pinned::new().await;
    world.audit().tell(&(0..5).map(entry).collect::<Vec<_>>(), Timestamp::now(), IN_TIME).await.unwrap();
    let end = world.end();
    world.api.remove::<ConfigMap>(SYSTEM, NAME);
    world.audit().tell(&[entry(3)], Timestamp::now(), IN_TIME).await.unwrap();
    assert_eq!((world.end(), world.count().await), (end, 5));
    let told: Vec<Event> = world.api.all();
    assert!(told.iter().any(|event| event.reason.as_deref() == Some("AuditLogRecovered")), "{told:?}");

    // Only who knows where it ends gives it up, and begins another when the ConfigMap is deleted too.
    let client = world.api.client();
    let anchor = ClusterAnchor::new(&client, SYSTEM, world.pins(), Events::new(&client, "audit"));
    anchor.forget(Head::EMPTY).await.unwrap_err();
    assert_eq!(world.roots.names(AUDIT_LOG).len(), 1);
    let (count, hash) = (5, world.end()[21..].parse().unwrap());
    anchor.forget(Head { count, hash }).await.unwrap();
    world.api.remove::<ConfigMap>(SYSTEM, NAME);
    world
        .audit()
        .tell(&(0..5).map(|number| entry(number + 20)).collect::<Vec<_>>(), Timestamp::now(), IN_TIME)
        .await
        .unwrap();
    assert_eq!(world.count().await, 5);

    // Who was there all the time writes in the new one what the old one told.
    let audit = world.audit();
    audit.tell(&[entry(20), entry(21)], Timestamp::now(), IN_TIME).await.unwrap();
    let (count, hash) = (5, world.end()[21..].parse().unwrap());
    anchor.forget(Head { count, hash }).await.unwrap();
    world.api.remove::<ConfigMap>(SYSTEM, NAME);
    audit.tell(&[entry(30)], Timestamp::now(), IN_TIME).await.unwrap();
    audit.tell(&[entry(20), entry(21)], Timestamp::now(), IN_TIME).await.unwrap();
    assert_eq!(world.count().await, 3);
    audit.tell(&(31..33).map(entry).collect::<Vec<_>>(), Timestamp::now(), IN_TIME).await.unwrap();

    // Which of two was the log nobody knows.
    let other = format!("{:0>20}-{}", 5, aether_cas::Digest::of(b"another line"));
    world.roots.0.lock().unwrap().push(aether_proto::store::v1::Root {
        name: other,
        tree: Blob::of(b"x").to_string(),
        ..common::store::root(NAME, AUDIT_LOG)
    });
    world.api.remove::<ConfigMap>(SYSTEM, NAME);
    let refused = world.audit().tell(&[entry(9)], Timestamp::now(), IN_TIME).await.unwrap_err();
    assert!(refused.contains("by hand"), "{refused}");
    assert!(world.api.get::<ConfigMap>(SYSTEM, NAME).is_none());
}

#[tokio::test]
async fn an_end_that_somebody_has_changed_is_found_and_nothing_is_written_there() {
    let world = Pinned::new().await;
    let audit = world.audit();
    audit.tell(&[entry(0), entry(1)], Timestamp::now(), IN_TIME).await.unwrap();
    let early: ConfigMap = world.api.get(SYSTEM, NAME).unwrap();
    audit.tell(&[entry(2)], Timestamp::now(), IN_TIME).await.unwrap();
    let late: ConfigMap = world.api.get(SYSTEM, NAME).unwrap();
    let (early, late) = (early.data.unwrap(), late.data.unwrap());
    for key in ["root", "lines", "hash"] {
        let mut data = late.clone();
        data.insert(key.into(), early[key].clone());
        world.api.change::<ConfigMap>(SYSTEM, NAME, |map| map.data = Some(data));
        let refused = audit.tell(&[entry(9)], Timestamp::now(), IN_TIME).await.unwrap_err();
        assert!(refused.contains("broken") && refused.contains("audit verify"), "{key}: {refused}");
    }
    world.api.change::<ConfigMap>(SYSTEM, NAME, |map| map.data = None);
    let refused = audit.tell(&[entry(9)], Timestamp::now(), IN_TIME).await.unwrap_err();
    assert!(refused.contains("delete it"), "{refused}");
    world.api.change::<ConfigMap>(SYSTEM, NAME, |map| map.data = Some(late));
    audit.tell(&[entry(9)], Timestamp::now(), IN_TIME).await.unwrap();
    assert_eq!(world.count().await, 4);
}

#[tokio::test]
async fn no_sweep_takes_the_log_for_a_stray() {
    let world = Pinned::new().await;
    world.audit().tell(&[entry(0)], Timestamp::now(), IN_TIME).await.unwrap();
    let operator = Operator { api: world.api.clone(), context: Operator::new().context };
    operator.put_source("linux");
    let mut system = Namespace::default();
    system.metadata.name = Some("kube-system".into());
    system.metadata.creation_timestamp = Some(Time(Timestamp::now() - jiff::SignedDuration::from_hours(2)));
    world.api.put(&system);
    let uid = world.api.get::<AetherSource>(NAMESPACE, "linux").unwrap().uid().unwrap();
    world.roots.pin(&uid, CHECKPOINT);
    world.roots.pin("uid-gone", CHECKPOINT);
    let arguments =
        ["aether-operator", "--store", &world.address, "--importer-image=i", "--worker-image=w", "--command-image=c"];
    let mut context = Context::new(world.api.client(), Config::parse_from(arguments), world.pins(), world.audit());
    context.orphans = Orphans::new(Duration::from_millis(1));
    let context = Arc::new(context);
    for _ in 0..3 {
        aether_operator::sweep::sweep(&context).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(world.roots.owners(), [NAME, &uid], "what is gone is swept, the log is not");
}
