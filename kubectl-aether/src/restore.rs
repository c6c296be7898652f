//! `restore`: taking a session back to a checkpoint.

use aether_api::{AetherCheckpoint, AetherRestore, AetherRestoreSpec, conditions};
use anyhow::{Result, anyhow, bail};
use kube::ResourceExt;
use kube::api::PostParams;

use crate::cli::Restore;
use crate::cluster::{Cluster, explain};
use crate::output::{self, Progress, confirm};
use crate::wait::{self, Deadline, Verdict, in_words};

pub(crate) async fn restore(cluster: &Cluster, args: &Restore) -> Result<()> {
    let session = cluster.session(&args.session).await?;
    crate::sessions::refuse_hopeless(&session)?;
    let checkpoint: AetherCheckpoint = cluster.find(&args.checkpoint).await?;
    let failed = checkpoint.status.as_ref().and_then(|status| conditions::get(&status.conditions, conditions::FAILED));
    if let Some(failed) = failed.filter(|failed| failed.status == "True") {
        bail!("checkpoint {} failed and cannot be restored: {}", args.checkpoint, in_words(failed));
    }
    if !args.yes {
        let held = session.holder().map(|node| format!(", mounted on {node},")).unwrap_or_default();
        let message = checkpoint.spec.message.as_ref().map(|message| format!(" ({message})")).unwrap_or_default();
        confirm(&format!(
            "Take session {}{held} back to checkpoint {}{message}, {} old? Its present state is kept as a safety checkpoint.",
            args.session,
            args.checkpoint,
            output::age(checkpoint.metadata.creation_timestamp.as_ref())
        ))?;
    }
    let deadline = Deadline::after(args.patience.timeout);
    let spec = AetherRestoreSpec {
        session: args.session.clone(),
        checkpoint: args.checkpoint.clone(),
        ttl_seconds_after_finished: None,
    };
    let mut wanted = AetherRestore::new("", spec);
    wanted.metadata.name = None;
    wanted.metadata.generate_name = Some(format!("{}-", args.session));
    let create = cluster.api().create(&PostParams::default(), &wanted).await;
    let mut restore = create.map_err(|error| explain(error, &format!("restore session {}", args.session)))?;
    let name = restore.name_any();
    if !args.no_wait {
        let what = format!("session {} to be restored", args.session);
        restore = wait::until(cluster.api(), &name, &what, deadline, &Progress::new(cluster.quiet), |restore| {
            done(&name, restore)
        })
        .await?;
    }
    match args.print.output {
        Some(format) => output::object(&restore, format),
        None => output::print(&(sentence(&restore) + "\n")),
    }
}

fn done(name: &str, restore: Option<&AetherRestore>) -> Verdict<AetherRestore> {
    let Some(restore) = restore else { return Verdict::Failed(anyhow!("restore {name} was deleted meanwhile")) };
    let status = restore.status.clone().unwrap_or_default();
    let failed = conditions::get(&status.conditions, conditions::FAILED);
    if let Some(failed) = failed.filter(|failed| failed.status == "True") {
        let back = status
            .safety_checkpoint
            .map(|safety| format!(". Its state before is checkpoint {safety}"))
            .unwrap_or_default();
        return Verdict::Failed(anyhow!(
            "session {} was not restored: {}{back}",
            restore.spec.session,
            in_words(failed)
        ));
    }
    if conditions::is_true(&status.conditions, conditions::COMPLETE) {
        return Verdict::Done(restore.clone());
    }
    let said = conditions::get(&status.conditions, conditions::COMPLETE).map(in_words);
    Verdict::Waiting(
        said.or(status.phase)
            .unwrap_or_else(|| "neither the operator nor the session's node has taken it up yet".into()),
    )
}

fn sentence(restore: &AetherRestore) -> String {
    let spec = &restore.spec;
    let Some(status) = restore.status.as_ref().filter(|status| status.finished.is_some()) else {
        return format!(
            "restore {} of session {} to checkpoint {} asked for",
            restore.name_any(),
            spec.session,
            spec.checkpoint
        );
    };
    let paths = status.changed_paths.map(|paths| format!(", {paths} paths changed")).unwrap_or_default();
    let safety = status
        .safety_checkpoint
        .as_ref()
        .map(|safety| format!("; the way back is checkpoint {safety}"))
        .unwrap_or_default();
    format!("session {} restored to checkpoint {}{paths}{safety}", spec.session, spec.checkpoint)
}

#[cfg(test)]
mod tests {
    use aether_api::AetherRestoreStatus;
    use aether_api::conditions::{Wanted, reason};

    use super::*;

    #[test]
    fn a_restore_ends_with_its_conditions() {
        let mut restore = AetherRestore::new(
            "r",
            AetherRestoreSpec { session: "a".into(), checkpoint: "k".into(), ..Default::default() },
        );
        assert!(matches!(done("r", Some(&restore)), Verdict::Waiting(_)));
        let mut status = AetherRestoreStatus { safety_checkpoint: Some("a-safety".into()), ..Default::default() };
        conditions::set(
            &mut status.conditions,
            Wanted::yes(conditions::FAILED, reason::NODE_FAILED, "disk full"),
            None,
        );
        restore.status = Some(status);
        let Verdict::Failed(error) = done("r", Some(&restore)) else { panic!("goes on") };
        assert!(error.to_string().contains("disk full") && error.to_string().contains("a-safety"));
        let mut status = AetherRestoreStatus::default();
        conditions::set(&mut status.conditions, Wanted::yes(conditions::COMPLETE, reason::DONE, ""), None);
        restore.status = Some(status);
        assert!(matches!(done("r", Some(&restore)), Verdict::Done(_)));
    }
}
