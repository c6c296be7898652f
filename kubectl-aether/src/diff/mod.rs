//! `diff`: what changed, as git shows it.
//!
//! The cluster sends the changed paths' old and new contents as a fast-import stream; git itself compares them. For a
//! session a checkpoint is taken, and it is deleted before anything is shown, so that nothing stays behind whatever
//! becomes of the pager.

mod git;

use aether_api::checkpoint::DeletionPolicy;
use aether_api::session::Durability;
use aether_api::{AetherCheckpoint, AetherCheckpointSpec, names};
use anyhow::{Context, Result, anyhow, bail};
use http::header::ACCEPT;
use kube::ResourceExt;
use kube::api::{DeleteParams, PostParams};
use rand::Rng;

use crate::checkpoint::reach;
use crate::cli;
use crate::cluster::{Cluster, explain};
use crate::output::Progress;
use crate::signals::Signals;
use crate::wait::Deadline;

/// How long the temporary checkpoint's deletion may take on the way out.
const CLEANUP_PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);
/// Times a transfer is begun again after it broke off.
const ATTEMPTS: u32 = 3;

/// Shows the diff; the result is git's exit code.
pub(crate) async fn diff(cluster: &Cluster, args: &cli::Diff) -> Result<u8> {
    let comparison = Comparison::of(args)?;
    let view = git::View::of(args);
    // Before the cluster does anything for it.
    git::check().await?;
    require_review_api(cluster).await?;
    let mut signals = Signals::listen()?;
    let repository = match comparison {
        Comparison::Session { session, against } => {
            of_session(cluster, &session, against.as_deref(), args, &mut signals).await?
        }
        Comparison::Checkpoint { checkpoint, against } => tokio::select! {
            fetched = of_checkpoint(cluster, &checkpoint, against.as_deref(), Deadline::after(args.patience.timeout)) => fetched?,
            signal = signals.next() => return Err(signal.into()),
        },
    };
    tokio::select! {
        code = repository.show(&view) => code,
        signal = signals.next_but_interrupt() => Err(signal.into()),
    }
}

/// What is compared with what. Without `against`, it is where the session started.
#[derive(Debug, PartialEq, Eq)]
enum Comparison {
    Session { session: String, against: Option<String> },
    Checkpoint { checkpoint: String, against: Option<String> },
}

impl Comparison {
    fn of(args: &cli::Diff) -> Result<Self> {
        let against = args.against.clone();
        Ok(match (&args.session, args.checkpoint.as_slice()) {
            (Some(session), _) => Self::Session { session: session.clone(), against },
            (None, [checkpoint]) => Self::Checkpoint { checkpoint: checkpoint.clone(), against },
            (None, [old, new]) if against.is_none() => {
                Self::Checkpoint { checkpoint: new.clone(), against: Some(old.clone()) }
            }
            _ => bail!("a diff is between two states: say --checkpoint twice, or once with --against"),
        })
    }
}

async fn of_session(
    cluster: &Cluster,
    session: &str,
    against: Option<&str>,
    args: &cli::Diff,
    signals: &mut Signals,
) -> Result<git::Repository> {
    crate::sessions::refuse_hopeless(&cluster.session(session).await?)?;
    // Named here, so that it can be deleted also when the answer to its creation never came.
    let name = temporary_name(session);
    let fetch = async {
        let deadline = Deadline::after(args.patience.timeout);
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
        of_checkpoint(cluster, &name, against, deadline).await
    };
    let fetched = tokio::select! {
        fetched = fetch => fetched,
        signal = signals.next() => Err(signal.into()),
    };
    if let Err(error) = remove(cluster, &name).await {
        eprintln!(
            "warning: the checkpoint of this diff stays: {error:#}; `kubectl aether delete checkpoint/{name} -n {}`",
            cluster.namespace
        );
    }
    fetched
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

async fn of_checkpoint(
    cluster: &Cluster,
    name: &str,
    against: Option<&str>,
    deadline: Deadline,
) -> Result<git::Repository> {
    for checkpoint in [Some(name), against].into_iter().flatten() {
        cluster.find::<AetherCheckpoint>(checkpoint).await?;
        reach(cluster, checkpoint, Durability::Durable, deadline).await?;
    }
    Progress::new(cluster.quiet).say("fetching the changes");
    let mut attempt = 1;
    loop {
        let repository = git::Repository::create().await?;
        match repository.import(changes(cluster, name, against).await?).await {
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

/// Where the aggregated API has the changes of a checkpoint.
fn changes_path(namespace: &str, name: &str, against: Option<&str>) -> String {
    let against = against.map(|against| format!("?against={against}")).unwrap_or_default();
    format!(
        "/apis/{}/{}/namespaces/{namespace}/checkpoints/{name}/changes{against}",
        names::REVIEW_GROUP,
        names::VERSION
    )
}

async fn changes(cluster: &Cluster, name: &str, against: Option<&str>) -> Result<impl futures::AsyncBufRead + use<>> {
    let request = http::Request::get(changes_path(&cluster.namespace, name, against))
        .header(ACCEPT, "application/vnd.git.fast-import, application/json")
        .body(Vec::new())?;
    let action = match against {
        None => format!("read the changes of checkpoint {name}"),
        Some(against) => format!("read the changes from checkpoint {against} to {name}"),
    };
    cluster.client.request_stream(request).await.map_err(|error| review_error(error, &action))
}

/// Fails unless the cluster serves the aggregated API, before a checkpoint is taken for nothing.
async fn require_review_api(cluster: &Cluster) -> Result<()> {
    let request = http::Request::get(format!("/apis/{}/{}", names::REVIEW_GROUP, names::VERSION)).body(Vec::new())?;
    cluster.client.request_text(request).await.map(drop).map_err(|error| review_error(error, "ask for the review API"))
}

fn review_error(error: kube::Error, action: &str) -> anyhow::Error {
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

    fn comparison(words: &[&str]) -> Result<Comparison> {
        let cli = cli::Cli::try_parse_from(["kubectl-aether", "diff"].iter().chain(words)).unwrap();
        let cli::Command::Diff(args) = cli.command else { panic!("not diff") };
        Comparison::of(&args)
    }

    #[test]
    fn what_is_compared() {
        let checkpoint = |name: &str, against: Option<&str>| Comparison::Checkpoint {
            checkpoint: name.into(),
            against: against.map(Into::into),
        };
        assert_eq!(comparison(&["--checkpoint", "a"]).unwrap(), checkpoint("a", None));
        assert_eq!(comparison(&["--checkpoint", "a", "--checkpoint", "b"]).unwrap(), checkpoint("b", Some("a")));
        assert_eq!(comparison(&["--checkpoint", "b", "--against", "a"]).unwrap(), checkpoint("b", Some("a")));
        assert_eq!(
            comparison(&["s", "--against", "a"]).unwrap(),
            Comparison::Session { session: "s".into(), against: Some("a".into()) }
        );
        assert!(comparison(&["--checkpoint", "a", "--checkpoint", "b", "--against", "c"]).is_err());
        assert!(comparison(&["--checkpoint", "a", "--checkpoint", "b", "--checkpoint", "c"]).is_err());
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
