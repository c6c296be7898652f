//! A session of an agent, a source with a rule, and people who ask and decide, each by way of the webhook.

use std::sync::Arc;

use aether_api::approval::Decision;
use aether_api::commit::{GitTarget, Target};
use aether_api::identity::Identity;
use aether_api::review::ReviewRule;
use aether_api::source::GitSource;
use aether_api::{
    AetherApproval, AetherApprovalSpec, AetherApprovalStatus, AetherCheckpoint, AetherCommit, AetherCommitSpec,
    AetherCommitStatus, AetherSession, AetherSource, names,
};
use aether_operator::admission::{Admission, Request};
use aether_operator::context::Context;
use aether_operator::pins::Pins;
use aether_operator::signature::{self, Keys};
use clap::Parser;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Namespace, PersistentVolumeClaim, Pod, Secret};
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::common::{NAMESPACE, Operator};

pub(crate) struct World {
    pub(crate) operator: Operator,
    pub(crate) admission: Admission,
}

pub(crate) fn user(name: &str) -> Identity {
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
    pub(crate) async fn new(rule: ReviewRule) -> Self {
        let api = aether_testkit::ApiServer::new();
        let arguments = "aether-operator --store http://store --importer-image i:1 --worker-image w:1 --command-image t:1 --committer-image committer:1";
        let config = aether_operator::config::Config::parse_from(arguments.split(' '));
        let audit = crate::common::audit(&api);
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

    pub(crate) async fn ask<K: Resource<DynamicType = ()> + Serialize>(
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
    pub(crate) async fn create<K>(&self, who: &str, object: &K) -> Result<String, String>
    where
        K: Resource<DynamicType = ()> + Serialize + DeserializeOwned,
    {
        let stamped: K = serde_json::from_value(self.ask(who, "CREATE", object, Value::Null).await?).unwrap();
        self.operator.api.put(&stamped);
        Ok(stamped.meta().name.clone().unwrap())
    }

    pub(crate) async fn commit(&self, change: impl FnOnce(&mut AetherCommitSpec)) -> String {
        let mut spec =
            AetherCommitSpec { session: Some("fix".into()), target: git("agents/fix"), ..Default::default() };
        change(&mut spec);
        let mut commit = AetherCommit::new("", spec);
        commit.metadata.namespace = Some(NAMESPACE.into());
        commit.metadata.name = None;
        commit.metadata.generate_name = Some("fix-".into());
        self.create("agent", &commit).await.unwrap()
    }

    pub(crate) async fn say(&self, who: &str, commit: &str, root: &str, decision: Decision) -> Result<String, String> {
        self.create(who, &approval(commit, root, decision)).await
    }

    pub(crate) async fn withdraw(&self, who: &str, name: &str) {
        let approval: AetherApproval = self.operator.api.get(NAMESPACE, name).unwrap();
        self.ask(who, "DELETE", &approval, serde_json::to_value(&approval).unwrap()).await.unwrap();
        self.operator.api.remove::<AetherApproval>(NAMESPACE, name);
    }

    pub(crate) async fn reconcile(&self, name: &str) -> AetherCommitStatus {
        let seen: AetherCommit = self.operator.api.get(NAMESPACE, name).unwrap();
        aether_operator::commit::reconcile(Arc::new(seen), self.operator.context.clone()).await.unwrap();
        self.operator.api.get::<AetherCommit>(NAMESPACE, name).unwrap().status.unwrap()
    }

    /// Until the checkpoint of the commit is taken and its tree is known.
    pub(crate) async fn settled(&self, name: &str) -> AetherCommitStatus {
        self.reconcile(name).await;
        self.checkpoint(name).await;
        let status = self.reconcile(name).await;
        assert!(status.root.is_some(), "{:?}", status.conditions);
        status
    }

    /// What the webhook and the operator do when somebody made a checkpoint.
    pub(crate) async fn checkpoint(&self, name: &str) {
        let mut there: AetherCheckpoint = self.operator.api.get(NAMESPACE, name).unwrap();
        let by = there.annotations().contains_key(names::CREATOR_ANNOTATION);
        if !by {
            self.create("system:serviceaccount:aether-system:aether-operator", &there).await.unwrap();
            there = self.operator.api.get(NAMESPACE, name).unwrap();
        }
        aether_operator::checkpoint::reconcile(Arc::new(there), self.operator.context.clone()).await.unwrap();
    }

    pub(crate) fn verdict(&self, approval: &str) -> AetherApprovalStatus {
        self.operator.api.get::<AetherApproval>(NAMESPACE, approval).unwrap().status.unwrap()
    }

    pub(crate) fn jobs(&self) -> Vec<Job> {
        self.operator.api.all()
    }

    /// What the kubelet says of the only Job's pod, which is as the Job says.
    pub(crate) fn pod(&self, change: impl FnOnce(&mut Pod), message: &Value) {
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

pub(crate) fn git(branch: &str) -> Target {
    let git = GitTarget { branch: branch.into(), message: "costs $1".into(), ..GitTarget::default() };
    Target { git: Some(git), ..Target::default() }
}

pub(crate) fn approval(commit: &str, root: &str, decision: Decision) -> AetherApproval {
    let spec = AetherApprovalSpec { commit: commit.into(), root: root.into(), decision, ..Default::default() };
    let mut approval = AetherApproval::new("", spec);
    approval.metadata.namespace = Some(NAMESPACE.into());
    approval.metadata.name = None;
    approval.metadata.generate_name = Some(format!("{commit}-"));
    approval
}

pub(crate) fn arguments(job: &Job) -> Vec<String> {
    job.spec.as_ref().unwrap().template.spec.as_ref().unwrap().containers[0].args.clone().unwrap()
}

const PUSHED: &str = r#"{"ok":true,"commit":"f00d","tree":"t","branch":"agents/fix","warnings":["1 empty folder"]}"#;

pub(crate) fn pushed() -> Value {
    serde_json::from_str(PUSHED).unwrap()
}

pub(crate) fn two() -> ReviewRule {
    ReviewRule { required: 2, ..ReviewRule::default() }
}
