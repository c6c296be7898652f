//! Nothing leaves a session without the reviewers whom its source demands, whatever an agent may do; on a cluster with real users.

mod audit;
mod export;
mod killed;
mod operator;
mod rules;

use aether_api::AetherCommit;
use aether_api::approval::Decision::{Approve, Reject};
use aether_api::commit::CommitPhase;
use aether_api::conditions::{self, reason};
use aether_api::names::{COMMIT_UID_LABEL, approval_name};
use aether_e2e::team::repository::PASSWORD;
use aether_e2e::team::{Team, create, refused, refused_to_create, with_team};
use aether_e2e::testing::LIMIT;
use aether_e2e::wait;
use anyhow::{Context, Result, ensure};
use k8s_openapi::api::batch::v1::Job;
use kube::ResourceExt;
use kube::api::ListParams;
use serde_json::{Value, json};

use self::operator::Operator;
use crate::{alone_with_namespace, with_namespace};

/// Changes of all kinds that git knows.
const EDIT: &str = r"
    echo another >>README.md; chmod 755 later.sh; chmod 644 run.sh; rm gone.txt; mv before.txt after.txt
    ln -sfn deep/er/file link; rm dangling; ln -s README.md new-link; mkdir -p new/folder; echo '#!/bin/sh' >'new/folder/a name.sh'
    chmod 755 'new/folder/a name.sh'; : >empty; head -c 200000 /dev/urandom >large";

/// What somebody would send who wants to be somebody else.
fn forged(user: &str) -> Value {
    json!({"username": user, "uid": "1", "groups": ["reviewers", "system:masters"]})
}

fn forged_signature() -> Value {
    json!({"key": "0", "time": "2026-01-01T00:00:00Z", "value": "00"})
}

#[tokio::test(flavor = "multi_thread")]
async fn two_reviewers_release_exactly_the_tree_that_they_saw() -> Result<()> {
    with_namespace("review", async |test| with_team(test, released).await).await
}

async fn released(team: &Team<'_>) -> Result<()> {
    team.work(EDIT).await?;
    let listing = team.listing().await?;
    team.checkpoint("edited").await?;
    create(&team.of("ada")?, &team.request("fix", "edited")).await?;
    let root = root_of(&team.until_waiting("fix", 0).await?)?;

    // A rejection holds it for as long as it stands, whoever else approves.
    team.decide("grace", "fix", &root, Reject).await?;
    team.until_phase("fix", CommitPhase::Rejected).await?;
    team.decide("linus", "fix", &root, Approve).await?;
    ensure!(team.verdict("linus", "fix").await?.is_none(), "an approval does not count beside a rejection");
    let status = team.until_phase("fix", CommitPhase::Rejected).await?.status.context("a status")?;
    let approvals = status.approvals.context("approvals")?;
    ensure!(approvals.rejected == [team.user("grace")], "rejected by {:?}", approvals.rejected);
    team.withdraw("grace", "fix").await?;
    let waiting = team.until_waiting("fix", 1).await?.status.context("a status")?.approvals.context("approvals")?;
    ensure!(waiting.by == [team.user("linus")] && !waiting.missing.is_empty(), "{waiting:?}");
    ensure!(!team.repository.has("agents/fix").await?, "it was pushed with one approval of two");

    team.decide("grace", "fix", &root, Approve).await?;
    let commit = team.until_phase("fix", CommitPhase::Succeeded).await?;
    team.is_pushed(&commit, &listing).await?;
    ensure!(jobs_of(team, &commit).await? == 1, "there were several Jobs");
    // It is the record: nothing can be said of it any more.
    let after = team.voice("grace", "fix", &root, Reject);
    team.withdraw("grace", "fix").await?;
    refused_to_create(&team.of("grace")?, &after, &["has ended"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_gets_nothing_out_by_itself() -> Result<()> {
    with_namespace("review-agent", async |test| with_team(test, alone).await).await
}

async fn alone(team: &Team<'_>) -> Result<()> {
    let (ada, namespace, platform) = (team.of("ada")?, &team.test.namespace, team.platform());
    team.work("echo mine >>README.md").await?;
    team.checkpoint("edited").await?;

    // Who asks is whom the API server knows, whatever is sent.
    let mut request = team.request("fix", "edited");
    request["spec"]["requestedBy"] = forged(&team.user("grace"));
    request["spec"]["signature"] = forged_signature();
    let made = create(&ada, &request).await?;
    let by = &made["spec"]["requestedBy"];
    ensure!(by["username"] == team.user("ada") && by["groups"] != forged("")["groups"], "it was asked for by {by}");
    ensure!(made["spec"]["signature"]["value"] != "00", "a signature was taken over");
    let root = root_of(&team.until_waiting("fix", 0).await?)?;
    let branch = json!({"spec": {"target": {"git": {"branch": "agents/other"}}}}).to_string();
    let change = ["patch", "aethercommit", "fix", "--type=merge", "--patch"];
    refused(&ada, &[&change[..], &[&branch]].concat(), &["forbidden"]).await?;
    // Also with a right that it should not have.
    team.mistake(namespace, "patch", "aethercommits").await?;
    refused(&ada, &[&change[..], &[&branch]].concat(), &["cannot be changed"]).await?;
    let other = json!({"spec": {"requestedBy": forged(&team.user("grace"))}}).to_string();
    ada.kubectl(&[&change[..], &[&other]].concat()).await?;
    let commit: AetherCommit = team.test.api().get("fix").await?;
    let by = commit.spec.requested_by.context("who asked")?.username;
    ensure!(by == team.user("ada"), "it was changed to {by}");
    let patch = json!({"status": {"phase": "Running"}}).to_string();
    let status = ["patch", "aethercommit", "fix", "--subresource=status", "--type=merge", "--patch", &patch];
    refused(&ada, &status, &["forbidden"]).await?;
    // The branch is one that the source takes.
    let mut elsewhere = team.request("elsewhere", "edited");
    elsewhere["spec"]["target"]["git"]["branch"] = "main".into();
    create(&ada, &elsewhere).await?;
    let failed = team.until_phase("elsewhere", CommitPhase::Failed).await?;
    let said = serde_json::to_string(&failed.status.context("a status")?.conditions)?;
    ensure!(said.contains("agents/*"), "it does not say which branches: {said}");

    // The agent may not approve; given the right to by mistake, not of this source; and given that, not its own work.
    let mut voice = team.voice("ada", "fix", &root, Approve);
    voice["spec"]["reviewer"] = forged(&team.user("grace"));
    voice["spec"]["signature"] = forged_signature();
    refused_to_create(&ada, &voice, &["forbidden", "aetherapprovals"]).await?;
    team.mistake(namespace, "create", "aetherapprovals").await?;
    refused_to_create(&ada, &voice, &["verb approve"]).await?;
    // Nor in the name of another.
    let mut other = voice.clone();
    other["metadata"]["name"] = approval_name("fix", &team.user("grace")).into();
    refused_to_create(&ada, &other, &["everybody has one voice"]).await?;
    team.mistake(platform, "approve", "aethersources").await?;
    let made = create(&ada, &voice).await?;
    ensure!(made["spec"]["reviewer"]["username"] == team.user("ada"), "it was made by {}", made["spec"]["reviewer"]);
    let verdict = team.verdict("ada", "fix").await?.unwrap_or_default();
    ensure!(verdict.contains("own work"), "why it does not count: {verdict}");
    team.until_waiting("fix", 0).await?;

    // Nor the rule, nor the Secret, nor a pod where the Secret is.
    let patch = json!({"spec": {"review": {"required": 0}}}).to_string();
    let there = ada.in_namespace(platform);
    refused(&there, &["patch", "aethersource", team.source(), "--type=merge", "--patch", &patch], &["forbidden"])
        .await?;
    refused(&there, &["get", "secret", &team.push_secret()], &["forbidden"]).await?;
    refused(&there, &["run", "thief", "--image=aether/tools:dev"], &["forbidden"]).await?;
    refused(&there, &["get", "jobs,pods"], &["forbidden"]).await?;

    from_its_pod(team, &root).await?;

    // A reviewer without the verb, and somebody who has nothing to do with it.
    let vera = team.of("vera")?;
    vera.kubectl(&["get", "aethercommit", "fix"]).await?;
    let voice = team.voice("vera", "fix", &root, Approve);
    refused_to_create(&vera, &voice, &["verb approve"]).await?;
    let words: &[&str] = &["forbidden"];
    let otto = team.of("otto")?;
    for namespace in [namespace.as_str(), platform] {
        let otto = otto.in_namespace(namespace);
        for kind in ["source", "session", "checkpoint", "commit", "approval", "note", "command", "restore"] {
            refused(&otto, &["get", &format!("aether{kind}s")], words).await?;
        }
    }
    let changes =
        |of: &str| format!("/apis/review.aether.dev/v1alpha1/namespaces/{namespace}/checkpoints/{of}/changes");
    vera.kubectl(&["get", "--raw", &changes("edited")]).await?;
    refused(&otto, &["get", "--raw", &changes("edited")], words).await?;
    team.until_waiting("fix", 0).await?;
    ensure!(!team.repository.has("agents/fix").await?, "it was pushed");
    Ok(())
}

/// The same from where agents are: a pod with a token of theirs.
async fn from_its_pod(team: &Team<'_>, root: &str) -> Result<()> {
    let (namespace, platform) = (&team.test.namespace, team.platform());
    let of = |namespace: &str, what: &str| format!("/apis/aether.dev/v1alpha1/namespaces/{namespace}/{what}");
    let (code, said) = team.ask_from_pod("GET", &of(namespace, "aethercommits/fix"), &Value::Null).await?;
    ensure!(code == 200, "the pod has no token that is good: {code} {said}");
    let secret = format!("/api/v1/namespaces/{platform}/secrets/{}", team.push_secret());
    let rule = json!({"spec": {"review": {"required": 0}}});
    for (method, path, body) in [
        ("GET", secret, Value::Null),
        ("PATCH", of(platform, &format!("aethersources/{}", team.source())), rule),
        ("POST", of(namespace, "aetherapprovals"), team.voice("grace", "fix", root, Approve)),
    ] {
        let (code, said) = team.ask_from_pod(method, &path, &body).await?;
        ensure!(code == 403, "{method} {path} is answered with {code}: {said}");
    }
    // The Secret was used to import what the session has, and is nowhere in it.
    let search = format!(
        "{{ env; grep -rsF {PASSWORD} /workspace /run /var/run /etc /tmp /home; }} | grep -F {PASSWORD} || true"
    );
    let found = team.work(&search).await?;
    ensure!(found.is_empty(), "the password is in the agent's pod: {found}");
    let url = team.repository.url();
    let push = format!("GIT_TERMINAL_PROMPT=0 git -c http.sslVerify=false push {url} HEAD:refs/heads/agents/fix 2>&1");
    let output = team.test.tools.exec_output("agent", &format!("cd /workspace; {push}")).await?;
    ensure!(output.code != 0 && output.stdout.contains("could not read Username"), "a push: {}", output.stdout);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_approval_is_of_one_tree() -> Result<()> {
    with_namespace("review-tree", async |test| with_team(test, one_tree).await).await
}

async fn one_tree(team: &Team<'_>) -> Result<()> {
    let ada = team.of("ada")?;
    team.work("echo reviewed >>README.md").await?;
    let (listing, root) = (team.listing().await?, team.checkpoint("mine").await?);
    team.checkpoint("kept").await?;
    create(&ada, &team.request("fix", "mine")).await?;
    team.until_waiting("fix", 0).await?;
    team.decide("grace", "fix", &root, Approve).await?;
    team.until_waiting("fix", 1).await?;

    // Another tree under the checkpoint's name changes nothing of what was asked for.
    team.work("echo smuggled >>README.md").await?;
    ada.kubectl(&["delete", "aethercheckpoint", "mine"]).await?;
    let other = team.checkpoint("mine").await?;
    ensure!(other != root, "another tree has the same name: {root}");
    // To get that out takes another commit, for which nothing counts that was said of the first one, nor of its tree.
    create(&ada, &team.request("second", "mine")).await?;
    ensure!(root_of(&team.until_waiting("second", 0).await?)? == other, "it is not of the new tree");
    for who in ["grace", "linus"] {
        team.decide(who, "second", &root, Approve).await?;
        let verdict = team.verdict(who, "second").await?.context("an approval of another tree counts")?;
        ensure!(verdict.contains(&root) && verdict.contains(&other), "why it does not count: {verdict}");
    }
    let stale = ["grace", "linus"].map(|who| approval_name("second", &team.user(who)));
    let is_stale = |commit: &AetherCommit| {
        let approvals = commit.status.as_ref().and_then(|status| status.approvals.clone()).unwrap_or_default();
        approvals.have == 0 && stale.iter().all(|name| approvals.stale.contains(name))
    };
    team.test.until("second", "names both approvals as stale", is_stale).await?;
    ensure!(root_of(&team.until_waiting("fix", 1).await?)? == root, "the first commit is of another tree now");
    for branch in ["agents/fix", "agents/second"] {
        ensure!(!team.repository.has(branch).await?, "{branch} was pushed");
    }

    // The tree is reached again, by a restore: what is said of it is said of the first commit.
    let mut restore = ada.aether_command(&["restore", "work", "kept", "--yes"]);
    aether_e2e::command::expect_success(&mut restore).await?;
    let back = team.checkpoint("back").await?;
    ensure!(back == root, "the restored session is {back}, it was {root}");
    team.decide("linus", "fix", &back, Approve).await?;
    let commit = team.until_phase("fix", CommitPhase::Succeeded).await?;
    team.is_pushed(&commit, &listing).await?;
    ensure!(is_stale(&team.until_waiting("second", 0).await?), "the second commit has approvals");
    ensure!(!team.repository.has("agents/second").await?, "the tree that nobody approved was pushed");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_webhook_is_away_nothing_is_approved() -> Result<()> {
    alone_with_namespace("review-away", async |test| {
        let operator = Operator::find(test).await?;
        let played = with_team(test, async |team| unhooked(team, &operator).await).await;
        let back = operator.give_back().await;
        played?;
        back
    })
    .await
}

async fn unhooked(team: &Team<'_>, operator: &Operator<'_>) -> Result<()> {
    let (ada, grace) = (team.of("ada")?, team.of("grace")?);
    team.work("echo mine >>README.md").await?;
    let root = team.checkpoint("edited").await?;
    create(&ada, &team.request("fix", "edited")).await?;
    team.until_waiting("fix", 0).await?;
    team.mistake(&team.test.namespace, "create", "aetherapprovals").await?;

    // No operator: nobody can approve or ask.
    operator.scale(0).await?;
    let voice = team.voice("grace", "fix", &root, Approve);
    refused_to_create(&grace, &voice, &["webhook"]).await?;
    refused_to_create(&ada, &team.request("late", "edited"), &["webhook"]).await?;

    // Nor does it help when the API server asks nobody: what is written then proves nothing. The agent speaks as both reviewers.
    operator.unhook().await?;
    for who in ["grace", "linus"] {
        let mut voice = team.voice(who, "fix", &root, Approve);
        voice["spec"]["reviewer"] = forged(&team.user(who));
        voice["spec"]["signature"] = forged_signature();
        create(&ada, &voice).await?;
    }
    let mut late = team.request("late", "edited");
    late["spec"]["requestedBy"] = forged(&team.user("grace"));
    late["spec"]["signature"] = forged_signature();
    create(&ada, &late).await?;
    operator.give_back().await?;
    for who in ["grace", "linus"] {
        let verdict = team.verdict(who, "fix").await?.context("a forged approval counts")?;
        ensure!(verdict.contains("sign"), "why it does not count: {verdict}");
    }
    team.until_waiting("fix", 0).await?;
    let unbelieved = |commit: &AetherCommit| {
        let conditions = commit.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
        conditions::get(conditions, conditions::APPROVED)
            .is_some_and(|approved| approved.status == "False" && approved.reason == reason::NOT_SIGNED)
    };
    team.test.until("late", "is not believed", unbelieved).await?;
    // Deleting a rejection is the reviewers' right, and so is it to take back what was said in their name.
    for who in ["grace", "linus"] {
        team.withdraw(who, "fix").await?;
        team.decide(who, "fix", &root, Approve).await?;
    }
    team.until_phase("fix", CommitPhase::Succeeded).await?;
    ensure!(!team.repository.has("agents/late").await?, "what nobody signed was pushed");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_operators_that_are_killed_push_once() -> Result<()> {
    alone_with_namespace("review-killed", async |test| {
        let operator = Operator::find(test).await?;
        let played = with_team(test, async |team| killed(team, &operator).await).await;
        let back = operator.give_back().await;
        played?;
        back
    })
    .await
}

async fn killed(team: &Team<'_>, operator: &Operator<'_>) -> Result<()> {
    operator.scale(2).await?;
    team.work(EDIT).await?;
    let listing = team.listing().await?;
    let root = team.checkpoint("edited").await?;
    create(&team.of("ada")?, &team.request("fix", "edited")).await?;
    team.until_waiting("fix", 0).await?;
    team.decide("grace", "fix", &root, Approve).await?;
    team.until_waiting("fix", 1).await?;
    // At the release, and again when there is a Job of it.
    team.decide("linus", "fix", &root, Approve).await?;
    let mut killed = operator.kill().await?;
    let api = team.platform_api::<Job>();
    wait::until("there is a Job", 2 * LIMIT, async || {
        let commit: AetherCommit = team.test.api().get("fix").await?;
        let label = format!("{COMMIT_UID_LABEL}={}", commit.uid().unwrap_or_default());
        Ok((!api.list(&ListParams::default().labels(&label)).await?.items.is_empty()).then_some(()))
    })
    .await?;
    killed += operator.kill().await?;
    ensure!(killed >= 3, "{killed} operators were killed");
    let commit = team.until_phase("fix", CommitPhase::Succeeded).await?;
    team.is_pushed(&commit, &listing).await?;
    ensure!(jobs_of(team, &commit).await? == 1, "there were several Jobs");
    eprintln!("review-killed: {killed} operators killed around the release of one commit");
    Ok(())
}

fn root_of(commit: &AetherCommit) -> Result<String> {
    commit.status.as_ref().and_then(|status| status.root.clone()).context("the commit names no tree")
}

/// How many Jobs were made for a commit.
async fn jobs_of(team: &Team<'_>, commit: &AetherCommit) -> Result<usize> {
    let label = format!("{COMMIT_UID_LABEL}={}", commit.uid().unwrap_or_default());
    Ok(team.platform_api::<Job>().list(&ListParams::default().labels(&label)).await?.items.len())
}
