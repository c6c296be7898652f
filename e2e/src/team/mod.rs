//! Who takes part: a platform team with a source behind a review rule, an agent with a session of it, two reviewers, a reader who
//! must not approve, and an outsider. Each with a client certificate; the agent's pod has a service account. What they share is a
//! [`repository`] on a git server.

pub mod repository;

use aether_api::approval::Decision;
use aether_api::commit::CommitPhase;
use aether_api::names::approval_name;
use aether_api::{AetherApproval, AetherCheckpoint, AetherCommit, AetherSource, conditions};
use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Api;
use serde_json::{Value, json};

use self::repository::{LISTING, Repository};
use crate::story::Story;
use crate::testing::{LIMIT, Test};
use crate::tools::Tools;
use crate::{command, wait};

/// Asks the API server from a pod, with the pod's own token.
const ASK: &str = r#"
import ssl, sys, urllib.error, urllib.request
own = "/var/run/secrets/kubernetes.io/serviceaccount/"
method, path, body = sys.argv[1:]
kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
request = urllib.request.Request("https://10.96.0.1" + path, body.encode() or None, method=method, headers={
    "Authorization": "Bearer " + open(own + "token").read(), "Content-Type": kind})
try:
    answer = urllib.request.urlopen(request, context=ssl.create_default_context(cafile=own + "ca.crt"))
    print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
"#;

/// The agents' namespace is the test's own. The platform team's is the one from which the store lets commits read; what a team has
/// there is called, and labelled, like the agents' namespace.
pub struct Team<'a> {
    /// The test in whose namespace the agent works.
    pub test: &'a Test,
    /// Where the source is from, and commits go to.
    pub repository: Repository,
    session: &'static str,
    platform: Test,
}

/// By which what is the team's is found in the platform team's namespace.
const LABEL: &str = "aether.dev/e2e";

/// Plays with a team whose agent has the session `work`; what it made goes afterwards.
pub async fn with_team<T>(test: &Test, body: impl AsyncFnOnce(&Team<'_>) -> Result<T>) -> Result<T> {
    with_team_at(test, "work", body).await
}

/// As [`with_team`], with a session of this name.
pub async fn with_team_at<T>(
    test: &Test,
    session: &'static str,
    body: impl AsyncFnOnce(&Team<'_>) -> Result<T>,
) -> Result<T> {
    let namespace = test.site.platform_namespace.clone();
    let made = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
    test.tools.apply(&made.to_string()).await?;
    let platform = Test { tools: test.tools.in_namespace(&namespace), namespace, ..test.clone() };
    let team = Team { test, repository: Repository::serve().await?, session, platform };
    let played = match team.settle().await {
        Ok(()) => body(&team).await,
        Err(error) => Err(error),
    };
    if played.is_err() {
        eprintln!("{}", team.platform.dump().await);
    }
    if std::env::var_os("AETHER_KEEP").is_none() {
        team.leave().await?;
    }
    played
}

impl Team<'_> {
    /// The platform team's namespace.
    pub fn platform(&self) -> &str {
        &self.platform.namespace
    }

    /// The name of the source, which is in that namespace.
    pub fn source(&self) -> &str {
        &self.test.namespace
    }

    /// The name of the Secret by which commits are pushed.
    pub fn push_secret(&self) -> String {
        format!("{}-push", self.test.namespace)
    }

    /// Nothing of the team stays outside its own namespace.
    async fn leave(&self) -> Result<()> {
        let label = format!("{LABEL}={}", self.test.namespace);
        let kinds = "aethersources,secrets,rolebindings,roles,clusterrolebindings";
        self.platform.tools.kubectl(&["delete", kinds, "--selector", &label, "--wait=false"]).await.map(drop)
    }

    /// The user behind a first name. Of this test alone, because a kubeconfig is a file of that name.
    pub fn user(&self, name: &str) -> String {
        format!("{name}@{}", self.test.namespace)
    }

    /// kubectl as this person, in the agents' namespace.
    pub fn of(&self, name: &str) -> Result<Tools> {
        let group = match name {
            "grace" | "linus" => Some("reviewers"),
            _ => None,
        };
        Ok(self.test.tools.of_user(self.test.cluster()?.kubeconfig_for(
            &self.user(name),
            group,
            &self.test.namespace,
        )?))
    }

    /// Rights, the source and its Secrets, and an agent at work in a pod.
    async fn settle(&self) -> Result<()> {
        let users = |names: &[&str]| -> Vec<Value> { names.iter().map(|name| subject(&self.user(name))).collect() };
        let mut agents = users(&["ada"]);
        agents.push(json!({"kind": "ServiceAccount", "name": "agent", "namespace": self.test.namespace}));
        self.bind(self.platform(), "aether-platform", &users(&["paula"])).await?;
        self.bind(self.platform(), "admin", &users(&["paula"])).await?;
        self.bind(&self.test.namespace, "aether-agent", &agents).await?;
        // Vera may say what she thinks of commits; it takes a right on the source to make that count.
        self.bind(&self.test.namespace, "aether-approver", &users(&["grace", "linus", "vera"])).await?;
        self.bind(self.platform(), "aether-approver", &users(&["grace", "linus"])).await?;

        // All that is the platform team's it makes by its own rights.
        let paula = self.of("paula")?.in_namespace(self.platform());
        let fetch = format!("{}-fetch", self.test.namespace);
        for secret in [&fetch, &self.push_secret()] {
            paula.apply(&self.labelled(self.repository.secret(secret)).to_string()).await?;
        }
        let git = json!({
            "url": self.repository.url(), "ref": "main",
            "secretRef": {"name": fetch}, "pushSecretRef": {"name": self.push_secret()},
        });
        let review = json!({"required": 2, "groups": [{"name": "reviewers", "required": 2}], "branches": ["agents/*"]});
        let source = json!({
            "apiVersion": "aether.dev/v1alpha1", "kind": "AetherSource", "metadata": {"name": self.source()},
            "spec": {"git": git, "allowedNamespaces": [self.test.namespace], "review": review},
        });
        paula.apply(&self.labelled(source).to_string()).await?;
        self.platform
            .until(self.source(), "is Ready", |source: &AetherSource| {
                let conditions = source.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
                conditions::is_true(conditions, conditions::READY)
            })
            .await?;
        let session = json!({
            "apiVersion": "aether.dev/v1alpha1", "kind": "AetherSession", "metadata": {"name": self.session},
            "spec": {"source": {"namespace": self.platform(), "name": self.source()}, "owner": {"uid": 1000, "gid": 1000}},
        });
        self.of("ada")?.apply(&session.to_string()).await?;
        self.pod().await
    }

    /// The agent's pod, which whoever runs agents makes: agents themselves may make none.
    async fn pod(&self) -> Result<()> {
        self.test.tools.kubectl(&["create", "serviceaccount", "agent"]).await?;
        self.test.until("agent", "has a token", |account: &ServiceAccount| account.secrets.is_some()).await?;
        let story = Story::new(self.test);
        let mut pod = story.pod_manifest("agent", self.session, None, false)?;
        pod["spec"]["serviceAccountName"] = "agent".into();
        self.test.tools.apply(&pod.to_string()).await?;
        self.test.until_ready("agent").await.map(drop)
    }

    /// Binds a ClusterRole in a namespace.
    async fn bind(&self, namespace: &str, role: &str, subjects: &[Value]) -> Result<()> {
        self.bind_to(namespace, json!({"kind": "ClusterRole", "name": role}), subjects).await
    }

    async fn bind_to(&self, namespace: &str, role: Value, subjects: &[Value]) -> Result<()> {
        let name = format!("{}-{}", self.test.namespace, role["name"].as_str().unwrap_or_default());
        let binding = json!({
            "apiVersion": RBAC, "kind": "RoleBinding", "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": role["kind"], "name": role["name"]}, "subjects": subjects,
        });
        self.test.tools.in_namespace(namespace).apply(&self.labelled(binding).to_string()).await
    }

    /// The two reviewers may look at what waits in all namespaces.
    pub async fn review_everywhere(&self) -> Result<()> {
        let subjects = ["grace", "linus"].map(|name| subject(&self.user(name)));
        let binding = json!({
            "apiVersion": RBAC, "kind": "ClusterRoleBinding", "metadata": {"name": format!("{}-reviewers", self.test.namespace)},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "aether-reviewer"},
            "subjects": subjects,
        });
        self.test.tools.apply(&self.labelled(binding).to_string()).await
    }

    /// Gives the agent a right that no role of the chart's gives it, as a platform team may by mistake.
    pub async fn mistake(&self, namespace: &str, verb: &str, resource: &str) -> Result<()> {
        let name = format!("{}-{verb}", self.test.namespace);
        let rule = json!({"apiGroups": ["aether.dev"], "resources": [resource], "verbs": [verb]});
        let role = json!({"apiVersion": RBAC, "kind": "Role", "metadata": {"name": name}, "rules": [rule]});
        self.test.tools.in_namespace(namespace).apply(&self.labelled(role).to_string()).await?;
        self.bind_to(namespace, json!({"kind": "Role", "name": name}), &[subject(&self.user("ada"))]).await
    }

    /// Marked as the team's, so that it goes with it.
    pub fn labelled(&self, mut object: Value) -> Value {
        object["metadata"]["labels"] = json!({LABEL: self.test.namespace});
        object
    }

    /// Runs a script in the agent's workspace.
    pub async fn work(&self, script: &str) -> Result<String> {
        self.test.tools.exec("agent", &format!("cd /workspace; {script}")).await
    }

    /// What the session has, as a clone of it should be.
    pub async fn listing(&self) -> Result<String> {
        self.work(LISTING).await
    }

    /// The agent's pod asks the API server; the code of the answer, and what it says.
    pub async fn ask_from_pod(&self, method: &str, path: &str, body: &Value) -> Result<(u16, String)> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let args = ["exec", "agent", "--", "python3", "-c", ASK, method, path, &body];
        let said = self.test.tools.kubectl(&args).await?;
        let (code, text) = said.split_once(' ').context("a code and a text")?;
        Ok((code.parse()?, text.to_owned()))
    }

    /// The agent takes a checkpoint; its tree.
    pub async fn checkpoint(&self, name: &str) -> Result<String> {
        let mut command =
            self.of("ada")?.aether_command(&["checkpoint", self.session, "--name", name, "--wait", "durable"]);
        command::expect_success(&mut command).await?;
        let checkpoint: AetherCheckpoint = self.test.api().get(name).await?;
        checkpoint.status.and_then(|status| status.root).context("a durable checkpoint has a tree")
    }

    /// What the agent asks for: that a checkpoint becomes a commit of branch `agents/NAME`.
    pub fn request(&self, name: &str, checkpoint: &str) -> Value {
        let git = json!({"branch": format!("agents/{name}"), "message": "Mend it\n\nAll of it.", "rebase": false});
        json!({
            "apiVersion": "aether.dev/v1alpha1", "kind": "AetherCommit", "metadata": {"name": name},
            "spec": {"checkpoint": checkpoint, "target": {"git": git}},
        })
    }

    /// What somebody says of a commit.
    pub fn voice(&self, who: &str, commit: &str, root: &str, decision: Decision) -> Value {
        json!({
            "apiVersion": "aether.dev/v1alpha1", "kind": "AetherApproval",
            "metadata": {"name": approval_name(commit, &self.user(who))},
            "spec": {"commit": commit, "root": root, "decision": decision},
        })
    }

    /// Somebody says it.
    pub async fn decide(&self, who: &str, commit: &str, root: &str, decision: Decision) -> Result<Value> {
        create(&self.of(who)?, &self.voice(who, commit, root, decision)).await
    }

    /// They take it back.
    pub async fn withdraw(&self, who: &str, commit: &str) -> Result<()> {
        let name = approval_name(commit, &self.user(who));
        self.of(who)?.kubectl(&["delete", "aetherapproval", &name]).await.map(drop)
    }

    /// Waits until the operator says of an approval whether it counts; why not.
    pub async fn verdict(&self, who: &str, commit: &str) -> Result<Option<String>> {
        let name = approval_name(commit, &self.user(who));
        let approval: AetherApproval =
            self.test.until(&name, "is judged", |approval: &AetherApproval| approval.status.is_some()).await?;
        Ok(approval.status.filter(|status| !status.counts).map(|status| status.reason.unwrap_or_default()))
    }

    /// Waits until a commit waits for approvals, of which it has so many; the commit.
    pub async fn until_waiting(&self, commit: &str, have: u32) -> Result<AetherCommit> {
        let what = format!("waits, with {have} approvals");
        self.test
            .until(commit, &what, |commit: &AetherCommit| {
                let status = commit.status.clone().unwrap_or_default();
                status.phase == Some(CommitPhase::AwaitingApproval)
                    && status.approvals.is_some_and(|approvals| approvals.have == have && approvals.need == 2)
            })
            .await
    }

    /// Waits until a commit is in a phase; the commit.
    pub async fn until_phase(&self, commit: &str, phase: CommitPhase) -> Result<AetherCommit> {
        let what = format!("is {phase:?}");
        // Parts of ours may have been killed meanwhile, and the kubelet takes its time to start them again.
        let is = |commit: &AetherCommit| commit.status.as_ref().is_some_and(|status| status.phase == Some(phase));
        wait::object(&self.test.api(), commit, &what, 2 * LIMIT, is).await
    }

    /// Fails unless the pushed branch is the agent's tree, file by file, as one commit that tells where it is from.
    pub async fn is_pushed(&self, commit: &AetherCommit, listing: &str) -> Result<()> {
        let status = commit.status.as_ref().context("a status")?;
        let branch = &commit.spec.target.git.as_ref().context("a branch")?.branch;
        let cloned = self.repository.cloned(branch).await?;
        ensure!(cloned == *listing, "the branch is\n{cloned}\nand the session was\n{listing}");
        let namespace = &self.test.namespace;
        let field = |value: &Option<String>| value.clone().unwrap_or_default();
        let mut trailers = vec![
            format!("Aether-Session: {namespace}/{}", field(&status.session)),
            format!("Aether-Checkpoint: {namespace}/{}", field(&status.checkpoint)),
            format!("Aether-Root: {}", field(&status.root)),
            format!("Aether-Commit: {}", field(&commit.metadata.uid)),
            format!("Requested-by: {}", self.user("ada")),
        ];
        trailers.extend(["grace", "linus"].map(|who| format!("Approved-by: {}", self.user(who))));
        self.repository.is_one_commit(branch, &trailers).await?;
        let tip = self.repository.git(&["rev-parse", branch]).await?;
        ensure!(status.commit.as_ref() == Some(&tip), "the status names {:?}, the branch {tip}", status.commit);
        Ok(())
    }

    /// An API of the platform team's namespace, with all rights.
    pub fn platform_api<K>(&self) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        self.platform.api()
    }
}

const RBAC: &str = "rbac.authorization.k8s.io/v1";

fn subject(user: &str) -> Value {
    json!({"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": user})
}

/// Makes an object; as it was stored.
pub async fn create(tools: &Tools, object: &Value) -> Result<Value> {
    let args = ["create", "--filename", "-", "--output=json"];
    let output = tools.kubectl_output(&args, Some(&object.to_string())).await?;
    ensure!(output.code == 0, "kubectl create: {}", output.stderr.trim());
    Ok(serde_json::from_str(&output.stdout)?)
}

/// Fails unless making an object is refused with these words.
pub async fn refused_to_create(tools: &Tools, object: &Value, words: &[&str]) -> Result<()> {
    let args = ["create", "--filename", "-"];
    let output = tools.kubectl_output(&args, Some(&object.to_string())).await?;
    expect_words(&output, words, &object.to_string())
}

/// Fails unless kubectl is refused with these words.
pub async fn refused(tools: &Tools, args: &[&str], words: &[&str]) -> Result<()> {
    let output = tools.kubectl_output(args, None).await?;
    expect_words(&output, words, &args.join(" "))
}

fn expect_words(output: &command::Output, words: &[&str], what: &str) -> Result<()> {
    ensure!(output.code != 0, "{what} was allowed: {}", output.stdout);
    for word in words {
        ensure!(output.stderr.contains(word), "{what}: no {word:?} in {}", output.stderr);
    }
    Ok(())
}
