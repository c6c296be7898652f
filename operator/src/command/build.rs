//! The pod of a command: the session's claim at `/workspace`, a small program that keeps time and reports the exit
//! code, and nothing that an agent could borrow power from (no token, no secrets, no service account of its choice).

use std::collections::BTreeMap;
use std::time::Duration;

use aether_api::names::{COMMAND_LABEL, SESSION_LABEL, SESSION_UID_LABEL};
use aether_api::session::Owner;
use aether_api::{AetherCommand, AetherCommandSpec, AetherSession};
use k8s_openapi::api::core::v1::{
    Affinity, Container, EmptyDirVolumeSource, EnvVar, NodeAffinity, NodeSelectorRequirement, NodeSelectorTerm,
    PersistentVolumeClaimVolumeSource, Pod, PodSpec, PreferredSchedulingTerm, Volume, VolumeMount,
};
use kube::ResourceExt;
use kube::core::ObjectMeta;

use crate::config::Config;
use crate::{objects, pod};

/// The container that runs the command.
pub(super) const CONTAINER: &str = "command";
/// The container that brings the program which runs it.
pub(super) const INSTALLER: &str = "worker";
/// Annotation: which container kubectl means when none is named.
const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";
/// Where the session is in the pod.
const WORKSPACE: &str = "/workspace";
/// Where the program is in the pod.
const TOOLS: &str = "/aether";
/// What the command has between TERM and KILL when nobody says otherwise.
const DEFAULT_GRACE: Duration = Duration::from_secs(10);

/// The first rule that the spec breaks, for people; said again for API servers that drop CEL rules.
pub(super) fn violation(spec: &AetherCommandSpec) -> Option<String> {
    if spec.session.is_empty() {
        return Some("spec.session is empty: name an AetherSession".into());
    }
    if spec.command.first().is_none_or(String::is_empty) {
        return Some("spec.command is empty: say a program and its arguments, such as [\"make\", \"test\"]".into());
    }
    if let Some(directory) = &spec.working_dir
        && (directory.starts_with('/') || directory.split('/').any(|part| part == ".."))
    {
        return Some(format!(
            "spec.workingDir {directory:?} leaves the session: say a directory relative to its root, without .."
        ));
    }
    if let Some(variable) = spec.env.iter().find(|variable| variable.name.is_empty() || variable.name.contains('=')) {
        return Some(format!("spec.env has a variable named {:?}: a name is not empty and has no =", variable.name));
    }
    for (field, duration) in [("timeout", spec.timeout), ("grace", spec.grace)] {
        if duration.is_some_and(|duration| duration.is_negative()) {
            return Some(format!("spec.{field} is negative: say a duration such as 10m"));
        }
    }
    None
}

/// The pod's name: the command's, as far as a pod may be named so.
pub(super) fn pod_name(command: &AetherCommand) -> String {
    let name = command.name_any();
    if name.len() <= 63 { name } else { objects::derived_name(&name, "run", &[&name]) }
}

/// The pod that runs the command.
pub(super) fn pod(command: &AetherCommand, session: &AetherSession, owner: Owner, config: &Config) -> Pod {
    let spec = &command.spec;
    let mount = |name: &str, path: &str, read_only: bool| VolumeMount {
        name: name.into(),
        mount_path: path.into(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    };
    let labels = BTreeMap::from([
        (COMMAND_LABEL.into(), objects::label_value(&command.name_any())),
        (SESSION_LABEL.into(), objects::label_value(&session.name_any())),
        (SESSION_UID_LABEL.into(), session.uid().unwrap_or_default()),
    ]);
    let installer = Container {
        name: INSTALLER.into(),
        image: Some(config.worker_image.clone()),
        image_pull_policy: Some(config.image_pull_policy.name().into()),
        args: Some(vec!["install".into(), TOOLS.into()]),
        volume_mounts: Some(vec![mount("tools", TOOLS, false)]),
        security_context: Some(pod::confined(&[])),
        ..Container::default()
    };
    let runner = Container {
        name: CONTAINER.into(),
        image: Some(spec.image.clone().unwrap_or_else(|| config.command_image.clone())),
        // An image of the user's is pulled as Kubernetes does by default.
        image_pull_policy: spec.image.is_none().then(|| config.image_pull_policy.name().into()),
        command: Some(command_line(spec)),
        env: Some(
            spec.env
                .iter()
                .map(|variable| EnvVar {
                    name: variable.name.clone(),
                    value: Some(literal(&variable.value)),
                    value_from: None,
                })
                .collect(),
        ),
        working_dir: Some(match &spec.working_dir {
            Some(directory) => format!("{WORKSPACE}/{directory}"),
            None => WORKSPACE.into(),
        }),
        resources: spec.resources.clone(),
        volume_mounts: Some(vec![mount("session", WORKSPACE, false), mount("tools", TOOLS, true)]),
        security_context: Some(pod::confined(&[])),
        ..Container::default()
    };
    let grace = spec.grace.map_or(DEFAULT_GRACE, Duration::from);
    Pod {
        metadata: ObjectMeta {
            name: Some(pod_name(command)),
            namespace: command.namespace(),
            labels: Some(labels),
            // So that `kubectl logs POD` shows the command's output.
            annotations: Some(BTreeMap::from([(DEFAULT_CONTAINER.into(), CONTAINER.into())])),
            owner_references: Some(objects::owned_by(command)),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec {
            restart_policy: Some("Never".into()),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            // The program passes TERM on and needs a moment more than the command has.
            termination_grace_period_seconds: Some(grace.as_secs() as i64 + 5),
            security_context: Some(pod::runs_as(owner.uid.into(), owner.gid.into())),
            affinity: session.holder().map(near),
            init_containers: Some(vec![installer]),
            containers: vec![runner],
            volumes: Some(vec![
                Volume {
                    name: "session".into(),
                    persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                        claim_name: session.name_any(),
                        read_only: None,
                    }),
                    ..Volume::default()
                },
                Volume { name: "tools".into(), empty_dir: Some(EmptyDirVolumeSource::default()), ..Volume::default() },
            ]),
            ..PodSpec::default()
        }),
        status: None,
    }
}

/// Prefers the node that holds the session: elsewhere the pod would wait until that node lets go.
fn near(node: &str) -> Affinity {
    let on_node =
        NodeSelectorRequirement { key: "metadata.name".into(), operator: "In".into(), values: Some(vec![node.into()]) };
    let preference = NodeSelectorTerm { match_fields: Some(vec![on_node]), match_expressions: None };
    Affinity {
        node_affinity: Some(NodeAffinity {
            preferred_during_scheduling_ignored_during_execution: Some(vec![PreferredSchedulingTerm {
                weight: 100,
                preference,
            }]),
            ..NodeAffinity::default()
        }),
        ..Affinity::default()
    }
}

fn command_line(spec: &AetherCommandSpec) -> Vec<String> {
    let mut line = vec![format!("{TOOLS}/worker")];
    if let Some(timeout) = spec.timeout {
        line.extend(["--timeout".into(), seconds(timeout.into())]);
    }
    line.extend(["--grace".into(), seconds(spec.grace.map_or(DEFAULT_GRACE, Duration::from)), "--".into()]);
    line.extend(spec.command.iter().map(|argument| literal(argument)));
    line
}

/// A duration in the one form that every reader of durations knows.
fn seconds(duration: Duration) -> String {
    if duration.subsec_nanos() == 0 {
        format!("{}s", duration.as_secs())
    } else {
        format!("{}ms", duration.as_millis().max(1))
    }
}

/// Kubernetes replaces `$(NAME)` and `$$` in arguments and values; doubling each `$` gives back what was meant.
fn literal(text: &str) -> String {
    text.replace('$', "$$")
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_api::command::Variable;
    use aether_api::session::Attachment;
    use clap::Parser;

    fn config() -> Config {
        Config::parse_from([
            "aether-operator",
            "--store",
            "http://s",
            "--importer-image",
            "i",
            "--worker-image",
            "w:1",
            "--command-image",
            "tools:1",
        ])
    }

    fn command(spec: AetherCommandSpec) -> AetherCommand {
        let mut command = AetherCommand::new("build", spec);
        command.metadata.namespace = Some("agents".into());
        command.metadata.uid = Some("x-1".into());
        command
    }

    fn spec(argv: &[&str]) -> AetherCommandSpec {
        AetherCommandSpec {
            session: "fix".into(),
            command: argv.iter().map(|part| (*part).into()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn the_pod_runs_as_the_owner_with_no_power_of_its_own() {
        let mut session = AetherSession::new("fix", Default::default());
        session.status = Some(aether_api::AetherSessionStatus {
            attachment: Some(Attachment { node: Some("n2".into()), epoch: 1, since: None }),
            ..Default::default()
        });
        let command = command(AetherCommandSpec {
            timeout: Some(Duration::from_millis(1500).into()),
            working_dir: Some("src".into()),
            ..spec(&["make"])
        });
        let pod = pod(&command, &session, Owner { uid: 1001, gid: 100 }, &config());
        assert!(objects::is_owned_by(&pod, &command));
        assert_eq!(pod.annotations().get(DEFAULT_CONTAINER).map(String::as_str), Some(CONTAINER));
        let spec = pod.spec.unwrap();
        assert_eq!(spec.automount_service_account_token, Some(false));
        assert_eq!(spec.restart_policy.as_deref(), Some("Never"));
        let security = spec.security_context.unwrap();
        assert_eq!(
            (security.run_as_user, security.run_as_group, security.fs_group, security.run_as_non_root),
            (Some(1001), Some(100), None, Some(true))
        );
        let runner = &spec.containers[0];
        assert_eq!(
            runner.command.as_ref().unwrap(),
            &["/aether/worker", "--timeout", "1500ms", "--grace", "10s", "--", "make"]
        );
        assert_eq!(runner.working_dir.as_deref(), Some("/workspace/src"));
        assert_eq!(runner.image.as_deref(), Some("tools:1"));
        assert_eq!(spec.init_containers.unwrap()[0].args.as_ref().unwrap(), &["install", "/aether"]);
        let preferred =
            spec.affinity.unwrap().node_affinity.unwrap().preferred_during_scheduling_ignored_during_execution.unwrap();
        assert_eq!(preferred[0].preference.match_fields.as_ref().unwrap()[0].values.as_ref().unwrap(), &["n2"]);
    }

    #[test]
    fn dollars_mean_themselves() {
        let mut wanted = spec(&["sh", "-c", "echo $$ $(HOME) ${x}"]);
        wanted.env = vec![Variable { name: "PRICE".into(), value: "$(HOME)".into() }];
        let pod = pod(&command(wanted), &AetherSession::new("fix", Default::default()), Owner::default(), &config());
        let runner = &pod.spec.unwrap().containers[0];
        assert_eq!(runner.command.as_ref().unwrap().last().unwrap(), "echo $$$$ $$(HOME) $${x}");
        assert_eq!(runner.env.as_ref().unwrap()[0].value.as_deref(), Some("$$(HOME)"));
    }

    #[test]
    fn a_command_stays_in_its_session() {
        assert_eq!(violation(&spec(&["ls"])), None);
        assert!(violation(&spec(&[])).unwrap().contains("spec.command"));
        for directory in ["/etc", "../x", "a/../../b"] {
            let bad = AetherCommandSpec { working_dir: Some(directory.into()), ..spec(&["ls"]) };
            assert!(violation(&bad).unwrap().contains(directory));
        }
        let good = AetherCommandSpec { working_dir: Some("a/..b".into()), ..spec(&["ls"]) };
        assert_eq!(violation(&good), None);
    }
}
