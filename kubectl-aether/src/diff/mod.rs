//! `diff`: what changed, as git shows it.
//!
//! The cluster sends the changed paths' old and new contents as a fast-import stream; git itself compares them. For a
//! session a checkpoint is taken, and it is deleted before anything is shown, so that nothing stays behind whatever
//! becomes of the pager.

mod columns;
mod git;

use std::cell::RefCell;

use aether_api::checkpoint::DeletionPolicy;
use aether_api::commit::CommitPhase;
use aether_api::session::Durability;
use aether_api::{AetherCheckpoint, AetherCheckpointSpec, AetherCommit, AetherSession, names};
use anyhow::{Context, Result, anyhow, bail};
use http::header::ACCEPT;
use kube::ResourceExt;
use kube::api::{DeleteParams, PostParams};
use rand::Rng;

use crate::checkpoint::reach;
use crate::cli;
use crate::cluster::{Cluster, explain};
use crate::kinds::Kind;
use crate::output::Progress;
use crate::signals::Signals;
use crate::wait::{self, Deadline, Verdict};

pub(crate) use git::{Numbers, Repository, check as check_git};

/// How long the temporary checkpoint's deletion may take on the way out.
const CLEANUP_PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);
/// Times a transfer is begun again after it broke off.
const ATTEMPTS: u32 = 3;

/// Shows the diff; the result is git's exit code.
pub(crate) async fn diff(cluster: &Cluster, args: &cli::Diff) -> Result<u8> {
    let (head, base) = sides(args)?;
    let view = git::View::of(args);
    // Before the cluster does anything for it.
    git::check().await?;
    require_review_api(cluster).await?;
    let mut signals = Signals::listen()?;
    let deadline = Deadline::after(args.patience.timeout);
    let repository = fetch(cluster, &mut signals, async |temporary| {
        let base = match &base {
            Some(base) => Some(base.state(cluster, temporary, deadline).await?),
            None => None,
        };
        let head = head.state(cluster, temporary, deadline).await?;
        transfer(cluster, &head, base.as_ref(), deadline).await
    })
    .await?;
    tokio::select! {
        code = repository.show(&view) => code,
        signal = signals.next_but_interrupt() => Err(signal.into()),
    }
}

/// One side of a comparison, as typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Of this kind.
    Of(Kind, String),
    /// A session of this name; without one, a commit, or a checkpoint.
    Named(String),
}

impl Side {
    fn typed(word: &str) -> Result<Self> {
        match word.split_once('/') {
            None => Ok(Self::Named(word.into())),
            Some((kind, name)) => match Kind::of(kind) {
                Some(kind @ (Kind::Session | Kind::Checkpoint | Kind::Commit)) if !name.is_empty() => {
                    Ok(Self::Of(kind, name.into()))
                }
                _ => bail!("{word:?} cannot be compared: say NAME, session/NAME, checkpoint/NAME or commit/NAME"),
            },
        }
    }

    /// What there is to compare: takes the checkpoint of a session, and notes it among `temporary`.
    pub(crate) async fn state(&self, cluster: &Cluster, temporary: &Temporary, deadline: Deadline) -> Result<State> {
        match self {
            Self::Of(Kind::Commit, name) => State::of_commit(cluster, name, deadline).await,
            Self::Of(Kind::Checkpoint, name) => {
                cluster.find::<AetherCheckpoint>(name).await?;
                Ok(State::Checkpoint(name.clone()))
            }
            Self::Of(_, name) => take(cluster, name, temporary).await,
            Self::Named(name) => {
                let session = cluster.api::<AetherSession>().get_opt(name).await;
                if session.map_err(|error| explain(error, &format!("read session {name}")))?.is_some() {
                    return take(cluster, name, temporary).await;
                }
                // Who may not read the one may still read the other.
                if let Ok(Some(_)) = cluster.api::<AetherCommit>().get_opt(name).await {
                    return State::of_commit(cluster, name, deadline).await;
                }
                if let Ok(Some(_)) = cluster.api::<AetherCheckpoint>().get_opt(name).await {
                    return Ok(State::Checkpoint(name.clone()));
                }
                bail!("{}", cluster.not_found::<AetherSession>(name).await)
            }
        }
    }
}

/// What is compared, and with what; without the latter, it is where the session started.
fn sides(args: &cli::Diff) -> Result<(Side, Option<Side>)> {
    let checkpoint = |name: &String| Side::Of(Kind::Checkpoint, name.clone());
    // A bare name after --against has always been a checkpoint.
    let against = match args.against.as_deref().map(Side::typed).transpose()? {
        Some(Side::Named(name)) => Some(Side::Of(Kind::Checkpoint, name)),
        other => other,
    };
    Ok(match (args.objects.as_slice(), args.checkpoint.as_slice(), against) {
        ([head], [], against) => (Side::typed(head)?, against),
        ([base, head], [], None) => (Side::typed(head)?, Some(Side::typed(base)?)),
        ([], [head], against) => (checkpoint(head), against),
        ([], [base, head], None) => (checkpoint(head), Some(checkpoint(base))),
        _ => bail!("a diff is between two states: say two objects, or one with --against"),
    })
}

/// What the aggregated API can compare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// A checkpoint, once it is in the store.
    Checkpoint(String),
    /// A commit by its own word on its tree, and its checkpoint.
    Commit(String, String),
}

impl State {
    async fn of_commit(cluster: &Cluster, name: &str, deadline: Deadline) -> Result<Self> {
        cluster.find::<AetherCommit>(name).await?;
        let what = format!("commit {name} to have a tree");
        let progress = Progress::new(cluster.quiet);
        wait::until(cluster.api::<AetherCommit>(), name, &what, deadline, &progress, |commit| {
            let Some(commit) = commit else {
                return Verdict::Failed(anyhow!("commit {name} was deleted meanwhile"));
            };
            let status = commit.status.clone().unwrap_or_default();
            match (&status.root, &status.checkpoint) {
                (Some(_), Some(checkpoint)) => Verdict::Done(Self::Commit(name.into(), checkpoint.clone())),
                _ if status.phase == Some(CommitPhase::Failed) => {
                    Verdict::Failed(anyhow!("commit {name} failed before it had a tree"))
                }
                _ => Verdict::Waiting("its checkpoint is on its way to the store".into()),
            }
        })
        .await
    }

    /// The checkpoint that holds the tree.
    fn checkpoint(&self) -> &str {
        match self {
            Self::Checkpoint(name) | Self::Commit(_, name) => name,
        }
    }

    /// Where the aggregated API has its changes.
    fn changes_path(&self, namespace: &str, against: Option<&Self>) -> String {
        let against = against.map(|against| format!("?against={}", against.checkpoint())).unwrap_or_default();
        let (resource, name) = match self {
            Self::Checkpoint(name) => ("checkpoints", name),
            Self::Commit(name, _) => ("commits", name),
        };
        format!(
            "/apis/{}/{}/namespaces/{namespace}/{resource}/{name}/changes{against}",
            names::REVIEW_GROUP,
            names::VERSION
        )
    }

    fn noun(&self) -> String {
        match self {
            Self::Checkpoint(name) => format!("checkpoint {name}"),
            Self::Commit(name, _) => format!("commit {name}"),
        }
    }
}

/// The checkpoints that were taken only to be compared.
#[derive(Default)]
pub(crate) struct Temporary(RefCell<Vec<String>>);

/// Does `work` until a signal comes, and removes the checkpoints that it took, whatever becomes of it.
pub(crate) async fn fetch<T>(
    cluster: &Cluster,
    signals: &mut Signals,
    work: impl AsyncFnOnce(&Temporary) -> Result<T>,
) -> Result<T> {
    let temporary = Temporary::default();
    let fetched = tokio::select! {
        fetched = work(&temporary) => fetched,
        signal = signals.next() => Err(signal.into()),
    };
    for name in temporary.0.into_inner() {
        if let Err(error) = remove(cluster, &name).await {
            eprintln!(
                "warning: the checkpoint of this diff stays: {error:#}; `kubectl aether delete checkpoint/{name} -n {}`",
                cluster.namespace
            );
        }
    }
    fetched
}

/// Takes a checkpoint of a session for the time of a diff.
async fn take(cluster: &Cluster, session: &str, temporary: &Temporary) -> Result<State> {
    crate::sessions::refuse_hopeless(&cluster.session(session).await?)?;
    // Named here, so that it can be deleted also when the answer to its creation never came.
    let name = temporary_name(session);
    temporary.0.borrow_mut().push(name.clone());
    let spec = AetherCheckpointSpec {
        session: session.into(),
        message: Some("for the time of a diff".into()),
        deletion_policy: DeletionPolicy::WithSession,
    };
    let mut checkpoint = AetherCheckpoint::new(&name, spec);
    checkpoint.labels_mut().insert(names::ORIGIN_LABEL.into(), names::ORIGIN_DIFF.into());
    cluster
        .api()
        .create(&PostParams::default(), &checkpoint)
        .await
        .map_err(|error| explain(error, &format!("take a checkpoint of session {session} to compare")))?;
    Ok(State::Checkpoint(name))
}

async fn remove(cluster: &Cluster, name: &str) -> Result<()> {
    let (api, how) = (cluster.api::<AetherCheckpoint>(), DeleteParams::default());
    match tokio::time::timeout(CLEANUP_PATIENCE, api.delete(name, &how))
        .await
        .context("the API server does not answer")?
    {
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        other => other.map(drop).map_err(|error| explain(error, &format!("delete checkpoint {name}"))),
    }
}

/// Brings the changes from `base`, or from where the session started, to `head` into a repository.
pub(crate) async fn transfer(
    cluster: &Cluster,
    head: &State,
    base: Option<&State>,
    deadline: Deadline,
) -> Result<Repository> {
    for state in [Some(head), base].into_iter().flatten() {
        if let State::Checkpoint(name) = state {
            reach(cluster, name, Durability::Durable, deadline).await?;
        }
    }
    Progress::new(cluster.quiet).say("fetching the changes");
    let mut attempt = 1;
    loop {
        let repository = Repository::create().await?;
        match repository.import(changes(cluster, head, base).await?).await {
            Ok(()) => return Ok(repository),
            Err(git::ImportError::Stream(error)) if attempt < ATTEMPTS => {
                attempt += 1;
                Progress::new(cluster.quiet).say(&format!("the transfer broke off ({error}); trying again"));
            }
            Err(git::ImportError::Stream(error)) => {
                bail!("the transfer of the changes broke off {ATTEMPTS} times: {error}")
            }
            Err(git::ImportError::Git(error)) => return Err(error),
        }
    }
}

/// What a commit changes, as its own status has its tree.
pub(crate) async fn of_commit(cluster: &Cluster, name: &str, deadline: Deadline) -> Result<Repository> {
    git::check().await?;
    let head = State::of_commit(cluster, name, deadline).await?;
    transfer(cluster, &head, None, deadline).await
}

async fn changes(cluster: &Cluster, head: &State, base: Option<&State>) -> Result<impl futures::AsyncBufRead + use<>> {
    let request = http::Request::get(head.changes_path(&cluster.namespace, base))
        .header(ACCEPT, "application/vnd.git.fast-import, application/json")
        .body(Vec::new())?;
    let action = match base {
        None => format!("read the changes of {}", head.noun()),
        Some(base) => format!("read the changes from {} to {}", base.noun(), head.noun()),
    };
    cluster.client.request_stream(request).await.map_err(|error| review_error(error, &action))
}

/// Fails unless the cluster serves the aggregated API, before a checkpoint is taken for nothing.
pub(crate) async fn require_review_api(cluster: &Cluster) -> Result<()> {
    let request = http::Request::get(format!("/apis/{}/{}", names::REVIEW_GROUP, names::VERSION)).body(Vec::new())?;
    cluster.client.request_text(request).await.map(drop).map_err(|error| review_error(error, "ask for the review API"))
}

pub(crate) fn review_error(error: kube::Error, action: &str) -> anyhow::Error {
    let service = format!("{}.{}", names::VERSION, names::REVIEW_GROUP);
    match error {
        kube::Error::Api(status)
            if status.code == 404 && status.details.as_ref().is_none_or(|details| details.name.is_empty()) =>
        {
            anyhow!(
                "cannot {action}: this cluster does not serve {}: diffs need Aether's review server, which its chart installs",
                names::REVIEW_GROUP
            )
        }
        kube::Error::Api(status) if matches!(status.code, 502..=504) => anyhow!(
            "cannot {action}: the review server is not available ({}): see `kubectl get apiservice {service}`",
            status.message.trim()
        ),
        error => explain(error, action),
    }
}

fn temporary_name(session: &str) -> String {
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut random = rand::rng();
    let suffix: String = (0..6).map(|_| char::from(LETTERS[random.random_range(0..LETTERS.len())])).collect();
    // Names are ASCII; the name must stay one when it is cut.
    let stem = session.get(..session.len().min(50)).unwrap_or(session).trim_end_matches(['-', '.']);
    format!("{stem}-diff-{suffix}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn of(words: &[&str]) -> Result<(Side, Option<Side>)> {
        let cli = cli::Cli::try_parse_from(["kubectl-aether", "diff"].iter().chain(words)).unwrap();
        let cli::Command::Diff(args) = cli.command else { panic!("not diff") };
        sides(&args)
    }

    #[test]
    fn what_is_compared() {
        let checkpoint = |name: &str| Side::Of(Kind::Checkpoint, name.into());
        let named = |name: &str| Side::Named(name.into());
        assert_eq!(of(&["--checkpoint", "a"]).unwrap(), (checkpoint("a"), None));
        assert_eq!(of(&["--checkpoint", "a", "--checkpoint", "b"]).unwrap(), (checkpoint("b"), Some(checkpoint("a"))));
        assert_eq!(of(&["--checkpoint", "b", "--against", "a"]).unwrap(), (checkpoint("b"), Some(checkpoint("a"))));
        assert_eq!(of(&["s", "--against", "a"]).unwrap(), (named("s"), Some(checkpoint("a"))));
        assert_eq!(of(&["a", "b"]).unwrap(), (named("b"), Some(named("a"))));
        let commit = Side::Of(Kind::Commit, "c".into());
        assert_eq!(of(&["s", "--against", "commit/c"]).unwrap(), (named("s"), Some(commit.clone())));
        assert_eq!(of(&["checkpoint/a", "acmt/c"]).unwrap(), (commit, Some(checkpoint("a"))));
        for bad in [
            &["--checkpoint", "a", "--checkpoint", "b", "--against", "c"][..],
            &["--checkpoint", "a", "--checkpoint", "b", "--checkpoint", "c"],
            &["a", "b", "--against", "c"],
            &["source/a"],
            &["commit/"],
        ] {
            assert!(of(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_commit_is_asked_for_by_its_own_name() {
        let commit = State::Commit("c".into(), "k".into());
        let base = "/apis/review.aether.dev/v1alpha1/namespaces/demo";
        assert_eq!(commit.changes_path("demo", None), format!("{base}/commits/c/changes"));
        let other = State::Checkpoint("o".into());
        assert_eq!(other.changes_path("demo", Some(&commit)), format!("{base}/checkpoints/o/changes?against=k"));
    }

    #[test]
    fn names_of_temporary_checkpoints_are_names() {
        for session in ["a", &"x".repeat(63), &format!("{}-{}", "y".repeat(49), "z")] {
            let name = temporary_name(session);
            assert_eq!(crate::parse::name(&name), Ok(name.clone()));
            assert_ne!(name, temporary_name(session));
        }
    }

    #[test]
    fn a_missing_review_server_is_told_from_a_missing_checkpoint() {
        let status = |code| kube::core::Status::failure("404 page not found", "").with_code(code);
        let text = review_error(kube::Error::Api(status(404).boxed()), "x").to_string();
        assert!(text.contains("does not serve review.aether.dev"), "{text}");
        let details = serde_json::from_str(r#"{"name": "k"}"#).unwrap();
        let text = review_error(kube::Error::Api(status(404).with_details(details).boxed()), "x").to_string();
        assert!(!text.contains("does not serve"), "{text}");
        let text = review_error(kube::Error::Api(status(503).boxed()), "x").to_string();
        assert!(text.contains("kubectl get apiservice v1alpha1.review.aether.dev"), "{text}");
    }
}
