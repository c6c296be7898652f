//! `compare`: several attempts at one thing, side by side; taking one of them and closing the rest.

use aether_api::approval::Decision;
use aether_api::{AetherCommand, AetherCommit, AetherSession};
use anyhow::{Result, anyhow, bail};
use futures::{StreamExt, TryStreamExt, stream};
use kube::ResourceExt;
use kube::api::ListParams;

use crate::cli::Compare;
use crate::cluster::{Cluster, explain};
use crate::describe::words;
use crate::diff::{self, Numbers, Side, Temporary};
use crate::kinds::Kind;
use crate::output::{confirm, or_dash, print, printable, table};
use crate::signals::Signals;
use crate::wait::Deadline;

use super::decide::{decidable, record};
use super::{phase, root_of, session_of, undecided};

/// Attempts that are fetched at one time: the review server has few places.
const AT_ONCE: usize = 3;

pub(crate) async fn compare(cluster: &Cluster, args: &Compare) -> Result<()> {
    let sessions = sessions(cluster, args).await?;
    let everything = ListParams::default();
    let (commits, commands) = (cluster.api::<AetherCommit>(), cluster.api::<AetherCommand>());
    let (commits, commands) = tokio::join!(commits.list(&everything), commands.list(&everything));
    let commits = commits.map_err(|error| explain(error, "list commits"))?.items;
    let commands = commands.map(|list| list.items).unwrap_or_default();
    let attempts: Vec<Attempt> = sessions
        .into_iter()
        .map(|session| Attempt { commit: newest(&session, &commits), tally: Tally::of(&session, &commands), session })
        .collect();
    if let Some(chosen) = &args.approve {
        return choose(cluster, args, &attempts, chosen).await;
    }
    diff::check_git().await?;
    diff::require_review_api(cluster).await?;
    let mut signals = Signals::listen()?;
    let deadline = Deadline::after(args.patience.timeout);
    let numbers: Vec<Numbers> = diff::fetch(cluster, &mut signals, async |temporary| {
        stream::iter(&attempts)
            .map(|attempt| attempt.numbers(cluster, temporary, deadline))
            .buffered(AT_ONCE)
            .try_collect()
            .await
    })
    .await?;
    let rows: Vec<_> = attempts.iter().zip(numbers).map(|(attempt, numbers)| attempt.row(numbers)).collect();
    print(&table(&["SESSION", "FILES", "ADDED", "REMOVED", "COMMANDS", "LAST", "EXIT", "COMMIT", "STATE"], &rows))
}

/// The sessions that were named, each once, or the forks of the parent.
async fn sessions(cluster: &Cluster, args: &Compare) -> Result<Vec<String>> {
    if let Some(parent) = &args.parent {
        let list = cluster.api::<AetherSession>().list(&ListParams::default()).await;
        let mut forks = list.map_err(|error| explain(error, "list sessions"))?.items;
        forks.retain(|session| session.spec.session.as_ref() == Some(parent));
        if forks.is_empty() {
            cluster.find::<AetherSession>(parent).await?;
            bail!("no session was forked from {parent}");
        }
        forks.sort_by_key(|fork| (fork.metadata.creation_timestamp.clone().map(|time| time.0), fork.name_any()));
        return Ok(forks.iter().map(ResourceExt::name_any).collect());
    }
    let mut sessions = Vec::new();
    for session in &args.sessions {
        cluster.find::<AetherSession>(session).await?;
        if !sessions.contains(session) {
            sessions.push(session.clone());
        }
    }
    Ok(sessions)
}

/// One of the sessions that are compared.
struct Attempt {
    session: String,
    /// Its newest commit that is not over.
    commit: Option<AetherCommit>,
    tally: Tally,
}

fn newest(session: &str, commits: &[AetherCommit]) -> Option<AetherCommit> {
    let open = commits.iter().filter(|commit| session_of(commit) == Some(session) && undecided(commit));
    open.max_by_key(|commit| commit.metadata.creation_timestamp.clone().map(|time| time.0)).cloned()
}

impl Attempt {
    async fn numbers(&self, cluster: &Cluster, temporary: &Temporary, deadline: Deadline) -> Result<Numbers> {
        let side = match self.commit.as_ref().filter(|commit| root_of(commit).is_some()) {
            Some(commit) => Side::Of(Kind::Commit, commit.name_any()),
            None => Side::Of(Kind::Session, self.session.clone()),
        };
        let numbers = async {
            let state = side.state(cluster, temporary, deadline).await?;
            diff::transfer(cluster, &state, None, deadline).await?.numbers().await
        };
        numbers.await.map_err(|error| error.context(format!("session {}", self.session)))
    }

    fn row(&self, numbers: Numbers) -> Vec<String> {
        vec![
            self.session.clone(),
            numbers.files.to_string(),
            format!("+{}", numbers.added),
            format!("-{}", numbers.removed),
            or_dash(self.tally.counts()),
            or_dash(self.tally.last.as_deref().map(printable)),
            or_dash(self.tally.exit),
            or_dash(self.commit.as_ref().map(ResourceExt::name_any)),
            or_dash(self.commit.as_ref().map(phase)),
        ]
    }
}

/// How the commands of a session went.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    good: usize,
    bad: usize,
    last: Option<String>,
    exit: Option<i32>,
}

impl Tally {
    fn of(session: &str, commands: &[AetherCommand]) -> Self {
        let mut ended: Vec<&AetherCommand> =
            commands.iter().filter(|command| command.spec.session == session && command.finished()).collect();
        ended.sort_by_key(|command| {
            command.status.as_ref().and_then(|status| status.finished.clone()).map(|time| time.0)
        });
        let exit = |command: &AetherCommand| command.status.as_ref().and_then(|status| status.exit_code);
        let good = ended.iter().filter(|command| exit(command) == Some(0)).count();
        let last = ended.last();
        Self {
            good,
            bad: ended.len() - good,
            last: last.map(|command| words(&command.spec.command)),
            exit: last.and_then(|command| exit(command)),
        }
    }

    fn counts(&self) -> Option<String> {
        (self.good + self.bad > 0).then(|| format!("{} ok, {} failed", self.good, self.bad))
    }
}

/// Approves the commit of one attempt and, if that is wanted, rejects those of the others.
async fn choose(cluster: &Cluster, args: &Compare, attempts: &[Attempt], chosen: &str) -> Result<()> {
    let Some(taken) = attempts.iter().find(|attempt| attempt.session == chosen) else {
        bail!("session {chosen} is not one of those that are compared");
    };
    let commit = taken.commit.as_ref().ok_or_else(|| {
        anyhow!(
            "session {chosen} has no commit to approve: `kubectl aether commit {chosen} --branch BRANCH -m MESSAGE` asks for one"
        )
    })?;
    let root = decidable(commit, None)?;
    let others: Vec<&AetherCommit> = attempts
        .iter()
        .filter(|attempt| attempt.session != chosen)
        .filter_map(|attempt| attempt.commit.as_ref())
        .collect();
    let closing: Vec<&AetherCommit> = if args.close_others { others } else { Vec::new() };
    if !args.yes {
        let rest = match closing.as_slice() {
            [] => String::new(),
            commits => {
                let names: Vec<String> = commits.iter().map(|commit| commit.name_any()).collect();
                format!(" and reject {}", names.join(", "))
            }
        };
        confirm(&format!("Approve commit {} of session {chosen} with tree {root}{rest}?", commit.name_any()))?;
    }
    record(cluster, commit, &root, Decision::Approve, None).await?;
    print(&format!("commit {} approved\n", commit.name_any()))?;
    let mut failed = None;
    for other in closing {
        // One that has no tree yet cannot be decided on, and says so.
        let rejected = match decidable(other, None) {
            Ok(root) => {
                let why = format!("{} was taken instead", commit.name_any());
                record(cluster, other, &root, Decision::Reject, Some(&why)).await.map(drop)
            }
            Err(error) => Err(error),
        };
        match rejected {
            Ok(()) => print(&format!("commit {} rejected\n", other.name_any()))?,
            Err(error) => {
                eprintln!("commit {} is not closed: {error:#}", other.name_any());
                failed = Some(error);
            }
        }
    }
    failed.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use aether_api::{AetherCommandSpec, AetherCommandStatus};
    use jiff::Timestamp;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    #[test]
    fn commands_are_counted_and_the_last_one_is_named() {
        let command = |argv: &str, exit, at| {
            let spec = AetherCommandSpec { session: "s".into(), command: vec![argv.into()], ..Default::default() };
            let mut command = AetherCommand::new(argv, spec);
            let finished = Some(Time(Timestamp::from_second(at).unwrap()));
            command.status = Some(AetherCommandStatus { exit_code: Some(exit), finished, ..Default::default() });
            command
        };
        let commands = [command("late", 1, 9), command("early", 0, 2), command("middle", 0, 5)];
        let tally = Tally::of("s", &commands);
        assert_eq!(tally, Tally { good: 2, bad: 1, last: Some("late".into()), exit: Some(1) });
        assert_eq!(tally.counts().unwrap(), "2 ok, 1 failed");
        assert_eq!(Tally::of("other", &commands).counts(), None);
    }
}
