//! The operator dies at each point of a commit, and the Job in the midst of its push: each time the branch ends with exactly one
//! commit, of the tree that was approved.

use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use aether_api::approval::Decision::Approve;
use aether_api::commit::CommitPhase;
use aether_api::{AetherCommit, AetherSource};
use aether_e2e::team::repository::Repository;
use aether_e2e::team::{Team, create, with_team};
use aether_e2e::testing::LIMIT;
use aether_e2e::wait;
use aether_operator::crash::POINTS;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::operator::Operator;
use super::{EDIT, jobs_of, root_of};
use crate::alone_with_namespace;

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_each_point_it_commits_once() -> Result<()> {
    alone_with_namespace("review-points", async |test| {
        let operator = Operator::find(test).await?;
        let played = with_team(test, async |team| each(team, &operator).await).await;
        let back = operator.give_back().await;
        played?;
        back
    })
    .await
}

async fn each(team: &Team<'_>, operator: &Operator<'_>) -> Result<()> {
    team.work(EDIT).await?;
    let listing = team.listing().await?;
    for (place, hook) in
        [("before its push", "upload"), ("in its push", "pre-receive"), ("after its push", "post-receive")]
    {
        let name = format!("job-{hook}");
        job(team, &name, hook, &listing).await.with_context(|| format!("a Job that was killed {place}"))?;
    }
    for point in POINTS {
        let begun = Instant::now();
        operator.arm(point).await?;
        let armed = begun.elapsed();
        let name = point.replace('.', "-");
        match *point {
            "commit.promoted" => promoted(team, &name).await,
            "commit.job.deleted" => disbelieved(team, operator, &name, &listing).await,
            _ => pushed(team, &name, &listing).await,
        }
        .with_context(|| format!("an operator that died at {point}"))?;
        wait::until("it has died there", LIMIT, async || operator.died_at(point).await.map(Some)).await?;
        let (all, armed) = (begun.elapsed().as_secs_f64(), armed.as_secs_f64());
        eprintln!("review-points: {point}: one commit after {all:.1} s, {armed:.1} s of them for another operator");
    }
    Ok(())
}

/// Asks for a commit of the session, and has it approved. The webhook may be away at any moment of that.
async fn released(team: &Team<'_>, name: &str, target: Option<Value>) -> Result<()> {
    let mut request = team.request(name, "");
    let spec = request["spec"].as_object_mut().context("a spec")?;
    spec.remove("checkpoint");
    spec.insert("session".into(), "work".into());
    if let Some(target) = target {
        spec.insert("target".into(), target);
    }
    let ada = team.of("ada")?;
    wait::until("a commit can be asked for", LIMIT, async || create(&ada, &request).await.map(Some)).await?;
    let root = root_of(&team.until_waiting(name, 0).await?)?;
    for who in ["grace", "linus"] {
        let said = format!("{who} can approve");
        wait::until(&said, LIMIT, async || team.decide(who, name, &root, Approve).await.map(Some)).await?;
    }
    Ok(())
}

async fn pushed(team: &Team<'_>, name: &str, listing: &str) -> Result<()> {
    released(team, name, None).await?;
    let commit = is_one(team, name, listing).await?;
    let retries = commit.status.and_then(|status| status.retries);
    ensure!(retries.is_none(), "it took {retries:?} more Jobs");
    Ok(())
}

/// Waits until it has succeeded, and fails unless that is one commit, made by one Job that is still there.
async fn is_one(team: &Team<'_>, name: &str, listing: &str) -> Result<AetherCommit> {
    let commit = team.until_phase(name, CommitPhase::Succeeded).await?;
    team.is_pushed(&commit, listing).await?;
    let retries = commit.status.as_ref().and_then(|status| status.retries).unwrap_or(0);
    let (jobs, most) = (jobs_of(team, &commit).await?, 1 + retries as usize);
    ensure!((1..=most).contains(&jobs), "there are {jobs} Jobs after {retries} failures");
    Ok(commit)
}

/// The tree becomes one revision.
async fn promoted(team: &Team<'_>, name: &str) -> Result<()> {
    released(team, name, Some(json!({"promote": {}}))).await?;
    let commit = team.until_phase(name, CommitPhase::Succeeded).await?.status.context("a status")?;
    let source: AetherSource = team.platform_api().get(team.source()).await?;
    let revisions = source.status.context("a status")?.revisions;
    let ours = |by: &Option<String>| by.as_ref().is_some_and(|by| by.contains(&format!("/{name} ")));
    let ours: Vec<_> = revisions.iter().filter(|revision| ours(&revision.promoted)).collect();
    ensure!(ours.len() == 1, "{} revisions come of it: {revisions:?}", ours.len());
    ensure!(
        commit.revision.as_ref() == Some(&ours[0].name) && commit.root.as_ref() == Some(&ours[0].root),
        "{commit:?}"
    );
    Ok(())
}

/// The source changes while the Job pushes: that Job is not believed any more, and deleted.
async fn disbelieved(team: &Team<'_>, operator: &Operator<'_>, name: &str, listing: &str) -> Result<()> {
    let gate = Gate::shut(&team.repository, "pre-receive").await?;
    released(team, name, None).await?;
    gate.reached().await?;
    let paula = team.of("paula")?.in_namespace(team.platform());
    let other = format!("{}-other", team.source());
    paula.apply(&team.labelled(team.repository.secret(&other)).to_string()).await?;
    let patch = json!({"spec": {"git": {"pushSecretRef": {"name": other}}}}).to_string();
    paula.kubectl(&["patch", "aethersource", team.source(), "--type=merge", "--patch", &patch]).await?;
    let died = format!("the operator dies while {name} is pushed");
    wait::until(&died, LIMIT, async || operator.died_at("commit.job.deleted").await.map(Some)).await?;
    gate.open(&team.repository).await?;
    let commit = is_one(team, name, listing).await?;
    ensure!(commit.status.and_then(|status| status.retries) == Some(1), "it was pushed by the Job that was deleted");
    Ok(())
}

/// `kill -9` of the Job's program at a place of its push, which the next Job finds as it is.
async fn job(team: &Team<'_>, name: &str, hook: &str, listing: &str) -> Result<()> {
    // The server calls nobody when something is fetched.
    let gate = if hook == "upload" { None } else { Some(Gate::shut(&team.repository, hook).await?) };
    released(team, name, None).await?;
    if let Some(gate) = &gate {
        gate.reached().await?;
    }
    let kill = async || {
        let script = "for p in /proc/[0-9]*; do [ \"$(cat $p/comm 2>/dev/null)\" = aether-committe ] && kill -9 ${p#/proc/} && echo; done; true";
        let nodes = team.test.cluster()?.nodes();
        let killed = nodes.iter().map(async |node| node.run(&["sh", "-c", script]).await);
        let killed = futures::future::try_join_all(killed).await?.iter().map(|pids| pids.lines().count()).sum();
        Ok((killed > 0).then_some(killed))
    };
    let killed: usize = wait::until("the Job's program is killed", LIMIT, kill).await?;
    ensure!(killed == 1, "{killed} programs of Jobs were killed");
    let there = team.repository.has(&format!("agents/{name}")).await?;
    ensure!(there == (hook == "post-receive"), "whether the branch is there: {there}");
    if let Some(gate) = gate {
        gate.open(&team.repository).await?;
    }
    let commit = is_one(team, name, listing).await?;
    let retries = commit.status.and_then(|status| status.retries);
    ensure!(retries == Some(1), "it took {retries:?} more Jobs");
    Ok(())
}

/// A hook of the git server at which pushes wait.
struct Gate(TempDir);

impl Gate {
    async fn shut(repository: &Repository, hook: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let at = folder.path().display();
        // It opens by itself when the test is gone.
        let script =
            format!("#!/bin/sh\ntouch {at}/reached\nwhile [ -d {at} ] && [ ! -e {at}/open ]; do sleep 0.1; done\n");
        let path = folder.path().join(hook);
        std::fs::write(&path, script)?;
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755))?;
        repository.git(&["config", "core.hooksPath", &at.to_string()]).await?;
        Ok(Self(folder))
    }

    /// Waits until somebody pushes.
    async fn reached(&self) -> Result<()> {
        let reached = self.0.path().join("reached");
        wait::until("somebody pushes", LIMIT, async || Ok(reached.exists().then_some(()))).await
    }

    /// For those who wait, and those who come.
    async fn open(self, repository: &Repository) -> Result<()> {
        std::fs::write(self.0.path().join("open"), "")?;
        repository.git(&["config", "--unset", "core.hooksPath"]).await.map(drop)
    }
}
