//! `checkpoint`: keeping a state; also what `diff` does for the time of a diff.

use aether_api::checkpoint::DeletionPolicy;
use aether_api::session::Durability;
use aether_api::{AetherCheckpoint, AetherCheckpointSpec, conditions};
use anyhow::{Result, anyhow};
use kube::ResourceExt;
use kube::api::PostParams;

use crate::cli::{self, WaitFor};
use crate::cluster::{Cluster, explain};
use crate::output::{self, Progress, bytes};
use crate::wait::{self, Deadline, Verdict, in_words};

pub(crate) async fn checkpoint(cluster: &Cluster, args: &cli::Checkpoint) -> Result<()> {
    cluster.session(&args.session).await?;
    let deadline = Deadline::after(args.patience.timeout);
    let spec = AetherCheckpointSpec {
        session: args.session.clone(),
        message: args.message.clone(),
        deletion_policy: if args.with_session { DeletionPolicy::WithSession } else { DeletionPolicy::Keep },
    };
    let mut wanted = AetherCheckpoint::new(args.name.as_deref().unwrap_or_default(), spec);
    if args.name.is_none() {
        wanted.metadata.name = None;
        wanted.metadata.generate_name = Some(format!("{}-", args.session));
    }
    let mut checkpoint = cluster.api().create(&PostParams::default(), &wanted).await.map_err(|error| match error {
        kube::Error::Api(status) if status.is_already_exists() => anyhow!(
            "checkpoint {} exists already in namespace {}: take another --name",
            wanted.name_any(),
            cluster.namespace
        ),
        error => explain(error, &format!("create a checkpoint of session {}", args.session)),
    })?;
    let name = checkpoint.name_any();
    if let Some(wanted) = match args.wait {
        WaitFor::None => None,
        WaitFor::Local => Some(Durability::Local),
        WaitFor::Durable => Some(Durability::Durable),
    } {
        checkpoint = reach(cluster, &name, wanted, deadline).await?;
    }
    match args.print.output {
        Some(format) => output::object(&checkpoint, format),
        None => output::print(&(sentence(&checkpoint) + "\n")),
    }
}

/// Waits until the checkpoint is as durable as `wanted`.
pub(crate) async fn reach(
    cluster: &Cluster,
    name: &str,
    wanted: Durability,
    deadline: Deadline,
) -> Result<AetherCheckpoint> {
    let what = match wanted {
        Durability::Local => format!("checkpoint {name} to be taken"),
        Durability::Durable => format!("checkpoint {name} to be in the store"),
    };
    wait::until(cluster.api(), name, &what, deadline, &Progress::new(cluster.quiet), |checkpoint| {
        reached(name, wanted, checkpoint)
    })
    .await
}

fn reached(name: &str, wanted: Durability, checkpoint: Option<&AetherCheckpoint>) -> Verdict<AetherCheckpoint> {
    let Some(checkpoint) = checkpoint else {
        return Verdict::Failed(anyhow!("checkpoint {name} was deleted meanwhile"));
    };
    let Some(status) = &checkpoint.status else {
        return Verdict::Waiting("neither the operator nor the session's node has taken it up yet".into());
    };
    if let Some(failed) =
        conditions::get(&status.conditions, conditions::FAILED).filter(|failed| failed.status == "True")
    {
        return Verdict::Failed(anyhow!("checkpoint {name} failed: {}", in_words(failed)));
    }
    match (status.durability, wanted) {
        (Some(Durability::Durable), _) | (Some(Durability::Local), Durability::Local) => {
            Verdict::Done(checkpoint.clone())
        }
        (durability, _) => {
            let type_ = if durability.is_some() { conditions::DURABLE } else { conditions::READY };
            let condition = conditions::get(&status.conditions, type_).filter(|condition| condition.status != "True");
            let node = status.node.as_ref().map(|node| format!("node {node} uploads it"));
            Verdict::Waiting(condition.map(in_words).or(node).unwrap_or_default())
        }
    }
}

fn sentence(checkpoint: &AetherCheckpoint) -> String {
    let status = checkpoint.status.clone().unwrap_or_default();
    let (name, session) = (checkpoint.name_any(), &checkpoint.spec.session);
    let state = match status.durability {
        None => return format!("checkpoint {name} of session {session} asked for"),
        Some(Durability::Local) => "taken",
        Some(Durability::Durable) => "taken and in the store",
    };
    let changed = match (status.changed_files, status.own_bytes) {
        (Some(files), Some(own)) => format!(", {files} changed files, {} of its own", bytes(own)),
        (Some(files), None) => format!(", {files} changed files"),
        _ => String::new(),
    };
    let frozen = status
        .frozen_microseconds
        .map_or_else(String::new, |frozen| format!(", pods stood still for {}", output::frozen(frozen)));
    format!("checkpoint {name} of session {session} {state}{changed}{frozen}")
}

#[cfg(test)]
mod tests {
    use aether_api::AetherCheckpointStatus;
    use aether_api::conditions::{Wanted, reason};

    use super::*;

    fn with(durability: Option<Durability>, failed: bool) -> AetherCheckpoint {
        let mut checkpoint =
            AetherCheckpoint::new("k", AetherCheckpointSpec { session: "a".into(), ..Default::default() });
        let mut status = AetherCheckpointStatus { durability, ..Default::default() };
        if failed {
            conditions::set(
                &mut status.conditions,
                Wanted::yes(conditions::FAILED, reason::NODE_FAILED, "the disk is full"),
                None,
            );
        }
        checkpoint.status = Some(status);
        checkpoint
    }

    #[test]
    fn local_is_not_durable() {
        let local = with(Some(Durability::Local), false);
        assert!(matches!(reached("k", Durability::Local, Some(&local)), Verdict::Done(_)));
        assert!(matches!(reached("k", Durability::Durable, Some(&local)), Verdict::Waiting(_)));
        let durable = with(Some(Durability::Durable), false);
        assert!(matches!(reached("k", Durability::Local, Some(&durable)), Verdict::Done(_)));
        assert!(matches!(reached("k", Durability::Local, Some(&with(None, false))), Verdict::Waiting(_)));
    }

    #[test]
    fn a_failure_ends_the_wait_whatever_was_reached() {
        let Verdict::Failed(error) = reached("k", Durability::Durable, Some(&with(Some(Durability::Local), true)))
        else {
            panic!("goes on")
        };
        assert!(error.to_string().contains("the disk is full"));
    }
}
