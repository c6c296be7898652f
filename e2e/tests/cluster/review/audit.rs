//! The audit log on a cluster: the lines of real users, each once although operators are killed; who may withdraw what; damage that is
//! found; and what is deleted while no operator answers.

use aether_api::AetherCommit;
use aether_api::approval::Decision::{Approve, Reject};
use aether_api::commit::CommitPhase;
use aether_api::conditions;
use aether_api::names::approval_name;
use aether_e2e::command::{Output, expect_success};
use aether_e2e::site::SYSTEM_NAMESPACE;
use aether_e2e::team::{Team, create, refused, with_team};
use aether_e2e::testing::LIMIT;
use aether_e2e::tools::Tools;
use aether_e2e::wait;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::operator::Operator;
use super::root_of;
use crate::alone_with_namespace;

const OPERATOR: &str = "system:serviceaccount:aether-system:aether-operator";

#[tokio::test(flavor = "multi_thread")]
async fn each_change_is_one_line_of_who_made_it_and_damage_is_found() -> Result<()> {
    alone_with_namespace("review-audit", async |test| {
        let operator = Operator::find(test).await?;
        let played = with_team(test, async |team| {
            written(team, &operator).await.context("lines")?;
            damaged(team).await.context("damage")?;
            unseen(team, &operator).await.context("deleted while no operator answers")
        })
        .await;
        let back = operator.give_back().await;
        played?;
        back
    })
    .await
}

fn system(team: &Team<'_>) -> Tools {
    team.test.tools.in_namespace(SYSTEM_NAMESPACE)
}

/// Runs `aether-operator audit` in an operator's container, which may only be starting.
async fn audit(team: &Team<'_>, args: &[&str]) -> Result<Output> {
    let command = [&["exec", "deploy/aether-operator", "--", "aether-operator", "audit"], args].concat();
    let system = system(team);
    wait::until("the operator's container runs", 2 * LIMIT, async || {
        let output = system.kubectl_output(&command, None).await?;
        let runs = !output.stderr.contains("error: ") && !output.stderr.contains("Error from server");
        ensure!(runs, "{}", output.stderr);
        Ok(Some(output))
    })
    .await
}

/// The end of a log that is whole.
async fn verified(team: &Team<'_>, expect: &[&str]) -> Result<String> {
    let expected: Vec<&str> = expect.iter().flat_map(|end| ["--expect", end]).collect();
    let output = audit(team, &[&["verify", "--json"], &expected[..]].concat()).await?;
    let said: Value = serde_json::from_str(&output.stdout).context(output.stdout.clone())?;
    ensure!(output.code == 0 && said["whole"] == true, "{said}");
    Ok(said["end"].as_str().context("an end")?.to_owned())
}

/// `ACTOR VERB NAME` of each line of the team's namespace.
async fn lines(team: &Team<'_>) -> Result<Vec<String>> {
    let output = audit(team, &["show", "--of", &team.test.namespace]).await?;
    ensure!(output.code == 0, "{}{}", output.stdout, output.stderr);
    let words = output.stdout.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let said = words.map(|words| match words[..] {
        [_, _, actor, verb, _, object, ..] => {
            Ok(format!("{actor} {verb} {}", object.rsplit('/').next().unwrap_or_default()))
        }
        _ => anyhow::bail!("no line: {words:?}"),
    });
    said.collect()
}

async fn written(team: &Team<'_>, operator: &Operator<'_>) -> Result<()> {
    operator.scale(2).await?;
    let (ada, grace, linus, paula) = (team.of("ada")?, team.of("grace")?, team.of("linus")?, team.of("paula")?);
    let user = format!("--user={}", team.user("paula"));
    team.test.tools.kubectl(&["create", "rolebinding", "platform", "--clusterrole=aether-platform", &user]).await?;
    team.work("echo mine >>README.md").await?;
    team.checkpoint("edited").await?;
    create(&ada, &team.request("fix", "edited")).await?;
    let root = root_of(&team.until_waiting("fix", 0).await?)?;
    let of = |who: &str| approval_name("fix", &team.user(who));

    team.decide("grace", "fix", &root, Reject).await?;
    team.until_phase("fix", CommitPhase::Rejected).await?;
    let words: &[&str] = &["may not withdraw what", "verb withdraw"];
    refused(&linus, &["delete", "aetherapproval", &of("grace")], words).await?;
    refused(&linus, &["delete", "aetherapproval", "--all"], words).await?;
    grace.kubectl(&["delete", "aetherapproval", &of("grace"), "--dry-run=server"]).await?;
    team.withdraw("grace", "fix").await?;
    team.until_waiting("fix", 0).await?;
    team.decide("linus", "fix", &root, Reject).await?;
    team.until_phase("fix", CommitPhase::Rejected).await?;
    paula.kubectl(&["delete", "aetherapproval", &of("linus")]).await?;
    team.until_waiting("fix", 0).await?;

    let note = ["note", "add", "checkpoint/edited", "README.md:1", "-m", "why?"];
    let said = expect_success(&mut grace.aether_command(&note)).await?.stdout;
    let note = said.strip_prefix("note ").and_then(|rest| rest.split(' ').next()).context(said.clone())?;
    for (who, resolved) in [(&ada, true), (&grace, false), (&ada, true)] {
        let patch = json!({"spec": {"resolved": resolved}}).to_string();
        who.kubectl(&["patch", "aethernote", note, "--type=merge", "--patch", &patch]).await?;
    }

    team.decide("grace", "fix", &root, Approve).await?;
    let mut killed = operator.kill().await?;
    team.until_waiting("fix", 1).await?;
    wait::until("an operator answers", 2 * LIMIT, async || team.decide("linus", "fix", &root, Approve).await.map(Some))
        .await?;
    killed += operator.kill().await?;
    team.until_phase("fix", CommitPhase::Succeeded).await?;
    operator.until_ready(2).await?;

    let by = |who: &str, verb: &str, name: &str| format!("{} {verb} {name}", team.user(who));
    let expected = [
        by("ada", "Requested", "fix"),
        by("grace", "Rejected", &of("grace")),
        by("grace", "Withdrawn", &of("grace")),
        by("linus", "Rejected", &of("linus")),
        by("paula", "Withdrawn", &of("linus")),
        by("grace", "Noted", note),
        by("ada", "Resolved", note),
        by("grace", "Reopened", note),
        by("ada", "Resolved", note),
        by("grace", "Approved", &of("grace")),
        by("linus", "Approved", &of("linus")),
        format!("{OPERATOR} Released fix"),
        format!("{OPERATOR} Succeeded fix"),
    ];
    let found = lines(team).await?;
    ensure!(found == expected, "the lines are {found:#?}");
    let events =
        team.test.tools.kubectl(&["get", "events", "--output=name", "--field-selector=reason=Withdrawn"]).await?;
    ensure!(events.lines().count() == 2, "events of what was withdrawn: {events}");
    let log = expect_success(&mut grace.aether_command(&["log", "work"])).await?.stdout;
    let said = format!("what {} had said: rejected", team.user("linus"));
    ensure!(log.contains(&said), "no {said:?} in {log}");
    eprintln!("review-audit: {} lines, each once, {killed} operators killed", found.len());
    Ok(())
}

async fn damaged(team: &Team<'_>) -> Result<()> {
    let end = verified(team, &[]).await?;
    let (count, hash) = end.split_once(':').context("an end")?;
    // It passes the ends that it had, and no other.
    verified(team, &[&end]).await?;
    let other = format!("{count}:{}", "0".repeat(64));
    let output = audit(team, &["verify", "--expect", &other]).await?;
    ensure!(output.code == 1 && output.stdout.contains(&format!("line {count}: ")), "{output:?}");
    // Somebody puts another end into the cluster.
    let system = system(team);
    let write = async |lines: &str, hash: &str| {
        let patch = json!({"data": {"lines": lines, "hash": hash}}).to_string();
        system.kubectl(&["patch", "configmap", "aether-audit", "--type=merge", "--patch", &patch]).await.map(drop)
    };
    let before = (count.parse::<u64>()? - 1).to_string();
    for (lines, hash, line) in [(count, &"0".repeat(64)[..], count), (before.as_str(), hash, &before)] {
        write(lines, hash).await?;
        let output = audit(team, &["verify"]).await?;
        ensure!(output.code == 1 && output.stdout.contains(&format!("line {line}: ")), "{output:?}");
        let note = ["note", "add", "checkpoint/edited", "README.md:1", "-m", "and now?"];
        let refused = expect_success(&mut team.of("grace")?.aether_command(&note)).await;
        let said = format!("{:#}", refused.err().context("a note was taken that was not written down")?);
        ensure!(said.contains("audit verify"), "{said}");
    }
    write(count, hash).await?;
    verified(team, &[&end]).await?;
    // Somebody takes it away: no other log begins.
    system.kubectl(&["delete", "configmap", "aether-audit"]).await?;
    let note = ["note", "add", "checkpoint/edited", "README.md:1", "-m", "still there?"];
    expect_success(&mut team.of("grace")?.aether_command(&note)).await?;
    let now = verified(team, &[&end]).await?;
    ensure!(now.split_once(':').context("an end")?.0.parse::<u64>()? == count.parse::<u64>()? + 1, "{end}, then {now}");
    let told = system.kubectl(&["get", "events", "--output=name", "--field-selector=reason=AuditLogRecovered"]).await?;
    ensure!(!told.is_empty(), "nobody is told that the end was lost");
    Ok(())
}

async fn unseen(team: &Team<'_>, operator: &Operator<'_>) -> Result<()> {
    let (ada, linus) = (team.of("ada")?, team.of("linus")?);
    create(&ada, &team.request("second", "edited")).await?;
    let root = root_of(&team.until_waiting("second", 0).await?)?;
    team.decide("grace", "second", &root, Reject).await?;
    team.until_phase("second", CommitPhase::Rejected).await?;
    let other = other_namespace(team).await?;
    operator.scale(0).await?;
    team.test.tools.kubectl(&["delete", "namespace", &other, "--timeout=120s"]).await?;
    linus.kubectl(&["delete", "aetherapproval", &approval_name("second", &team.user("grace"))]).await?;
    operator.scale(1).await?;
    team.decide("linus", "second", &root, Approve).await?;
    let stands = |commit: &AetherCommit| {
        let status = commit.status.clone().unwrap_or_default();
        status.phase == Some(CommitPhase::Rejected)
            && conditions::get(&status.conditions, conditions::APPROVED)
                .is_some_and(|approved| approved.message.contains("stands until"))
    };
    team.test.until("second", "is rejected still", stands).await?;
    team.decide("grace", "second", &root, Approve).await?;
    team.until_phase("second", CommitPhase::Succeeded).await.map(drop)
}

/// Another namespace, where grace has said something of a commit.
async fn other_namespace(team: &Team<'_>) -> Result<String> {
    let name = format!("{}-gone", team.test.namespace);
    let tools = team.test.tools.in_namespace(&name);
    tools.kubectl(&["create", "namespace", &name]).await?;
    let user = format!("--user={}", team.user("grace"));
    tools.kubectl(&["create", "rolebinding", "approver", "--clusterrole=aether-approver", &user]).await?;
    create(&tools, &team.request("fix", "none")).await?;
    let source = json!({"namespace": team.platform(), "name": team.source(), "uid": "u"});
    let patch = json!({"status": {"source": source}}).to_string();
    let status = ["patch", "aethercommit", "fix", "--subresource=status", "--type=merge", "--patch", &patch];
    tools.kubectl(&status).await?;
    create(&team.of("grace")?.in_namespace(&name), &team.voice("grace", "fix", "aa/1", Reject)).await?;
    Ok(name)
}
