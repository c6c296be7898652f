//! What a source's rule may demand beside voices, where a commit may go, and what people are told: notes, checks, approvals that
//! expire, revisions, a server behind ssh, events. All of it with one team.

use std::fs;

use aether_api::approval::Decision::{Approve, Reject};
use aether_api::commit::{Approvals, CommitPhase};
use aether_api::names::{CHECK_LABEL, approval_name};
use aether_api::{AetherApproval, AetherCheckpoint, AetherCommand, AetherCommit, AetherNote, AetherSource, conditions};
use aether_e2e::command::{command, expect_success, run};
use aether_e2e::network::HOST;
use aether_e2e::story::Story;
use aether_e2e::team::repository::LISTING;
use aether_e2e::team::{Team, create, refused, with_team};
use aether_e2e::testing::LIMIT;
use aether_e2e::tools::Tools;
use aether_e2e::wait;
use aether_testkit::sshd::Sshd;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{forged, root_of};
use crate::with_namespace;

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_holds_and_what_happens_is_told() -> Result<()> {
    with_namespace("review-rules", async |test| with_team(test, all).await).await
}

async fn all(team: &Team<'_>) -> Result<()> {
    let note = notes(team).await.context("notes")?;
    checks(team).await.context("checks")?;
    expiry(team).await.context("approvals that expire")?;
    over_ssh(team).await.context("a server behind ssh")?;
    promoted(team).await.context("a promoted revision")?;
    told(team, &note).await.context("events")
}

/// What `kubectl aether` prints.
async fn aether(tools: &Tools, args: &[&str]) -> Result<String> {
    Ok(expect_success(&mut tools.aether_command(args)).await?.stdout)
}

/// A note follows its lines, belongs to who made it, and is resolved; its name.
async fn notes(team: &Team<'_>) -> Result<String> {
    let (ada, grace) = (team.of("ada")?, team.of("grace")?);
    team.work("printf '%s\\n' one two three four >counted").await?;
    team.checkpoint("noted").await?;
    let said = aether(&grace, &["note", "add", "checkpoint/noted", "counted:2-3", "-m", "why two and three?"]).await?;
    let name = said.strip_prefix("note ").and_then(|rest| rest.split(' ').next()).context(said.clone())?;
    let by = async || {
        let note: AetherNote = team.test.api().get(name).await?;
        Ok::<_, anyhow::Error>(note.spec.author.context("an author")?.username)
    };
    ensure!(by().await? == team.user("grace"), "it was made by {}", by().await?);
    let listed = async |what: &str| {
        let listed = aether(&grace, &["note", "list", "work", "--all"]).await?;
        ensure!(listed.contains("why two and three?") && listed.contains(what), "no {what:?} in {listed}");
        Ok(Some(()))
    };
    wait::until("the note is at its lines", LIMIT, async || listed("same").await).await?;
    team.work("sed -i '1i zero' counted").await?;
    team.checkpoint("longer").await?;
    wait::until("the note has moved", LIMIT, async || listed("lines 3-4").await).await?;
    team.work("sed -i /three/d counted").await?;
    team.checkpoint("shorter").await?;
    wait::until("its lines are gone", LIMIT, async || listed("gone").await).await?;

    // The agent can neither speak as a reviewer nor put words into a reviewer's mouth.
    let note = json!({
        "apiVersion": "aether.dev/v1alpha1", "kind": "AetherNote", "metadata": {"name": "forged"},
        "spec": {"checkpoint": "noted", "path": "counted", "text": "fine by me", "author": forged(&team.user("grace"))},
    });
    let made = create(&ada, &note).await?;
    ensure!(made["spec"]["author"]["username"] == team.user("ada"), "it was made by {}", made["spec"]["author"]);
    let patch = |spec: Value| json!({ "spec": spec }).to_string();
    let words = patch(json!({"text": "well done"}));
    refused(&ada, &["patch", "aethernote", name, "--type=merge", "--patch", &words], &["only resolved"]).await?;
    let author = patch(json!({"author": forged(&team.user("ada"))}));
    // Whether that is refused or has no effect, the author stays.
    ada.kubectl_output(&["patch", "aethernote", name, "--type=merge", "--patch", &author], None).await?;
    ensure!(by().await? == team.user("grace"), "its author is {} now", by().await?);

    aether(&grace, &["note", "resolve", name]).await?;
    let open = aether(&grace, &["note", "list", "work"]).await?;
    ensure!(!open.contains(name), "it is still open: {open}");
    wait::until("it is resolved", LIMIT, async || listed("resolved").await).await?;
    Ok(name.to_owned())
}

/// The platform team has this rule from now on.
async fn rule(team: &Team<'_>, rule: Value) -> Result<()> {
    let paula = team.of("paula")?.in_namespace(team.platform());
    // Members that are not said are as without a rule.
    let mut review = json!({"required": null, "groups": null, "checks": null, "expireAfter": null, "branches": null});
    review.as_object_mut().context("an object")?.extend(rule.as_object().context("an object")?.clone());
    let patch = json!({"spec": {"review": review}}).to_string();
    paula.kubectl(&["patch", "aethersource", team.source(), "--type=merge", "--patch", &patch]).await.map(drop)
}

/// Waits until what a commit has and misses is as wished.
async fn until(team: &Team<'_>, commit: &str, what: &str, wished: impl Fn(&Approvals) -> bool) -> Result<()> {
    let is = |commit: &AetherCommit| {
        let approvals = commit.status.as_ref().and_then(|status| status.approvals.as_ref());
        commit.status.as_ref().and_then(|status| status.phase) != Some(CommitPhase::Pending)
            && approvals.is_some_and(&wished)
    };
    team.test.until(commit, what, is).await.map(drop)
}

/// A command that succeeded on another tree releases nothing, one on the same tree does.
async fn checks(team: &Team<'_>) -> Result<()> {
    let script = ["sh", "-c", "grep -q good README.md"];
    rule(team, json!({"required": 2, "checks": [{"name": "tests", "command": script}]})).await?;
    let ada = team.of("ada")?;
    team.work("echo good >>README.md").await?;
    let (listing, root) = (team.listing().await?, team.checkpoint("good").await?);
    create(&ada, &team.request("checked", "good")).await?;
    let missing = |approvals: &Approvals, word: &str| approvals.missing.iter().any(|missing| missing.contains(word));
    until(team, "checked", "misses its check", |approvals| missing(approvals, "check tests: no such")).await?;
    for who in ["grace", "linus"] {
        team.decide(who, "checked", &root, Approve).await?;
    }
    // The agent's command succeeds, on something else.
    team.work("echo more >>README.md").await?;
    let other = checked(team, "on-another", &script).await?;
    ensure!(other != root, "the trees are the same");
    let word = "AetherCommand on-another left another tree";
    until(team, "checked", "is not released by that", |approvals| approvals.have == 2 && missing(approvals, word))
        .await?;
    team.until_phase("checked", CommitPhase::AwaitingApproval).await?;
    ensure!(!team.repository.has("agents/checked").await?, "it was pushed without its check");
    aether(&ada, &["restore", "work", "good", "--yes"]).await?;
    let same = checked(team, "on-this", &script).await?;
    ensure!(same == root, "the restored session is {same}, it was {root}");
    let commit = team.until_phase("checked", CommitPhase::Succeeded).await?;
    team.is_pushed(&commit, &listing).await
}

/// The agent runs a check, which succeeds; the tree that it left.
async fn checked(team: &Team<'_>, name: &str, script: &[&str]) -> Result<String> {
    let command = json!({
        "apiVersion": "aether.dev/v1alpha1", "kind": "AetherCommand",
        "metadata": {"name": name, "labels": {CHECK_LABEL: "tests"}},
        "spec": {"session": "work", "command": script, "checkpointAfter": true},
    });
    create(&team.of("ada")?, &command).await?;
    let ended = |command: &AetherCommand| command.status.as_ref().is_some_and(|status| status.finished.is_some());
    let command: AetherCommand = team.test.until(name, "has ended", ended).await?;
    let status = command.status.context("a status")?;
    ensure!(status.exit_code == Some(0), "it ended with {:?}", status.exit_code);
    let checkpoint = status.checkpoint.context("a checkpoint")?;
    let has_root = |checkpoint: &AetherCheckpoint| root(checkpoint).is_some();
    let checkpoint: AetherCheckpoint = team.test.until(&checkpoint, "has a tree", has_root).await?;
    root(&checkpoint).context("a tree")
}

fn root(checkpoint: &AetherCheckpoint) -> Option<String> {
    checkpoint.status.as_ref()?.root.clone()
}

/// An approval that has expired releases nothing, not even when what held the commit is gone; another one does.
async fn expiry(team: &Team<'_>) -> Result<()> {
    rule(team, json!({"required": 1, "expireAfter": "8s"})).await?;
    team.work("echo expires >>README.md").await?;
    let (listing, root) = (team.listing().await?, team.checkpoint("expires").await?);
    create(&team.of("ada")?, &team.request("expiring", "expires")).await?;
    until(team, "expiring", "waits", |approvals| approvals.need == 1).await?;
    // So that it waits until the approval is old.
    team.decide("linus", "expiring", &root, Reject).await?;
    team.until_phase("expiring", CommitPhase::Rejected).await?;
    team.decide("grace", "expiring", &root, Approve).await?;
    let expired = |approval: &AetherApproval| {
        let status = approval.status.clone().unwrap_or_default();
        !status.counts && status.reason.is_some_and(|reason| reason.contains("expired"))
    };
    team.test.until(&approval_name("expiring", &team.user("grace")), "has expired", expired).await?;
    team.withdraw("linus", "expiring").await?;
    team.until_phase("expiring", CommitPhase::AwaitingApproval).await?;
    until(team, "expiring", "has no approval", |approvals| approvals.have == 0 && approvals.rejected.is_empty())
        .await?;
    ensure!(!team.repository.has("agents/expiring").await?, "it was pushed by an approval that had expired");
    team.withdraw("grace", "expiring").await?;
    team.decide("grace", "expiring", &root, Approve).await?;
    team.until_phase("expiring", CommitPhase::Succeeded).await?;
    ensure!(team.repository.cloned("agents/expiring").await? == listing, "something else was pushed");
    Ok(())
}

/// Approved by both, as the rule of the team has it.
async fn approved(team: &Team<'_>, name: &str, checkpoint: &str, target: Option<Value>) -> Result<AetherCommit> {
    let mut request = team.request(name, checkpoint);
    if let Some(target) = target {
        request["spec"]["target"] = target;
    }
    create(&team.of("ada")?, &request).await?;
    let root = root_of(&team.until_waiting(name, 0).await?)?;
    for who in ["grace", "linus"] {
        team.decide(who, name, &root, Approve).await?;
    }
    team.until_phase(name, CommitPhase::Succeeded).await
}

/// The same repository, behind ssh and a key.
async fn over_ssh(team: &Team<'_>) -> Result<()> {
    rule(team, json!({"required": 2, "groups": [{"name": "reviewers", "required": 2}]})).await?;
    let address = HOST.parse()?;
    let server = tokio::task::spawn_blocking(move || Sshd::start_at(address)).await?;
    let repository = team.repository.git(&["rev-parse", "--absolute-git-dir"]).await?;
    let (url, secret) = (server.url(repository.as_ref()), format!("{}-ssh", team.source()));
    let paula = team.of("paula")?.in_namespace(team.platform());
    let keys = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": secret}, "type": "kubernetes.io/ssh-auth",
        "stringData": {"ssh-privatekey": server.private_key(), "known_hosts": server.known_hosts()},
    });
    paula.apply(&team.labelled(keys).to_string()).await?;
    let git = json!({"url": url, "secretRef": {"name": secret}, "pushSecretRef": {"name": secret}});
    let patch = json!({"spec": {"git": git}}).to_string();
    paula.kubectl(&["patch", "aethersource", team.source(), "--type=merge", "--patch", &patch]).await?;
    let is_ready = |source: &AetherSource| {
        let status = source.status.clone().unwrap_or_default();
        status.observed_generation == source.metadata.generation
            && conditions::is_true(&status.conditions, conditions::READY)
    };
    wait::object(&team.platform_api(), team.source(), "is Ready", LIMIT, is_ready).await?;

    team.work("echo by ssh >>README.md; chmod 755 later.sh; ln -sfn run.sh link").await?;
    let listing = team.listing().await?;
    team.checkpoint("by-ssh").await?;
    let commit = approved(team, "by-ssh", "by-ssh", None).await?;
    team.is_pushed(&commit, &listing).await?;
    // Plain git fetches it the same way.
    let folder = tempfile::tempdir()?;
    let (key, hosts, clone) = (folder.path().join("key"), folder.path().join("hosts"), folder.path().join("clone"));
    fs::write(&hosts, server.known_hosts())?;
    fs::write(&key, "")?;
    fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    fs::write(&key, server.private_key())?;
    let ssh =
        format!("ssh -F none -i {} -o IdentitiesOnly=yes -o UserKnownHostsFile={}", key.display(), hosts.display());
    let mut git = command("git", ["clone", "-q", "--branch", "agents/by-ssh", &url, &clone.display().to_string()]);
    expect_success(git.env("GIT_SSH_COMMAND", ssh)).await?;
    let cloned = run("bash", ["-euc", &format!("cd '{}'; {LISTING}", clone.display())]).await?;
    ensure!(cloned == listing, "by ssh the branch is\n{cloned}\nand the session was\n{listing}");
    Ok(())
}

/// What is promoted is what the next session starts from.
async fn promoted(team: &Team<'_>) -> Result<()> {
    team.work("echo promoted >>README.md").await?;
    let listing = team.listing().await?;
    team.checkpoint("promoted").await?;
    let commit = approved(team, "promoted", "promoted", Some(json!({"promote": {}}))).await?;
    let revision = commit.status.and_then(|status| status.revision).context("a revision")?;
    let source: AetherSource = team.platform_api().get(team.source()).await?;
    let latest = source.status.and_then(|status| status.latest);
    ensure!(latest.as_ref() == Some(&revision), "the source is at {latest:?}, and {revision} was promoted");
    let session = json!({
        "apiVersion": "aether.dev/v1alpha1", "kind": "AetherSession", "metadata": {"name": "next"},
        "spec": {"source": {"namespace": team.platform(), "name": team.source()}, "owner": {"uid": 1000, "gid": 1000}},
    });
    team.of("ada")?.apply(&session.to_string()).await?;
    let pod = Story::new(team.test).pod_manifest("next", "next", None, false)?;
    team.test.tools.apply(&pod.to_string()).await?;
    team.test.until_ready("next").await?;
    let there = team.test.tools.exec("next", &format!("cd /workspace; {LISTING}")).await?;
    ensure!(there == listing, "a new session is\n{there}\nand what was promoted is\n{listing}");
    Ok(())
}

/// Each state that a commit, an approval or a note of all this was in is an event of it.
async fn told(team: &Team<'_>, note: &str) -> Result<()> {
    let approval = |commit: &str, who: &str| approval_name(commit, &team.user(who));
    let mut wanted = Vec::new();
    for commit in ["checked", "expiring", "by-ssh", "promoted"] {
        let phases = ["AwaitingApproval", "Running", "Succeeded"];
        wanted.extend(phases.map(|phase| ("AetherCommit", commit.to_owned(), phase)));
        wanted.push(("AetherApproval", approval(commit, "grace"), "Counts"));
    }
    wanted.push(("AetherCommit", "expiring".into(), "Rejected"));
    wanted.push(("AetherApproval", approval("expiring", "linus"), "Counts"));
    wanted.push(("AetherApproval", approval("expiring", "grace"), "DoesNotCount"));
    wanted.extend(["Noted", "Resolved"].map(|deed| ("AetherNote", note.to_owned(), deed)));
    wanted.push(("AetherNote", "forged".into(), "Noted"));
    wait::until("everything was told", LIMIT, async || {
        let events = team.test.tools.kubectl(&["get", "events", "--output=json"]).await?;
        let events: Value = serde_json::from_str(&events)?;
        let events = events["items"].as_array().context("a list")?;
        for (kind, name, reason) in &wanted {
            let is = |event: &Value| {
                let of = &event["involvedObject"];
                of["kind"] == *kind && of["name"] == *name && event["reason"] == *reason
            };
            ensure!(events.iter().any(is), "no event {reason} of {kind} {name}");
        }
        Ok(Some(()))
    })
    .await
}
