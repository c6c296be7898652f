//! AetherSource: imports, one Job each, and the revisions that come of them.
//!
//! A failed import takes nothing away: the revisions that are there stay usable, and the `Importing` condition says
//! what is wrong. A revision is added only when its tree differs from the newest one's. Only a pod that runs exactly what
//! the operator asked for is believed.

pub(crate) mod admission;
pub(crate) mod genuine;
mod job;
mod outcome;
mod plan;
pub(crate) mod promote;
mod validate;

use std::sync::Arc;
use std::time::Duration;

use aether_api::conditions::{self, IMPORTING, INTACT, READY, Wanted, reason};
use aether_api::names::REFRESH_ANNOTATION;
use aether_api::source::{Import, Revision};
use aether_api::{AetherSource, AetherSourceStatus};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, PodTemplateSpec, Secret};
use kube::api::LogParams;
use kube::runtime::controller::Action;
use kube::runtime::events::EventType;
use kube::{Api, Client, Resource, ResourceExt};

use crate::config::Config;
use crate::context::Context;
use crate::error::Result;
use crate::objects;
use crate::pins::{self, Pin};
use crate::schedule::{self, Again};
use outcome::{Imported, Outcome};
use plan::Plan;

/// How often the progress of an import is looked at, and when to look again for a Secret or claim that is missing.
const PROGRESS: Duration = Duration::from_secs(1);
const MISSING: Duration = Duration::from_secs(10);
/// The phase of a source whose spec breaks a rule.
const INVALID_PHASE: &str = "Invalid";

/// What the spec names beside itself, as it is now.
struct Named {
    /// The resource version of the Secret.
    secret_version: Option<String>,
    /// What is missing or wrong: a reason and a message.
    missing: Option<(&'static str, String)>,
}

/// Imports what is to be imported and follows what is being imported.
///
/// # Errors
/// The read or write that failed.
pub async fn reconcile(seen: Arc<AetherSource>, context: Arc<Context>) -> Result<Action> {
    let sources: Api<AetherSource> = objects::namespaced(&context.client, &seen.namespace().unwrap_or_default());
    let Some(source) = objects::get(&sources, &seen.name_any()).await? else { return Ok(Action::await_change()) };
    if source.meta().deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let mut status = source.status.clone().unwrap_or_default();
    let again = match validate::violation(&source.spec) {
        Some(violation) => {
            describe(&mut status, &source, Wanted::no(IMPORTING, reason::INVALID, violation));
            status.phase = Some(INVALID_PHASE.into());
            None
        }
        None => step(&source, &mut status, &context).await?,
    };
    let before = source.status.clone().unwrap_or_default();
    let source = objects::write_status(&sources, &source, &status).await?.unwrap_or(source);
    tell_news(&source, &before, &status, &context).await;
    let pinned = keep(&source, &before, &context).await;
    Ok(schedule::action(if pinned { again } else { schedule::sooner(again, pins::RETRY) }))
}

/// Starts or follows an import; changes `status` accordingly.
async fn step(source: &AetherSource, status: &mut AetherSourceStatus, context: &Context) -> Result<Again> {
    let named = dereference(source, &context.client).await?;
    match plan::plan(source, named.secret_version.as_deref()) {
        Plan::Start { .. } if named.missing.is_some() => {
            let (why, message) = named.missing.unwrap_or_default();
            describe(status, source, Wanted::no(IMPORTING, why, message));
            Ok(Some(MISSING))
        }
        Plan::Start { failures } => {
            start(source, status, named.secret_version, failures, context).await?;
            Ok(Some(PROGRESS))
        }
        Plan::Follow => follow(source, status, context).await,
        Plan::Rest(again) => {
            let wanted = resting(status);
            describe(status, source, wanted);
            Ok(again)
        }
    }
}

async fn dereference(source: &AetherSource, client: &Client) -> Result<Named> {
    let namespace = source.namespace().unwrap_or_default();
    let mut named = Named { secret_version: None, missing: None };
    if let Some((kind, reference)) = source.spec.secret() {
        let name = &reference.name;
        match objects::get::<Secret>(&objects::namespaced(client, &namespace), name).await? {
            None => {
                named.missing = Some((
                    reason::SECRET_NOT_FOUND,
                    format!(
                        "Secret {name} does not exist in namespace {namespace}: create it, or leave spec.{kind}.secretRef out"
                    ),
                ))
            }
            Some(secret) => {
                named.missing = validate::secret_violation(&source.spec, name, &secret);
                named.secret_version = secret.resource_version();
            }
        }
    }
    if let Some(claim) = &source.spec.claim {
        let name = &claim.claim_name;
        if objects::get::<PersistentVolumeClaim>(&objects::namespaced(client, &namespace), name).await?.is_none() {
            named.missing = Some((
                reason::CLAIM_NOT_FOUND,
                format!(
                    "PersistentVolumeClaim {name} does not exist in namespace {namespace}: create it, or name another"
                ),
            ));
        }
    }
    Ok(named)
}

/// Starts an import; the Job of the one before is removed.
async fn start(
    source: &AetherSource,
    status: &mut AetherSourceStatus,
    secret_version: Option<String>,
    failures: u32,
    context: &Context,
) -> Result<()> {
    let namespace = source.namespace().unwrap_or_default();
    let jobs: Api<Job> = objects::namespaced(&context.client, &namespace);
    let origin = plan::origin(source);
    let previous = status.import.as_ref().map(|import| import.job.clone()).unwrap_or_default();
    let name = job::name(source, &origin, &previous);
    let known = known_state(status, &origin);
    let authority = admission::authority(context.config.credentials.authority.as_deref())?;
    if authority.is_some() {
        admission::provide_account(&context.client, &namespace, admission::IMPORTER).await?;
    }
    let job = admitted_job(source, name.clone(), known.as_deref(), authority.as_deref(), &context.config);
    let made = match objects::create(&jobs, &job).await? {
        Some(made) => Some(made),
        // Of a start that was not written down, or made by somebody who guessed the name: it is believed as far as it is the same.
        None => objects::get(&jobs, &name).await?,
    };
    if !previous.is_empty()
        && let Some(old) = objects::get(&jobs, &previous).await?
    {
        objects::delete(&jobs, &old).await?;
    }
    status.import = Some(Import {
        job: name.clone(),
        job_uid: made.and_then(|made| made.uid()),
        generation: source.meta().generation.unwrap_or_default(),
        requested: source.annotations().get(REFRESH_ANNOTATION).cloned(),
        origin,
        secret_version,
        failures,
        phase: "Starting".into(),
        files: 0,
        bytes: 0,
        started: objects::now(),
        finished: None,
    });
    describe(status, source, Wanted::yes(IMPORTING, reason::IN_PROGRESS, format!("Job {name} imports")));
    Ok(())
}

/// The Job of an import, with what lets it into the store.
fn admitted_job(
    source: &AetherSource,
    name: String,
    known: Option<&str>,
    authority: Option<&str>,
    config: &Config,
) -> Job {
    let mut job = job::job(source, name, known, config);
    if let (Some(spec), Some(authority)) = (&mut job.spec, authority) {
        admission::admit(&mut spec.template, admission::IMPORTER, authority.to_owned());
    }
    job
}

/// The state of the newest revision, if that was imported from the same origin: while the source is in it, there is nothing to
/// import. Unless the store has lost contents, which an import brings back.
fn known_state(status: &AetherSourceStatus, origin: &str) -> Option<String> {
    let last = status.import.as_ref()?;
    let same = last.origin == origin && last.phase == plan::DONE_PHASE;
    let whole = conditions::get(&status.conditions, INTACT).is_none_or(|intact| intact.status == "True");
    state(newest_import(status).filter(|_| same && whole)?).map(str::to_owned)
}

/// The newest revision that was not promoted.
fn newest_import(status: &AetherSourceStatus) -> Option<&Revision> {
    status.revisions.iter().find(|revision| revision.promoted.is_none())
}

/// What a source was like when a revision of it was made: the commit that its ref meant, or the listing of its bucket.
fn state(revision: &Revision) -> Option<&str> {
    revision.commit.as_deref().or(revision.listing.as_deref())
}

/// The template that this operator would have made such a Job with; else what of the Job is different.
///
/// The status does not say whether the Job was made with a known state, so both are right.
fn template_of(
    job: &Job,
    source: &AetherSource,
    status: &AetherSourceStatus,
    config: &Config,
) -> Result<std::result::Result<PodTemplateSpec, &'static str>> {
    let authority = admission::authority(config.credentials.authority.as_deref())?;
    let newest = newest_import(status).and_then(state);
    let given = job.spec.as_ref().map(|spec| &spec.template);
    let mut different = "spec";
    for known in [None, newest] {
        let ours = admitted_job(source, job.name_any(), known, authority.as_deref(), config);
        let template = ours.spec.map(|spec| spec.template).unwrap_or_default();
        let metadata = given.and_then(|given| given.metadata.as_ref());
        match genuine::difference(&template, metadata, given.and_then(|given| given.spec.as_ref())) {
            None => return Ok(Ok(template)),
            Some(what) => different = what,
        }
    }
    Ok(Err(different))
}

/// What an import's Job and pods say, as far as they are what this operator asked for; and the pod that said it.
fn hear(
    job: Option<&Job>,
    mut pods: Vec<Pod>,
    source: &AetherSource,
    status: &AetherSourceStatus,
    config: &Config,
) -> Result<(Outcome, Option<Pod>)> {
    let Some(job) = job else { return Ok((outcome::outcome(None, None), None)) };
    let template = match template_of(job, source, status, config)? {
        Ok(template) => template,
        Err(what) => {
            let message = format!(
                "Job {} differs from what this operator asks for in {what}: an older operator or somebody else made it",
                job.name_any()
            );
            return Ok((outcome::failed(message), None));
        }
    };
    let mut doubt = None;
    pods.retain(|pod| objects::is_owned_by(pod, job));
    pods.retain(|pod| {
        let different = genuine::difference(&template, Some(&pod.metadata), pod.spec.as_ref());
        if let Some(what) = different {
            doubt = Some(format!(
                "pod {} is not believed: it differs from what this operator asks for in {what}, by an admission webhook or by somebody's hand",
                pod.name_any()
            ));
        }
        different.is_none()
    });
    let pod = pods.into_iter().max_by_key(|pod| pod.creation_timestamp().map(|time| time.0));
    let outcome = match (outcome::outcome(Some(job), pod.as_ref()), doubt) {
        (Outcome::Starting(None), doubt) => Outcome::Starting(doubt),
        (Outcome::Failed { reason, message }, Some(doubt)) if pod.is_none() => {
            Outcome::Failed { reason, message: format!("{message}; {doubt}") }
        }
        (outcome, _) => outcome,
    };
    Ok((outcome, pod))
}

/// Reads how far the import is.
async fn follow(source: &AetherSource, status: &mut AetherSourceStatus, context: &Context) -> Result<Again> {
    let Some((name, uid)) = status.import.as_ref().map(|import| (import.job.clone(), import.job_uid.clone())) else {
        return Ok(None);
    };
    let namespace = source.namespace().unwrap_or_default();
    let jobs: Api<Job> = objects::namespaced(&context.client, &namespace);
    let pods: Api<Pod> = objects::namespaced(&context.client, &namespace);
    // Whoever deletes the operator's Job can make another of its name, of which nobody knows what it had seen before.
    let job = objects::get(&jobs, &name).await?.filter(|job| uid.is_none() || job.uid() == uid);
    let labelled = objects::list(&pods, &format!("job-name={name}")).await?;
    let (outcome, pod) = hear(job.as_ref(), labelled, source, status, &context.config)?;
    let Some(import) = &mut status.import else { return Ok(None) };
    match outcome {
        Outcome::Starting(trouble) => {
            let message = trouble.unwrap_or_else(|| format!("Job {} imports", import.job));
            describe(status, source, Wanted::yes(IMPORTING, reason::IN_PROGRESS, message));
            Ok(Some(PROGRESS))
        }
        Outcome::Running => {
            // Our own status write wakes us at once, so the pace is kept here.
            if let Some(pod) = pod.filter(|_| context.progress.due(&source.uid().unwrap_or_default())) {
                let parameters =
                    LogParams { container: Some(job::CONTAINER.into()), tail_lines: Some(5), ..LogParams::default() };
                // Progress is for people: a log that cannot be read now is read next time.
                let progress =
                    pods.logs(&pod.name_any(), &parameters).await.ok().and_then(|log| outcome::progress(&log));
                if let Some(progress) = progress {
                    import.phase = progress.phase;
                    import.files = progress.files;
                    import.bytes = progress.bytes;
                }
            }
            let message = format!("Job {} imports", import.job);
            describe(status, source, Wanted::yes(IMPORTING, reason::IN_PROGRESS, message));
            Ok(Some(PROGRESS))
        }
        Outcome::Unchanged => {
            import.phase = plan::DONE_PHASE.into();
            import.failures = 0;
            import.finished = Some(objects::now());
            let newest = status.revisions.first().map_or("none", |newest| newest.name.as_str());
            let message = format!("nothing changed since revision {newest}");
            describe(status, source, Wanted::no(IMPORTING, reason::DONE, message));
            Ok(source.spec.refresh.map(Duration::from))
        }
        Outcome::Imported(imported) => {
            import.phase = plan::DONE_PHASE.into();
            import.files = imported.files;
            import.bytes = imported.bytes;
            import.failures = 0;
            import.finished = Some(objects::now());
            let message = add_revision(status, imported);
            describe(status, source, Wanted::no(IMPORTING, reason::DONE, message));
            Ok(source.spec.refresh.map(Duration::from))
        }
        Outcome::Failed { reason: why, message } => {
            import.phase = plan::FAILED_PHASE.into();
            import.failures += 1;
            import.finished = Some(objects::now());
            describe(status, source, Wanted::no(IMPORTING, why, message));
            Ok(Some(PROGRESS))
        }
    }
}

/// Puts a new revision first, unless the tree is the newest one's. Says what became of it.
fn add_revision(status: &mut AetherSourceStatus, imported: Imported) -> String {
    let newest = status.revisions.iter_mut().find(|revision| revision.promoted.is_none());
    if let Some(newest) = newest.filter(|newest| newest.root == imported.root) {
        // Objects that were written anew as they were: the next refresh knows them.
        newest.listing = imported.listing;
        return format!("nothing changed since revision {}", newest.name);
    }
    let name = next_name(status);
    let revision = Revision {
        name: name.clone(),
        root: imported.root,
        files: imported.files,
        bytes: imported.bytes,
        commit: imported.commit,
        listing: imported.listing,
        promoted: None,
        time: objects::now(),
        milliseconds: imported.milliseconds,
    };
    status.revisions.insert(0, revision);
    format!("imported revision {name}")
}

/// The name of the next revision.
fn next_name(status: &AetherSourceStatus) -> String {
    let number = |name: &str| name.strip_prefix('r')?.parse::<u64>().ok();
    let names = status.revisions.iter().map(|revision| revision.name.as_str()).chain(status.latest.as_deref());
    format!("r{}", names.filter_map(number).max().unwrap_or(0) + 1)
}

/// The condition of the last import stands, but not one that spoke of a spec or a Secret which is mended since.
fn resting(status: &AetherSourceStatus) -> Wanted {
    let failed = status.import.as_ref().is_some_and(|import| import.phase == plan::FAILED_PHASE);
    let last = conditions::get(&status.conditions, IMPORTING);
    match last {
        Some(last) if failed && status.phase.as_deref() != Some(INVALID_PHASE) => Wanted {
            type_: IMPORTING,
            status: last.status == "True",
            reason: last.reason.clone(),
            message: last.message.clone(),
        },
        Some(last) if !failed && last.reason == reason::DONE => {
            Wanted::no(IMPORTING, reason::DONE, last.message.clone())
        }
        _ if failed => Wanted::no(IMPORTING, reason::IMPORT_FAILED, "the last import failed; it is tried again"),
        _ => Wanted::no(
            IMPORTING,
            reason::DONE,
            format!("nothing to import since revision {}", status.latest.as_deref().unwrap_or("none")),
        ),
    }
}

/// Completes the status from the state of the import: everything but the import and its revisions follows from them.
fn describe(status: &mut AetherSourceStatus, source: &AetherSource, importing: Wanted) {
    let generation = source.meta().generation;
    status.revisions.truncate(source.spec.revisions_to_keep.max(1) as usize);
    show_newest(status);
    status.observed_generation = generation;
    let ready = ready(status.revisions.first(), &importing);
    status.phase = Some(
        match (importing.status, ready.status) {
            (true, _) => "Importing",
            (false, true) => "Ready",
            (false, false) => "Failed",
        }
        .into(),
    );
    conditions::set(&mut status.conditions, ready, generation);
    conditions::set(&mut status.conditions, importing, generation);
}

/// What people see first of the newest revision.
fn show_newest(status: &mut AetherSourceStatus) {
    let newest = status.revisions.first();
    status.latest = newest.map(|revision| revision.name.clone());
    status.files = newest.map(|revision| revision.files);
    status.bytes = newest.map(|revision| revision.bytes);
}

/// A source is ready as soon as it has a revision, whatever becomes of later imports.
fn ready(newest: Option<&Revision>, importing: &Wanted) -> Wanted {
    match newest {
        Some(newest) => Wanted::yes(READY, reason::READY, format!("sessions can start from revision {}", newest.name)),
        None => Wanted::no(READY, importing.reason.clone(), importing.message.clone()),
    }
}

async fn tell_news(source: &AetherSource, before: &AetherSourceStatus, now: &AetherSourceStatus, context: &Context) {
    if now.latest.is_some()
        && now.latest != before.latest
        && let Some(newest) = now.revisions.first()
    {
        let message = format!(
            "revision {}: {} files, {} bytes in {} ms",
            newest.name, newest.files, newest.bytes, newest.milliseconds
        );
        context.tell(source, EventType::Normal, "RevisionImported", &message).await;
    }
    let Some(importing) = conditions::get(&now.conditions, IMPORTING) else { return };
    let known = conditions::get(&before.conditions, IMPORTING)
        .is_some_and(|old| old.reason == importing.reason && old.message == importing.message);
    let usual = [reason::IN_PROGRESS, reason::DONE].contains(&importing.reason.as_str());
    if importing.status == "False" && !known && !usual {
        context.warn(source, &Wanted::no(IMPORTING, importing.reason.clone(), importing.message.clone())).await;
    }
}

/// Has the store keep the revisions that can be used, and forget those that cannot any more.
async fn keep(source: &AetherSource, before: &AetherSourceStatus, context: &Context) -> bool {
    let owner = source.uid().unwrap_or_default();
    let revisions = source.status.as_ref().map_or(&[][..], |status| &status.revisions);
    let pins = revisions.iter().map(|revision| Pin {
        owner: owner.clone(),
        kind: pins::SOURCE_REVISION,
        name: revision.name.clone(),
        tree: revision.root.clone(),
    });
    let kept = context.pins.keep(pins.collect()).await;
    for old in before.revisions.iter().filter(|old| revisions.iter().all(|revision| revision.name != old.name)) {
        if let Err(status) = context.pins.forget_one(&owner, pins::SOURCE_REVISION, &old.name).await {
            tracing::warn!(
                source = source.name_any(),
                revision = old.name,
                said = status.message(),
                "the store still keeps an old revision; the next sweep tries again"
            );
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn imported(root: &str) -> Imported {
        Imported { root: root.into(), files: 1, bytes: 2, commit: None, listing: None, milliseconds: 3 }
    }

    #[test]
    fn revisions_count_up_newest_first_and_only_for_a_new_tree() {
        let mut source = AetherSource::new("s", Default::default());
        source.spec.revisions_to_keep = 2;
        let mut status = AetherSourceStatus::default();
        for root in ["a/1", "b/1", "b/1", "c/1"] {
            let message = add_revision(&mut status, imported(root));
            describe(&mut status, &source, Wanted::no(IMPORTING, reason::DONE, message));
        }
        let names: Vec<&str> = status.revisions.iter().map(|revision| revision.name.as_str()).collect();
        assert_eq!(names, ["r3", "r2"]);
        assert_eq!(status.latest.as_deref(), Some("r3"));
        assert!(conditions::is_true(&status.conditions, READY));
    }

    #[test]
    fn a_mended_spec_is_not_called_invalid_any_longer() {
        let source = AetherSource::new("s", Default::default());
        let import = |phase: &str| Import {
            job: "j".into(),
            job_uid: None,
            generation: 1,
            requested: None,
            origin: "o".into(),
            secret_version: None,
            failures: 0,
            phase: phase.into(),
            files: 0,
            bytes: 0,
            started: objects::now(),
            finished: Some(objects::now()),
        };
        let mut status = AetherSourceStatus { import: Some(import(plan::DONE_PHASE)), ..Default::default() };
        add_revision(&mut status, imported("a/1"));
        describe(&mut status, &source, Wanted::no(IMPORTING, reason::INVALID, "spec.revisionsToKeep is 0"));
        status.phase = Some(INVALID_PHASE.into());
        assert_eq!(resting(&status).reason, reason::DONE);
        status.import = Some(import(plan::FAILED_PHASE));
        assert_eq!(resting(&status).reason, reason::IMPORT_FAILED);
        // What an import itself called invalid stands.
        describe(&mut status, &source, Wanted::no(IMPORTING, reason::INVALID, "no such thing"));
        assert_eq!(resting(&status).message, "no such thing");
    }

    #[test]
    fn a_failed_import_takes_nothing_away() {
        let source = AetherSource::new("s", Default::default());
        let mut status = AetherSourceStatus::default();
        describe(&mut status, &source, Wanted::no(IMPORTING, reason::REF_NOT_FOUND, "no branch x"));
        assert_eq!(
            (status.phase.as_deref(), conditions::get(&status.conditions, READY).unwrap().reason.as_str()),
            (Some("Failed"), reason::REF_NOT_FOUND)
        );
        add_revision(&mut status, imported("a/1"));
        describe(&mut status, &source, Wanted::no(IMPORTING, reason::AUTHENTICATION_FAILED, "denied"));
        assert!(conditions::is_true(&status.conditions, READY));
        assert_eq!(status.phase.as_deref(), Some("Ready"));
        assert_eq!(conditions::get(&status.conditions, IMPORTING).unwrap().reason, reason::AUTHENTICATION_FAILED);
    }
}
