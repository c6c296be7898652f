//! `delete`: objects of any kind of Aether, and waiting until they are gone.

use std::fmt::Debug;

use aether_api::{
    AetherApproval, AetherCheckpoint, AetherCommand, AetherCommit, AetherNote, AetherRestore, AetherSession,
    AetherSource,
};
use anyhow::Result;
use k8s_openapi::NamespaceResourceScope;
use kube::api::{DeleteParams, Preconditions};
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;

use crate::cli::Delete;
use crate::cluster::{Cluster, explain, noun};
use crate::kinds::{Kind, objects};
use crate::output::{Progress, confirm, print};
use crate::wait::{self, Deadline, Verdict};

/// Deletes in the order given; one that fails does not keep the others.
pub(crate) async fn delete(cluster: &Cluster, args: &Delete) -> Result<()> {
    let objects = objects(&args.objects)?;
    if !args.yes {
        ask(cluster, &objects).await?;
    }
    let deadline = Deadline::after(args.patience.timeout);
    let mut waits = Vec::new();
    let mut errors = Vec::new();
    for (kind, name) in &objects {
        let requested = match kind {
            Kind::Source => request::<AetherSource>(cluster, name, args).await,
            Kind::Session => request::<AetherSession>(cluster, name, args).await,
            Kind::Checkpoint => request::<AetherCheckpoint>(cluster, name, args).await,
            Kind::Restore => request::<AetherRestore>(cluster, name, args).await,
            Kind::Command => request::<AetherCommand>(cluster, name, args).await,
            Kind::Commit => request::<AetherCommit>(cluster, name, args).await,
            Kind::Approval => request::<AetherApproval>(cluster, name, args).await,
            Kind::Note => request::<AetherNote>(cluster, name, args).await,
        };
        match requested {
            Ok(Some(uid)) => waits.push((*kind, name, uid)),
            Ok(None) => {}
            Err(error) => errors.push(error),
        }
    }
    for (kind, name, uid) in waits {
        let gone = if args.no_wait {
            Ok(())
        } else {
            match kind {
                Kind::Source => gone::<AetherSource>(cluster, name, &uid, deadline).await,
                Kind::Session => gone::<AetherSession>(cluster, name, &uid, deadline).await,
                Kind::Checkpoint => gone::<AetherCheckpoint>(cluster, name, &uid, deadline).await,
                Kind::Restore => gone::<AetherRestore>(cluster, name, &uid, deadline).await,
                Kind::Command => gone::<AetherCommand>(cluster, name, &uid, deadline).await,
                Kind::Commit => gone::<AetherCommit>(cluster, name, &uid, deadline).await,
                Kind::Approval => gone::<AetherApproval>(cluster, name, &uid, deadline).await,
                Kind::Note => gone::<AetherNote>(cluster, name, &uid, deadline).await,
            }
        };
        match gone {
            Ok(()) => print(&format!(
                "{} {name} {}\n",
                kind.word(),
                if args.no_wait { "is being deleted" } else { "deleted" }
            ))?,
            Err(error) => errors.push(error),
        }
    }
    let count = errors.len();
    match errors.into_iter().next() {
        Some(error) if count > 1 => {
            Err(error.context(format!("{count} of {} could not be deleted; the first", objects.len())))
        }
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Asks before files go: of sessions, and of checkpoints.
async fn ask(cluster: &Cluster, objects: &[(Kind, String)]) -> Result<()> {
    let mut losses = Vec::new();
    for (kind, name) in objects {
        match kind {
            Kind::Session => {
                let session = cluster.api::<AetherSession>().get_opt(name).await.ok().flatten();
                let changed = session.and_then(|session| session.status?.changed_files).filter(|changed| *changed > 0);
                losses.push(match changed {
                    Some(changed) => format!("session {name} with {changed} changed files"),
                    None => format!("session {name}"),
                });
            }
            Kind::Checkpoint => losses.push(format!("checkpoint {name}")),
            Kind::Commit => losses.push(format!("commit {name}, the record of who approved what,")),
            _ => {}
        }
    }
    if losses.is_empty() {
        return Ok(());
    }
    confirm(&format!("Delete {} of namespace {}?", losses.join(", "), cluster.namespace))
}

/// Asks for the deletion; the result is the uid of what is to go, if it was there.
async fn request<K>(cluster: &Cluster, name: &str, args: &Delete) -> Result<Option<String>>
where
    K: Resource<Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
    K::DynamicType: Default,
{
    let found =
        cluster.api::<K>().get_opt(name).await.map_err(|error| explain(error, &format!("read {}", noun::<K>(name))))?;
    let Some(uid) = found.as_ref().and_then(ResourceExt::uid) else {
        return if args.ignore_not_found {
            Ok(None)
        } else {
            Err(anyhow::anyhow!("{}", cluster.not_found::<K>(name).await))
        };
    };
    // Not one that somebody makes of the same name meanwhile.
    let how =
        DeleteParams::background().preconditions(Preconditions { uid: Some(uid.clone()), resource_version: None });
    match cluster.api::<K>().delete(name, &how).await {
        Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(Some(uid)),
        other => other.map(|_| Some(uid)).map_err(|error| explain(error, &format!("delete {}", noun::<K>(name)))),
    }
}

async fn gone<K>(cluster: &Cluster, name: &str, uid: &str, deadline: Deadline) -> Result<()>
where
    K: Resource<Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug + Send + 'static,
    K::DynamicType: Default,
{
    let what = format!("{} to be gone", noun::<K>(name));
    wait::until(cluster.api::<K>(), name, &what, deadline, &Progress::new(cluster.quiet), |object| match object {
        None => Verdict::Done(()),
        Some(object) if object.uid().as_deref() != Some(uid) => Verdict::Done(()),
        Some(object) => Verdict::Waiting(match object.finalizers() {
            [] => String::new(),
            finalizers => format!("{} still clean up; pods that use it keep it", finalizers.join(", ")),
        }),
    })
    .await
}
