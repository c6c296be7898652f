//! AetherCommand: one pod, once. The status names the pod before it is made, and a pod that was named is never made again;
//! what became of it is read from its container.

mod build;
mod outcome;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use aether_api::conditions::{self, COMPLETE, FAILED, Wanted, reason};
use aether_api::names::{COMMAND_LABEL, COMMAND_UID_ANNOTATION, DEFAULT_OWNER, ORIGIN_COMMAND, ORIGIN_LABEL};
use aether_api::session::{ClaimPolicy, Owner};
use aether_api::{AetherCheckpoint, AetherCheckpointSpec, AetherCommand, AetherCommandStatus, AetherSession};
use k8s_openapi::api::core::v1::Pod;
use kube::core::ObjectMeta;
use kube::runtime::controller::Action;
use kube::{Api, Resource, ResourceExt};

use crate::checkpoint::GRACE;
use crate::context::{Context, REFUSED};
use crate::error::Result;
use crate::{objects, schedule};
use outcome::{Ended, Outcome};

const POLL: Duration = Duration::from_secs(2);

/// Runs a command.
///
/// # Errors
/// The read or write that failed.
pub async fn reconcile(seen: Arc<AetherCommand>, context: Arc<Context>) -> Result<Action> {
    let namespace = seen.namespace().unwrap_or_default();
    let commands: Api<AetherCommand> = objects::namespaced(&context.client, &namespace);
    let Some(mut command) = objects::get(&commands, &seen.name_any()).await? else { return Ok(Action::await_change()) };
    if command.meta().deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let status = command.status.clone().unwrap_or_default();
    if command.finished() {
        return schedule::collect(&commands, &command, status.finished, command.spec.ttl_seconds_after_finished).await;
    }
    let pods: Api<Pod> = objects::namespaced(&context.client, &namespace);
    let pod = objects::get(&pods, &build::pod_name(&command)).await?;
    let outcome = match (pod, &status.pod_name) {
        (Some(pod), _) if objects::is_owned_by(&pod, &command) => {
            outcome::outcome(Some(&pod), command.spec.timeout.is_some())
        }
        (None, None) => match start(&command, &commands, &pods, &context).await? {
            Start::Started(named) => {
                command = *named;
                Outcome::Pending(None)
            }
            Start::Refused => return Ok(Action::requeue(REFUSED)),
            Start::Wait(why, message) => return wait(&commands, &command, why, message).await,
            Start::Never(wanted) if wanted.reason == reason::SESSION_NOT_FOUND && objects::age(&command) < GRACE => {
                return Ok(Action::requeue(POLL));
            }
            Start::Never(condition) => {
                Outcome::Ended(Ended { exit_code: None, started: None, finished: None, condition })
            }
        },
        (Some(pod), None) => {
            Outcome::Ended(Ended { exit_code: None, started: None, finished: None, condition: taken(&pod) })
        }
        (_, Some(_)) => outcome::outcome(None, false),
    };
    let ended = matches!(outcome, Outcome::Ended(_));
    // What never began left nothing to keep.
    let began = status.pod_name.is_some() || matches!(&outcome, Outcome::Ended(Ended { exit_code: Some(_), .. }));
    let checkpoint = match ended && began && command.spec.checkpoint_after {
        true => take_checkpoint(&command, &context).await?,
        false => None,
    };
    let wanted = next_status(&command, outcome, checkpoint);
    if objects::write_status(&commands, &command, &wanted).await?.is_some()
        && let Some(failed) = conditions::get(&wanted.conditions, FAILED).filter(|_| ended)
    {
        context.warn(&command, &Wanted::yes(FAILED, failed.reason.clone(), failed.message.clone())).await;
    }
    match ended {
        true => schedule::collect(&commands, &command, wanted.finished, command.spec.ttl_seconds_after_finished).await,
        // Events of the pod tell of everything else.
        false => Ok(Action::requeue(Duration::from_secs(30))),
    }
}

/// The condition of a command whose pod's name is somebody else's.
fn taken(pod: &Pod) -> Wanted {
    let message = format!(
        "a pod named {} exists and is not the command's: delete it, or give the command another name",
        pod.name_any()
    );
    Wanted::yes(FAILED, reason::NAME_TAKEN, message)
}

/// The condition of a command whose pod is there or about to be.
fn starting() -> Wanted {
    Wanted::no(COMPLETE, reason::IN_PROGRESS, "the pod is starting")
}

enum Start {
    /// The pod is made; this is the command whose status names it.
    Started(Box<AetherCommand>),
    /// The API server did not make the pod; the status says why.
    Refused,
    Wait(&'static str, String),
    Never(Wanted),
}

/// Names the pod and makes it, if the session is ready for it.
async fn start(
    command: &AetherCommand,
    commands: &Api<AetherCommand>,
    pods: &Api<Pod>,
    context: &Context,
) -> Result<Start> {
    let never = |why: &str, message: String| Ok(Start::Never(Wanted::yes(FAILED, why, message)));
    if let Some(violation) = build::violation(&command.spec) {
        return never(reason::INVALID, violation);
    }
    let name = &command.spec.session;
    let sessions: Api<AetherSession> = objects::namespaced(&context.client, &command.namespace().unwrap_or_default());
    let Some(session) = objects::get(&sessions, name).await? else {
        return never(reason::SESSION_NOT_FOUND, format!("AetherSession {name} does not exist in this namespace"));
    };
    if session.meta().deletion_timestamp.is_some() {
        return never(reason::SESSION_NOT_FOUND, format!("AetherSession {name} is being deleted"));
    }
    if session.spec.claim == ClaimPolicy::None {
        return never(
            reason::INVALID,
            format!(
                "AetherSession {name} has no claim (spec.claim is None), so no other pod can mount it: fork it and run there"
            ),
        );
    }
    let about = session.status.clone().unwrap_or_default();
    if !conditions::is_true(&about.conditions, conditions::READY) {
        let why = conditions::get(&about.conditions, conditions::READY)
            .map_or("its claim is not bound yet", |ready| &ready.message);
        return Ok(Start::Wait(reason::SESSION_NOT_READY, format!("AetherSession {name} is not ready: {why}")));
    }
    let (uid, gid) = DEFAULT_OWNER;
    let owner = about.base.map_or(Owner { uid, gid }, |base| base.owner);
    let refused = conditions::get(&command.status.clone().unwrap_or_default().conditions, COMPLETE)
        .is_some_and(|last| last.reason == reason::POD_FAILED);
    if refused && !context.refused.due(&command.uid().unwrap_or_default()) {
        return Ok(Start::Refused);
    }
    let pod = build::pod(command, &session, owner, &context.config);
    let mut status = command.status.clone().unwrap_or_default();
    status.pod_name = Some(pod.name_any());
    status.phase = Some("Pending".into());
    conditions::set(&mut status.conditions, starting(), command.meta().generation);
    let named = objects::write_status(commands, command, &status).await?.unwrap_or_else(|| command.clone());
    match objects::create(pods, &pod).await {
        Ok(Some(_)) => Ok(Start::Started(Box::new(named))),
        // It may be ours all the same, if the API server is slow to answer.
        Ok(None) => match objects::get(pods, &pod.name_any()).await? {
            Some(foreign) if !objects::is_owned_by(&foreign, command) => {
                status.pod_name = None;
                objects::write_status(commands, &named, &status).await?;
                Ok(Start::Refused)
            }
            _ => Ok(Start::Started(Box::new(named))),
        },
        // There is no pod (a quota or a policy forbids it): the name is withdrawn, and it is tried again.
        Err(error) if error.is_refused() && !error.is_terminating_namespace() => {
            status.pod_name = None;
            let message = format!("its pod cannot be made: {error}");
            conditions::set(
                &mut status.conditions,
                Wanted::no(COMPLETE, reason::POD_FAILED, message),
                command.meta().generation,
            );
            objects::write_status(commands, &named, &status).await?;
            Ok(Start::Refused)
        }
        Err(error) => Err(error),
    }
}

/// Notes what a command that has no pod waits for.
async fn wait(commands: &Api<AetherCommand>, command: &AetherCommand, why: &str, message: String) -> Result<Action> {
    if objects::age(command) < GRACE {
        return Ok(Action::requeue(Duration::from_millis(500)));
    }
    let mut status = command.status.clone().unwrap_or_default();
    status.phase = Some("Pending".into());
    conditions::set(&mut status.conditions, Wanted::no(COMPLETE, why, message), command.meta().generation);
    objects::write_status(commands, command, &status).await?;
    Ok(Action::requeue(POLL))
}

/// The status that says what became of the command.
fn next_status(command: &AetherCommand, outcome: Outcome, checkpoint: Option<Taken>) -> AetherCommandStatus {
    let generation = command.meta().generation;
    let mut status = command.status.clone().unwrap_or_default();
    match outcome {
        Outcome::Pending(trouble) => {
            status.pod_name = Some(build::pod_name(command));
            status.phase = Some("Pending".into());
            let wanted = match trouble {
                Some(trouble) => Wanted::no(COMPLETE, reason::POD_FAILED, trouble),
                None => starting(),
            };
            conditions::set(&mut status.conditions, wanted, generation);
        }
        Outcome::Running(started) => {
            status.pod_name = Some(build::pod_name(command));
            status.phase = Some("Running".into());
            status.started = started;
            conditions::set(
                &mut status.conditions,
                Wanted::no(COMPLETE, reason::IN_PROGRESS, "the command runs"),
                generation,
            );
        }
        Outcome::Ended(ended) => {
            let complete = ended.condition.type_ == COMPLETE;
            status.phase = Some(if complete { "Succeeded" } else { "Failed" }.into());
            if ended.exit_code.is_some() {
                status.pod_name = Some(build::pod_name(command));
            }
            status.exit_code = ended.exit_code;
            status.started = ended.started.or(status.started);
            status.finished = Some(ended.finished.unwrap_or_else(objects::now));
            (status.checkpoint, status.checkpoint_uid) =
                checkpoint.map_or((None, None), |taken| (Some(taken.name), taken.uid));
            if !complete {
                conditions::set(
                    &mut status.conditions,
                    Wanted::no(COMPLETE, ended.condition.reason.clone(), ended.condition.message.clone()),
                    generation,
                );
            }
            conditions::set(&mut status.conditions, ended.condition, generation);
        }
    }
    status
}

/// A checkpoint that was taken after a command.
struct Taken {
    name: String,
    /// Only of one that was made here and now: what is found could have been made by anybody at any time.
    uid: Option<String>,
}

/// Takes the checkpoint that the command asks for. One of the command's own name may be somebody else's: of an
/// earlier command of that name, perhaps.
async fn take_checkpoint(command: &AetherCommand, context: &Context) -> Result<Option<Taken>> {
    let checkpoints: Api<AetherCheckpoint> =
        objects::namespaced(&context.client, &command.namespace().unwrap_or_default());
    let (name, uid) = (command.name_any(), command.uid().unwrap_or_default());
    let another = objects::derived_name(&name, "after", &[&uid]);
    for name in [name, another] {
        if let Some(made) = objects::create(&checkpoints, &checkpoint_after(command, &name, &uid)).await? {
            return Ok(Some(Taken { name, uid: made.uid() }));
        }
        let there = objects::get(&checkpoints, &name).await?;
        if there.is_some_and(|there| there.annotations().get(COMMAND_UID_ANNOTATION) == Some(&uid)) {
            return Ok(Some(Taken { name, uid: None }));
        }
    }
    let message = format!(
        "AetherCheckpoints {} and {} exist already and are not of this command, so none was taken",
        command.name_any(),
        objects::derived_name(&command.name_any(), "after", &[&uid])
    );
    context.warn(command, &Wanted::no(COMPLETE, reason::NAME_TAKEN, message)).await;
    Ok(None)
}

fn checkpoint_after(command: &AetherCommand, name: &str, uid: &str) -> AetherCheckpoint {
    let after = command.name_any();
    let message = format!("after AetherCommand {after}: {}", command.spec.command.join(" "));
    AetherCheckpoint {
        metadata: ObjectMeta {
            name: Some(name.into()),
            namespace: command.namespace(),
            labels: Some(BTreeMap::from([
                (ORIGIN_LABEL.into(), ORIGIN_COMMAND.into()),
                (COMMAND_LABEL.into(), objects::label_value(&after)),
            ])),
            annotations: Some(BTreeMap::from([(COMMAND_UID_ANNOTATION.into(), uid.into())])),
            ..ObjectMeta::default()
        },
        spec: AetherCheckpointSpec {
            session: command.spec.session.clone(),
            message: Some(message.chars().take(1000).collect()),
            ..AetherCheckpointSpec::default()
        },
        status: None,
    }
}
