//! `commit`: asking for what a session has made to leave.

use aether_api::commit::{CommitPhase, GitTarget, PromoteTarget, Target};
use aether_api::{AetherCheckpoint, AetherCommit, AetherCommitSpec, conditions};
use anyhow::{Result, anyhow};
use kube::ResourceExt;
use kube::api::PostParams;

use crate::cli;
use crate::cluster::{Cluster, explain};
use crate::output::{self, Progress};
use crate::wait::{self, Deadline, Verdict, in_words};

use super::{phase, target};

pub(crate) async fn commit(cluster: &Cluster, args: &cli::Commit) -> Result<()> {
    let stem = match (&args.session, &args.checkpoint) {
        (Some(session), _) => {
            crate::sessions::refuse_hopeless(&cluster.session(session).await?)?;
            session.clone()
        }
        (None, Some(checkpoint)) => cluster.find::<AetherCheckpoint>(checkpoint).await?.spec.session,
        (None, None) => anyhow::bail!("say a session or a checkpoint"),
    };
    let mut wanted = AetherCommit::new(args.name.as_deref().unwrap_or_default(), spec(args));
    if args.name.is_none() {
        wanted.metadata.name = None;
        wanted.metadata.generate_name = Some(format!("{stem}-"));
    }
    let deadline = Deadline::after(args.patience.timeout);
    let mut commit = cluster.api().create(&PostParams::default(), &wanted).await.map_err(|error| match error {
        kube::Error::Api(status) if status.is_already_exists() => anyhow!(
            "commit {} exists already in namespace {}: take another --name",
            wanted.name_any(),
            cluster.namespace
        ),
        error => explain(error, &format!("ask for a commit of {stem}")),
    })?;
    let name = commit.name_any();
    if args.wait {
        let what = format!("commit {name} to be at its target");
        commit = wait::until(cluster.api(), &name, &what, deadline, &Progress::new(cluster.quiet), |commit| {
            ended(&name, commit)
        })
        .await?;
    }
    match args.print.output {
        Some(format) => output::object(&commit, format),
        None => output::print(&(sentence(&commit) + "\n")),
    }
}

fn spec(args: &cli::Commit) -> AetherCommitSpec {
    let git = args.branch.as_ref().map(|branch| GitTarget {
        branch: branch.clone(),
        message: args.message.clone().unwrap_or_default(),
        author: args.author.clone(),
        rebase: args.rebase,
        history: args.history.into(),
    });
    AetherCommitSpec {
        checkpoint: args.checkpoint.clone(),
        session: args.session.clone(),
        target: Target { git, promote: args.promote.then_some(PromoteTarget {}), export: args.export.clone() },
        ttl_seconds_after_finished: args.ttl.map(|ttl| u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX)),
        ..Default::default()
    }
}

fn ended(name: &str, commit: Option<&AetherCommit>) -> Verdict<AetherCommit> {
    let Some(commit) = commit else { return Verdict::Failed(anyhow!("commit {name} was deleted meanwhile")) };
    let status = commit.status.clone().unwrap_or_default();
    let said = |type_| conditions::get(&status.conditions, type_).map(in_words);
    match status.phase {
        Some(CommitPhase::Succeeded) => Verdict::Done(commit.clone()),
        Some(CommitPhase::Failed) => {
            let conflicts = match status.conflicts.as_slice() {
                [] => String::new(),
                paths => format!("; others have changed too: {}", paths.join(", ")),
            };
            let why = said(conditions::FAILED).unwrap_or_else(|| "it does not say why".into());
            Verdict::Failed(anyhow!("commit {name} failed: {why}{conflicts}"))
        }
        Some(CommitPhase::Rejected) => {
            let by = status.approvals.map(|approvals| approvals.rejected.join(", ")).unwrap_or_default();
            Verdict::Failed(anyhow!(
                "commit {name} is rejected by {by}: `kubectl aether show {name}` says why. It goes on when that is withdrawn"
            ))
        }
        Some(CommitPhase::AwaitingApproval) => Verdict::Waiting(
            status
                .approvals
                .map(|approvals| approvals.missing.join("; "))
                .filter(|text| !text.is_empty())
                .unwrap_or_else(|| "its approval".into()),
        ),
        _ => Verdict::Waiting(said(conditions::COMPLETE).unwrap_or_else(|| format!("it is {}", phase(commit)))),
    }
}

fn sentence(commit: &AetherCommit) -> String {
    let status = commit.status.clone().unwrap_or_default();
    let (name, to) = (commit.name_any(), target(&commit.spec.target));
    if status.phase == Some(CommitPhase::Succeeded) {
        let result = status.commit.map(|id| format!(": git commit {id}"));
        let result = result.or(status.revision.map(|revision| format!(": revision {revision}")));
        let result = result.or(status.place.map(|place| format!(": {place}"))).unwrap_or_default();
        return format!("commit {name} to {to} is done{result}");
    }
    let from = match (&commit.spec.session, &commit.spec.checkpoint) {
        (Some(session), _) => format!("session {session}"),
        (_, Some(checkpoint)) => format!("checkpoint {checkpoint}"),
        _ => "nothing".into(),
    };
    format!("commit {name} of {from} to {to} asked for: see `kubectl aether show {name}`")
}

#[cfg(test)]
mod tests {
    use aether_api::commit::{AetherCommitStatus, Approvals};
    use clap::Parser;

    use super::*;

    fn with(phase: CommitPhase) -> AetherCommit {
        let mut commit = AetherCommit::new("c", AetherCommitSpec::default());
        let approvals = Approvals {
            rejected: vec!["eve".into()],
            missing: vec!["1 more approval".into(), "check tests has not run".into()],
            ..Default::default()
        };
        commit.status = Some(AetherCommitStatus {
            phase: Some(phase),
            approvals: Some(approvals),
            conflicts: vec!["src/a".into()],
            commit: Some("f00".into()),
            ..Default::default()
        });
        commit
    }

    #[test]
    fn a_wait_says_what_is_missing_and_why_it_ends() {
        let Verdict::Waiting(missing) = ended("c", Some(&with(CommitPhase::AwaitingApproval))) else { panic!("ends") };
        assert_eq!(missing, "1 more approval; check tests has not run");
        let Verdict::Failed(error) = ended("c", Some(&with(CommitPhase::Rejected))) else { panic!("goes on") };
        assert!(error.to_string().contains("rejected by eve"), "{error}");
        let Verdict::Failed(error) = ended("c", Some(&with(CommitPhase::Failed))) else { panic!("goes on") };
        assert!(error.to_string().contains("src/a"), "{error}");
        assert!(matches!(ended("c", Some(&with(CommitPhase::Succeeded))), Verdict::Done(_)));
        assert!(matches!(ended("c", None), Verdict::Failed(_)));
        assert!(sentence(&with(CommitPhase::Succeeded)).contains("git commit f00"));
        let mut exported = with(CommitPhase::Succeeded);
        exported.status = Some(AetherCommitStatus {
            phase: Some(CommitPhase::Succeeded),
            place: Some("results/c".into()),
            ..Default::default()
        });
        assert!(sentence(&exported).ends_with("is done: results/c"), "{}", sentence(&exported));
    }

    #[test]
    fn what_was_typed_becomes_one_target() {
        let spec = |words: &[&str]| {
            let cli = cli::Cli::try_parse_from(["kubectl-aether", "commit"].iter().chain(words)).unwrap();
            let cli::Command::Commit(args) = cli.command else { panic!("not commit") };
            spec(&args)
        };
        let git = spec(&["s", "--branch", "b", "-m", "x", "--author", "A <a@b>", "--rebase"]);
        assert_eq!(git.session.as_deref(), Some("s"));
        let target = git.target.git.unwrap();
        assert_eq!((target.branch.as_str(), target.rebase, target.author.unwrap().email.as_str()), ("b", true, "a@b"));
        let export = spec(&["--checkpoint", "k", "--export", "results:p/q"]).target.export.unwrap();
        assert_eq!((export.to.as_str(), export.path.as_deref()), ("results", Some("p/q")));
        let promote = spec(&["s", "--promote", "--ttl", "1h"]);
        assert!(promote.target.promote.is_some() && promote.target.git.is_none() && promote.target.export.is_none());
        assert_eq!(promote.ttl_seconds_after_finished, Some(3600));
    }
}
