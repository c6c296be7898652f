//! Whether the commands that a review rule demands have succeeded on the tree of a commit. Pure.
//!
//! A command counts by what it left: it ran with `checkpointAfter`, and the checkpoint that the operator itself made right then is
//! of exactly this tree. What ran beside it in the session is not seen; a rule that must hold against whoever can write there says
//! the command, and reviewers look at what the tests do.

use aether_api::names::CHECK_LABEL;
use aether_api::review::Check;
use aether_api::{AetherCheckpoint, AetherCommand};
use kube::ResourceExt;

/// What is missing, a sentence for each check.
pub(super) fn missing(
    checks: &[Check],
    commands: &[AetherCommand],
    checkpoints: &[AetherCheckpoint],
    root: &str,
) -> Vec<String> {
    let left = |command: &AetherCommand| {
        let status = command.status.as_ref()?;
        let (name, uid) = (status.checkpoint.as_ref()?, status.checkpoint_uid.as_ref()?);
        let there = checkpoints.iter().find(|there| there.name_any() == *name && there.uid().as_ref() == Some(uid))?;
        there.status.as_ref()?.root.clone()
    };
    let passed = |check: &Check| {
        commands.iter().any(|command| {
            is_for(command, check)
                && command
                    .status
                    .as_ref()
                    .is_some_and(|status| status.exit_code == Some(0) && status.finished.is_some())
                && left(command).as_deref() == Some(root)
        })
    };
    checks.iter().filter(|check| !passed(check)).map(|check| say(check, commands, root)).collect()
}

/// Whether the command is the one that the check speaks of.
fn is_for(command: &AetherCommand, check: &Check) -> bool {
    let named = command.name_any() == check.name || command.labels().get(CHECK_LABEL) == Some(&check.name);
    let spec = &command.spec;
    let same = check.command.as_ref().is_none_or(|wanted| {
        spec.command == *wanted
            && spec.image == check.image
            && spec.working_dir.as_deref().unwrap_or_default() == check.working_dir.as_deref().unwrap_or_default()
            && spec.env == check.env
    });
    named && same
}

fn say(check: &Check, commands: &[AetherCommand], root: &str) -> String {
    let name = &check.name;
    let ran = commands.iter().find(|command| is_for(command, check));
    let why = match ran.and_then(|command| Some((command, command.status.as_ref()?))) {
        None => "no such AetherCommand has run in this namespace".to_owned(),
        Some((command, status)) if status.finished.is_none() => format!("AetherCommand {} runs", command.name_any()),
        Some((command, status)) if status.exit_code != Some(0) => {
            format!("AetherCommand {} failed", command.name_any())
        }
        Some((command, _)) if !command.spec.checkpoint_after => {
            format!(
                "AetherCommand {} ran without checkpointAfter, so that it is not known on what tree",
                command.name_any()
            )
        }
        Some((command, _)) => format!("AetherCommand {} left another tree than {root}", command.name_any()),
    };
    format!("check {name}: {why}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_api::{AetherCheckpointStatus, AetherCommandSpec, AetherCommandStatus};

    fn command(name: &str) -> AetherCommand {
        let spec = AetherCommandSpec {
            session: "fix".into(),
            command: vec!["make".into(), "test".into()],
            checkpoint_after: true,
            ..Default::default()
        };
        let mut command = AetherCommand::new(name, spec);
        command.status = Some(AetherCommandStatus {
            exit_code: Some(0),
            finished: Some(crate::objects::now()),
            checkpoint: Some(name.into()),
            checkpoint_uid: Some("c-1".into()),
            ..Default::default()
        });
        command
    }

    fn checkpoint(name: &str, uid: &str, root: &str) -> AetherCheckpoint {
        let mut checkpoint = AetherCheckpoint::new(name, Default::default());
        checkpoint.metadata.uid = Some(uid.into());
        checkpoint.status = Some(AetherCheckpointStatus { root: Some(root.into()), ..Default::default() });
        checkpoint
    }

    #[test]
    fn a_check_is_passed_on_the_tree_that_the_command_left() {
        let check =
            Check { name: "tests".into(), command: Some(vec!["make".into(), "test".into()]), ..Check::default() };
        let with = |command: AetherCommand, checkpoint: AetherCheckpoint| {
            missing(std::slice::from_ref(&check), &[command], &[checkpoint], "aa/1").pop().unwrap_or_default()
        };
        let good = || checkpoint("tests", "c-1", "aa/1");
        assert_eq!(with(command("tests"), good()), "");
        let mut labelled = command("run-7");
        labelled.labels_mut().insert(CHECK_LABEL.into(), "tests".into());
        assert_eq!(with(labelled, checkpoint("run-7", "c-1", "aa/1")), "");
        let refused = |change: fn(&mut AetherCommand), word: &str| {
            let mut command = command("tests");
            change(&mut command);
            let said = with(command, good());
            assert!(said.contains(word), "{said}");
        };
        refused(|command| command.metadata.name = Some("run".into()), "no such");
        refused(|command| command.spec.command = vec!["true".into()], "no such");
        refused(|command| command.spec.image = Some("mine".into()), "no such");
        refused(|command| command.spec.working_dir = Some("empty".into()), "no such");
        refused(|command| command.spec.env = vec![Default::default()], "no such");
        refused(|command| command.status.as_mut().unwrap().exit_code = Some(1), "failed");
        refused(|command| command.status.as_mut().unwrap().finished = None, "runs");
        refused(|command| command.status.as_mut().unwrap().checkpoint_uid = None, "another tree");
        refused(
            |command| {
                command.spec.checkpoint_after = false;
                command.status.as_mut().unwrap().checkpoint = None;
            },
            "checkpointAfter",
        );
        assert!(with(command("tests"), checkpoint("tests", "c-1", "bb/2")).contains("another tree"));
        assert!(
            with(command("tests"), checkpoint("tests", "c-2", "aa/1")).contains("another tree"),
            "made anew by hand"
        );
    }
}
