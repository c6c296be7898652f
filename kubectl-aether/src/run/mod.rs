//! `run` and `logs`: commands in sessions and their output.

mod output;

use std::time::Duration;

use aether_api::conditions::{self, reason};
use aether_api::{AetherCommand, AetherCommandSpec};
use anyhow::{Context, Result, anyhow, bail};
use k8s_openapi::api::core::v1::{Pod, ResourceRequirements};
use kube::ResourceExt;
use kube::api::{DeleteParams, LogParams, PostParams, PropagationPolicy};

use crate::cli::{Logs, Run};
use crate::cluster::{Cluster, explain};
use crate::output::{Progress, print};
use crate::signals::Signals;
use crate::wait::{self, Deadline, Verdict, in_words};
use output::{Output, container_name, container_status};

/// How long the end of a command may take to show in its status after its pod has ended.
const END_PATIENCE: Duration = Duration::from_secs(30);

/// `logs -f` waits as long as somebody looks; clocks cannot add an endless time.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// Runs the command; the result is its exit code.
pub(crate) async fn run(cluster: &Cluster, args: &Run) -> Result<u8> {
    crate::sessions::refuse_hopeless(&cluster.session(&args.session).await?)?;
    let mut signals = Signals::listen()?;
    let mut wanted = AetherCommand::new("", spec(args));
    wanted.metadata.name = None;
    wanted.metadata.generate_name = Some(format!("{}-", args.session));
    let create = cluster.api().create(&PostParams::default(), &wanted).await;
    let command = create.map_err(|error| explain(error, &format!("run a command in session {}", args.session)))?;
    let name = command.name_any();
    if args.detach {
        print(&format!("{name}\n"))?;
        return Ok(0);
    }
    let progress = Progress::new(cluster.quiet);
    progress.say(&format!("command {name}"));
    let result = {
        let mut attended = std::pin::pin!(attend(cluster, &name, Deadline::after(args.start_timeout), &progress));
        tokio::select! {
            result = &mut attended => result,
            signal = signals.next() => {
                eprintln!("ending command {name}; once more leaves it to itself");
                delete(cluster, &name).await?;
                // What it says while it ends is shown too; how that ends does not matter any more.
                tokio::select! {
                    _ = attended => {}
                    _ = signals.next() => {}
                }
                return Err(signal.into());
            }
        }
    };
    if args.rm
        && let Err(error) = delete(cluster, &name).await
    {
        eprintln!("warning: {error:#}");
    }
    result
}

fn spec(args: &Run) -> AetherCommandSpec {
    let resources = (args.resources.is_some() || args.limits.is_some()).then(|| ResourceRequirements {
        requests: args.resources.clone(),
        limits: args.limits.clone(),
        ..Default::default()
    });
    AetherCommandSpec {
        session: args.session.clone(),
        command: args.argv.clone(),
        env: args.env.clone(),
        working_dir: args.workdir.clone(),
        image: args.image.clone(),
        resources,
        timeout: args.timeout,
        grace: args.grace,
        checkpoint_after: args.checkpoint,
        ttl_seconds_after_finished: args.ttl.map(|ttl| u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX)),
    }
}

/// Shows the output of the command until it has ended; the result is its exit code.
async fn attend(cluster: &Cluster, name: &str, deadline: Deadline, progress: &Progress) -> Result<u8> {
    let pod = match started(cluster, name, deadline, progress).await? {
        Start::Pod(pod) => pod,
        // It ended without ever having a container that ran.
        Start::Over(command) => return outcome(&command, None),
    };
    let container = container_name(&pod)?;
    let mut out = tokio::io::stdout();
    let shown = Output::new(cluster.api(), &pod.name_any(), &container).follow(&mut out).await;
    let ended = ended(cluster, name, &pod.name_any(), &container).await;
    // The exit code matters more than a lost end of output, but that must not go unsaid.
    if let Err(error) = shown {
        if error.is::<crate::signals::Interrupted>() || ended.is_err() {
            return Err(error);
        }
        eprintln!("warning: {error:#}");
    }
    ended
}

enum Start {
    Pod(Box<Pod>),
    Over(Box<AetherCommand>),
}

/// Waits until the command's container has begun, or the command has failed before.
async fn started(cluster: &Cluster, name: &str, deadline: Deadline, progress: &Progress) -> Result<Start> {
    let what = format!("command {name} to begin");
    let pod_name = wait::until(cluster.api(), name, &what, deadline, progress, |command: Option<&AetherCommand>| {
        let Some(command) = command else { return Verdict::Failed(anyhow!("command {name} was deleted meanwhile")) };
        let status = command.status.clone().unwrap_or_default();
        match status.pod_name {
            Some(pod) => Verdict::Done(Ok(pod)),
            None if command.finished() => Verdict::Done(Err(Box::new(command.clone()))),
            None => {
                let said = [conditions::COMPLETE, conditions::FAILED]
                    .iter()
                    .find_map(|type_| conditions::get(&status.conditions, type_));
                Verdict::Waiting(said.map_or_else(|| "no pod yet".into(), in_words))
            }
        }
    })
    .await?;
    let pod_name = match pod_name {
        Ok(pod) => pod,
        Err(command) => return Ok(Start::Over(command)),
    };
    let what = format!("pod {pod_name} of command {name} to begin");
    let begins = wait::until(cluster.api(), &pod_name, &what, deadline, progress, |pod: Option<&Pod>| match pod {
        // The operator may have made it a moment ago, and another replica of the API server may not know it yet.
        None => Verdict::Stuck(format!("pod {pod_name} of command {name} does not exist: it was deleted")),
        Some(pod) => begun(pod),
    });
    let silent = Progress::silent();
    let fails =
        wait::until(cluster.api(), name, "", deadline, &silent, |command: Option<&AetherCommand>| match command {
            Some(command) if command.finished() => Verdict::Done(Box::new(command.clone())),
            Some(_) => Verdict::Waiting(String::new()),
            None => Verdict::Failed(anyhow!("command {name} was deleted meanwhile")),
        });
    tokio::select! {
        biased;
        pod = begins => Ok(Start::Pod(pod?)),
        command = fails => {
            let command = command?;
            // Both may have come at once; a container that ran has output.
            match cluster.api::<Pod>().get_opt(&pod_name).await {
                Ok(Some(pod)) if matches!(begun(&pod), Verdict::Done(_)) => Ok(Start::Pod(Box::new(pod))),
                _ => Ok(Start::Over(command)),
            }
        }
    }
}

/// Whether the pod's container has begun; what keeps it from it.
fn begun(pod: &Pod) -> Verdict<Box<Pod>> {
    let status = pod.status.clone().unwrap_or_default();
    let Ok(container) = container_name(pod) else { return Verdict::Waiting(String::new()) };
    let state = container_status(pod, &container).and_then(|status| status.state.as_ref());
    if state.is_some_and(|state| state.running.is_some() || state.terminated.is_some()) {
        return Verdict::Done(Box::new(pod.clone()));
    }
    let waiting = status
        .init_container_statuses
        .iter()
        .flatten()
        .chain(status.container_statuses.iter().flatten())
        .filter_map(|status| status.state.as_ref()?.waiting.as_ref())
        .find(|waiting| !matches!(waiting.reason.as_deref(), None | Some("PodInitializing")));
    if let Some(waiting) = waiting {
        let reason = waiting.reason.clone().unwrap_or_default();
        let text = waiting.message.as_ref().map_or_else(|| reason.clone(), |message| format!("{reason}: {message}"));
        return match reason.as_str() {
            "InvalidImageName" | "ErrImageNeverPull" => {
                Verdict::Failed(anyhow!("pod {} cannot begin: {text}", pod.name_any()))
            }
            _ => Verdict::Waiting(text),
        };
    }
    let unscheduled = status
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_ == "PodScheduled" && condition.status != "True");
    Verdict::Waiting(match unscheduled.and_then(|condition| condition.message.clone()) {
        Some(message) => message,
        None => status.phase.unwrap_or_default(),
    })
}

/// Waits for the command's end; when its status does not tell in time, the pod does.
async fn ended(cluster: &Cluster, name: &str, pod: &str, container: &str) -> Result<u8> {
    let (deadline, silent) = (Deadline::after(END_PATIENCE), Progress::silent());
    let finished =
        wait::until(cluster.api(), name, "", deadline, &silent, |command: Option<&AetherCommand>| match command {
            Some(command) if command.finished() => Verdict::Done(Some(command.clone())),
            Some(_) => Verdict::Waiting(String::new()),
            None => Verdict::Done(None),
        });
    let command = finished.await.ok().flatten();
    let code = match cluster.api::<Pod>().get_opt(pod).await {
        Ok(Some(pod)) => container_status(&pod, container)
            .and_then(|status| Some(status.state.as_ref()?.terminated.as_ref()?.exit_code)),
        _ => None,
    };
    match (command, code) {
        (Some(command), code) => {
            if let Some(checkpoint) =
                command.status.as_ref().and_then(|status| status.checkpoint.as_ref()).filter(|_| !cluster.quiet)
            {
                eprintln!("checkpoint {checkpoint}");
            }
            outcome(&command, code)
        }
        (None, Some(code)) => exit_code(code),
        (None, None) => bail!("command {name} and its pod are gone: how it ended cannot be said"),
    }
}

/// The exit code of a command that has ended; an error when it never ran.
fn outcome(command: &AetherCommand, of_pod: Option<i32>) -> Result<u8> {
    let status = command.status.clone().unwrap_or_default();
    let failed = conditions::get(&status.conditions, conditions::FAILED).filter(|failed| failed.status == "True");
    match (status.exit_code.or(of_pod), failed) {
        (Some(code), failed) => {
            if let Some(failed) = failed.filter(|failed| failed.reason == reason::TIMED_OUT) {
                eprintln!("{}", in_words(failed));
            }
            exit_code(code)
        }
        (None, Some(failed)) => bail!("command {} could not be run: {}", command.name_any(), in_words(failed)),
        (None, None) => bail!("command {} ended without an exit code", command.name_any()),
    }
}

fn exit_code(code: i32) -> Result<u8> {
    u8::try_from(code).with_context(|| format!("{code} is no exit code"))
}

/// Deletes the command, and with it its pod, which gets TERM.
async fn delete(cluster: &Cluster, name: &str) -> Result<()> {
    let how = DeleteParams { propagation_policy: Some(PropagationPolicy::Background), ..Default::default() };
    match cluster.api::<AetherCommand>().delete(name, &how).await {
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        other => other.map(drop).map_err(|error| explain(error, &format!("delete command {name}"))),
    }
}

/// `logs`: the output of a command that runs or ran.
pub(crate) async fn logs(cluster: &Cluster, args: &Logs) -> Result<()> {
    let name = &args.command;
    let command: AetherCommand = cluster.find(name).await?;
    let pod = if args.follow {
        match started(cluster, name, Deadline::after(FOREVER), &Progress::new(cluster.quiet)).await? {
            Start::Pod(pod) => pod,
            Start::Over(command) => return outcome(&command, None).map(drop),
        }
    } else {
        let status = command.status.unwrap_or_default();
        let Some(pod) = status.pod_name else {
            let said = status.conditions.first().map(in_words).unwrap_or_default();
            bail!("command {name} has no pod yet: {said}; -f waits for it");
        };
        let found =
            cluster.api::<Pod>().get_opt(&pod).await.map_err(|error| explain(error, &format!("read pod {pod}")))?;
        Box::new(found.ok_or_else(|| anyhow!("pod {pod} of command {name} was deleted, and its output with it"))?)
    };
    let container = container_name(&pod)?;
    if args.tail.is_some() || args.timestamps {
        let query = LogParams {
            container: Some(container),
            tail_lines: args.tail.map(i64::from),
            timestamps: args.timestamps,
            ..Default::default()
        };
        let text = cluster.api::<Pod>().logs(&pod.name_any(), &query).await;
        return print(&text.map_err(|error| explain(error, &format!("read the output of command {name}")))?);
    }
    let mut output = Output::new(cluster.api(), &pod.name_any(), &container);
    let mut out = tokio::io::stdout();
    if args.follow { output.follow(&mut out).await } else { output.once(&mut out).await }
}

#[cfg(test)]
mod tests {
    use aether_api::AetherCommandStatus;
    use aether_api::conditions::Wanted;

    use super::*;

    fn pod(status: serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p"}, "spec": {"containers": [{"name": "c"}]}, "status": status
        }))
        .unwrap()
    }

    fn container(state: serde_json::Value) -> serde_json::Value {
        serde_json::json!([{"name": "c", "state": state, "ready": false, "restartCount": 0, "image": "i", "imageID": "i"}])
    }

    #[test]
    fn what_keeps_a_pod_from_beginning_is_said() {
        let unscheduled = pod(serde_json::json!({"phase": "Pending", "conditions": [
            {"type": "PodScheduled", "status": "False", "message": "0/2 nodes are available"}]}));
        assert!(matches!(begun(&unscheduled), Verdict::Waiting(text) if text.contains("0/2 nodes")));
        let pulling = pod(
            serde_json::json!({"containerStatuses": container(serde_json::json!({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}))}),
        );
        assert!(matches!(begun(&pulling), Verdict::Waiting(text) if text == "ImagePullBackOff: no such image"));
        let bad = pod(
            serde_json::json!({"containerStatuses": container(serde_json::json!({"waiting": {"reason": "InvalidImageName"}}))}),
        );
        assert!(matches!(begun(&bad), Verdict::Failed(_)));
        for state in [serde_json::json!({"running": {}}), serde_json::json!({"terminated": {"exitCode": 0}})] {
            assert!(matches!(
                begun(&pod(serde_json::json!({"containerStatuses": container(state)}))),
                Verdict::Done(_)
            ));
        }
    }

    #[test]
    fn exit_codes() {
        let command = |exit_code, wanted: Option<Wanted>| {
            let mut command = AetherCommand::new("c", AetherCommandSpec::default());
            let mut status = AetherCommandStatus { exit_code, ..Default::default() };
            if let Some(wanted) = wanted {
                conditions::set(&mut status.conditions, wanted, None);
            }
            command.status = Some(status);
            command
        };
        assert_eq!(outcome(&command(Some(3), None), None).unwrap(), 3);
        assert_eq!(
            outcome(&command(Some(124), Some(Wanted::yes(conditions::FAILED, reason::TIMED_OUT, "10m"))), None)
                .unwrap(),
            124
        );
        let never = command(None, Some(Wanted::yes(conditions::FAILED, reason::POD_FAILED, "no node fits")));
        assert!(outcome(&never, None).unwrap_err().to_string().contains("no node fits"));
        assert_eq!(outcome(&command(None, None), Some(1)).unwrap(), 1);
    }
}
