//! AetherCommit: takes a reviewed tree to its target, once.
//!
//! What is committed is settled first and never again: checkpoint, tree, source, what the session started from, and who made
//! it. Then approvals are counted, each time anew from the objects that are there ([`count`]), until the rule of the source is
//! satisfied. Who approved is written down before anything is done, in the audit log too ([`record`]), and a Job in the source's
//! namespace carries the tree out. Its name follows from the commit's uid and its work can be repeated, so that two operators, or one that is killed
//! anywhere, push once. The tree stays pinned for as long as the object exists.

mod checks;
mod count;
mod job;
mod outcome;
mod record;
mod settle;

use std::sync::Arc;
use std::time::Duration;

use aether_api::commit::{AetherCommitStatus, CommitPhase};
use aether_api::conditions::{self, APPROVED, COMPLETE, FAILED, Wanted, reason};
use aether_api::review::ReviewRule;
use aether_api::{AetherApproval, AetherApprovalStatus, AetherCheckpoint, AetherCommand, AetherCommit, AetherSource};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::runtime::controller::Action;
use kube::runtime::events::EventType;
use kube::{Api, Resource, ResourceExt};

use crate::admission::{is_genuine, rules};
use crate::context::Context;
use crate::crash::crash_point;
use crate::error::Result;
use crate::pins::{self, Pin};
use crate::schedule::{self, Again};
use crate::signature::Keys;
use crate::source::{admission, genuine, promote};
use crate::{access, objects};
use count::{Ballot, Count, Matter};
use outcome::{Failure, Outcome};

/// How often a Job is looked at, and what a commit waits for that no event tells of.
const POLL: Duration = Duration::from_secs(2);
/// How often rights and expiry are looked at again while a commit waits for approvals.
const RECOUNT: Duration = Duration::from_secs(60);
/// The pause before the second Job; it doubles with each further one, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(10 * 60);
/// After so many Jobs that came to nothing somebody has to look.
const MOST_RETRIES: u32 = 12;

/// Takes a commit one step further.
///
/// # Errors
/// The read or write that failed.
pub async fn reconcile(seen: Arc<AetherCommit>, context: Arc<Context>) -> Result<Action> {
    let commits: Api<AetherCommit> = objects::namespaced(&context.client, &seen.namespace().unwrap_or_default());
    let Some(commit) = objects::get(&commits, &seen.name_any()).await? else { return Ok(Action::await_change()) };
    if commit.meta().deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    if commit.finished() {
        let finished = commit.status.as_ref().and_then(|status| status.finished.clone());
        let ttl = commit.spec.ttl_seconds_after_finished;
        let pinned = context.pins.keep(pins_of(&commit)).await;
        let action = schedule::collect(&commits, &commit, finished, ttl).await?;
        return Ok(if pinned { action } else { Action::requeue(pins::RETRY) });
    }
    let before = commit.status.clone().unwrap_or_default();
    let mut status = before.clone();
    let mut again = step(&commit, &mut status, &context).await?;
    if let Err(why) = record::changes(&commit, &before, &status, &context).await? {
        status = before.clone();
        hold(&commit, &mut status, why);
        again = Some(pins::RETRY);
    }
    if status.phase == Some(CommitPhase::Running) && before.phase != status.phase {
        crash_point!("commit.recorded");
    }
    let commit = objects::write_status(&commits, &commit, &status).await?.unwrap_or(commit);
    match status.phase.filter(|phase| before.phase != Some(*phase)) {
        Some(CommitPhase::AwaitingApproval) => crash_point!("commit.waiting"),
        Some(CommitPhase::Running) => crash_point!("commit.released"),
        Some(CommitPhase::Succeeded) => crash_point!("commit.finished"),
        _ => {}
    }
    tell(&commit, &before, &status, &context).await;
    let pinned = context.pins.keep(pins_of(&commit)).await;
    Ok(schedule::action(if pinned { again } else { schedule::sooner(again, pins::RETRY) }))
}

async fn step(commit: &AetherCommit, status: &mut AetherCommitStatus, context: &Context) -> Result<Again> {
    if let Some(violation) = rules::commit(&commit.name_any(), &commit.spec) {
        fail(commit, status, reason::INVALID, violation);
        return Ok(None);
    }
    // Without keys nothing can be said of anybody; they are there in a moment.
    let Some(keys) = context.keyring.keys() else { return Ok(Some(POLL)) };
    if let Err(why) = settle::is_genuine(commit, &keys) {
        let message = format!("who asked for this commit cannot be believed: {why}; delete it and make another one");
        wait(commit, status, reason::NOT_SIGNED, message);
        return Ok(Some(RECOUNT));
    }
    if status.phase == Some(CommitPhase::Running) {
        return carry(commit, status, &keys, context).await;
    }
    if status.root.is_none() {
        match settle::settle(commit, status, &keys, context).await? {
            settle::Settled::Yes => crash_point!("commit.settled"),
            settle::Settled::NotYet(why, message) => {
                wait(commit, status, why, message);
                return Ok(Some(POLL));
            }
            settle::Settled::Never(why, message) => {
                fail(commit, status, why, message);
                return Ok(None);
            }
        }
    }
    review(commit, status, &keys, context).await
}

/// Counts, and releases the commit when that is enough.
async fn review(
    commit: &AetherCommit,
    status: &mut AetherCommitStatus,
    keys: &Keys,
    context: &Context,
) -> Result<Again> {
    let source = match settle::source(commit, status, context).await? {
        Ok(source) => source,
        Err((why, message)) => {
            wait(commit, status, why, message);
            return Ok(Some(RECOUNT));
        }
    };
    if let Some(why) = rules::fits(&commit.spec, &source.spec).or_else(|| settle::cannot(commit, status, context)) {
        fail(commit, status, reason::INVALID, why);
        return Ok(None);
    }
    let namespace = commit.namespace().unwrap_or_default();
    let approvals: Api<AetherApproval> = objects::namespaced(&context.client, &namespace);
    let mut given = objects::list(&approvals, "").await?;
    given.retain(|approval| approval.spec.commit == commit.name_any() && approval.meta().deletion_timestamp.is_none());
    if let Err(why) = record::said(&given, commit, keys, context).await {
        return Ok(uncounted(commit, status, why));
    }
    let mut ballots = Vec::new();
    for approval in &given {
        ballots.push(ballot(approval, commit, &source, keys, context).await);
    }
    let rule = source.spec.review.clone().unwrap_or_default();
    let root = status.root.clone().unwrap_or_default();
    let matter = Matter {
        rule: &rule,
        root: &root,
        makers: &status.makers,
        unknown_makers: &status.unknown_makers,
        missing: unchecked(&rule, &root, &namespace, context).await?,
    };
    let now = Timestamp::now();
    let mut counted = count::count(matter, &ballots, now);
    let mut standing = Vec::new();
    if counted.is_released() || record::is_missed(&given, commit, status, keys) {
        match record::standing(&given, commit, keys, context).await {
            Ok(found) => standing = found,
            Err(why) => return Ok(uncounted(commit, status, why)),
        }
    }
    counted.approvals.rejected.extend(standing.iter().cloned());
    answer(&approvals, &given, &counted, context).await?;
    let mut wanted = verdict(&counted);
    if !standing.is_empty() {
        let who = standing.join(", ");
        wanted.message += &format!(
            "; what {who} said was deleted without the operator being asked whether it may be, and stands until {who} decides again; should {who} not be able to, make another AetherCommit of AetherCheckpoint {}",
            status.checkpoint.as_deref().unwrap_or_default()
        );
    }
    status.approvals = Some(counted.approvals.clone());
    if counted.is_released() {
        if status.phase != Some(CommitPhase::Running) {
            status.releases = Some(status.releases.unwrap_or(0) + 1);
        }
        status.phase = Some(CommitPhase::Running);
        status.started.get_or_insert_with(objects::now);
    } else if counted.approvals.rejected.is_empty() {
        status.phase = Some(CommitPhase::AwaitingApproval);
    } else {
        status.phase = Some(CommitPhase::Rejected);
    }
    conditions::set(&mut status.conditions, wanted, commit.meta().generation);
    let expiry = counted.expires.and_then(|expiry| Duration::try_from(expiry.duration_since(now)).ok());
    Ok(Some(if counted.is_released() { Duration::ZERO } else { expiry.map_or(RECOUNT, |expiry| expiry.min(RECOUNT)) }))
}

/// Leaves what the audit log cannot be asked about. What is released is counted before it is tried again; nothing is written as
/// long as that stays so.
fn uncounted(commit: &AetherCommit, status: &mut AetherCommitStatus, why: String) -> Again {
    if status.phase == Some(CommitPhase::Running) {
        let before = commit.status.as_ref().and_then(|before| before.retry_at.clone());
        status.retry_at = before.or_else(|| Some(objects::now()));
    }
    hold(commit, status, why);
    Some(pins::RETRY)
}

fn verdict(counted: &Count) -> Wanted {
    let said = &counted.approvals;
    if !said.rejected.is_empty() {
        return Wanted::no(APPROVED, reason::REJECTED, format!("rejected by {}", said.rejected.join(", ")));
    }
    if !said.missing.is_empty() {
        let message = format!("{} of {}; missing: {}", said.have, said.need, said.missing.join("; "));
        return Wanted::no(APPROVED, reason::AWAITING_APPROVAL, message);
    }
    let by = if said.by.is_empty() { "nobody, as the rule allows".to_owned() } else { said.by.join(", ") };
    Wanted::yes(APPROVED, reason::APPROVED, format!("approved by {by}"))
}

/// What is known of an approval. An API server that cannot say whether somebody may approve has not said yes.
async fn ballot(
    approval: &AetherApproval,
    commit: &AetherCommit,
    source: &AetherSource,
    keys: &Keys,
    context: &Context,
) -> Ballot {
    let signed = is_genuine(approval, commit, keys);
    let reviewer = approval.spec.reviewer.clone().unwrap_or_default();
    let standing = match signed {
        Err(why) => Err(why),
        Ok(reviewer) => {
            let (namespace, name) = (source.namespace().unwrap_or_default(), source.name_any());
            match access::may(&context.client, &reviewer, access::APPROVE, &namespace, &name).await {
                Ok(true) => Ok(()),
                Ok(false) => Err(format!("{} may not approve for AetherSource {namespace}/{name}", reviewer.username)),
                Err(error) => Err(format!("it is not known whether {} may approve: {error}", reviewer.username)),
            }
        }
    };
    Ballot {
        name: approval.name_any(),
        username: reviewer.username,
        groups: reviewer.groups,
        decision: approval.spec.decision,
        root: approval.spec.root.clone(),
        made: approval.creation_timestamp().map_or(Timestamp::MIN, |time| time.0),
        standing,
    }
}

/// The checks that are missing.
async fn unchecked(rule: &ReviewRule, root: &str, namespace: &str, context: &Context) -> Result<Vec<String>> {
    if rule.checks.is_empty() {
        return Ok(Vec::new());
    }
    let commands: Vec<AetherCommand> = objects::list(&objects::namespaced(&context.client, namespace), "").await?;
    let checkpoints: Vec<AetherCheckpoint> =
        objects::list(&objects::namespaced(&context.client, namespace), "").await?;
    Ok(checks::missing(&rule.checks, &commands, &checkpoints, root))
}

/// Writes on each approval whether it counts.
async fn answer(
    approvals: &Api<AetherApproval>,
    given: &[AetherApproval],
    counted: &Count,
    context: &Context,
) -> Result<()> {
    for approval in given {
        let Some(verdict) = counted.verdicts.get(&approval.name_any()) else { continue };
        let wanted = AetherApprovalStatus { counts: verdict.is_ok(), reason: verdict.clone().err() };
        match objects::write_status(approvals, approval, &wanted).await {
            Ok(Some(written)) => {
                crash_point!("commit.answered");
                match &wanted.reason {
                    Some(why) => context.tell(&written, EventType::Warning, "DoesNotCount", why).await,
                    None => context.tell(&written, EventType::Normal, "Counts", "it counts").await,
                }
            }
            Ok(None) => {}
            // It was withdrawn just now: that wakes us.
            Err(error) if error.is_conflict() || error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Carries out a commit that was released.
async fn carry(
    commit: &AetherCommit,
    status: &mut AetherCommitStatus,
    keys: &Keys,
    context: &Context,
) -> Result<Again> {
    let source = match settle::source(commit, status, context).await? {
        Ok(source) => source,
        Err(why) => return stop(commit, status, why, context).await,
    };
    if commit.spec.target.promote.is_some() {
        return promote(commit, status, source, context).await;
    }
    if let Some(at) = &status.retry_at {
        let left = Duration::try_from(at.0.duration_since(Timestamp::now())).unwrap_or_default();
        if !left.is_zero() {
            return Ok(Some(left));
        }
        // Somebody may have rejected it in the meantime, or lost the right to approve.
        status.retry_at = None;
        return review(commit, status, keys, context).await;
    }
    let namespace = source.namespace().unwrap_or_default();
    let authority = admission::authority(context.config.credentials.authority.as_deref())?;
    let Some(ours) = job::job(commit, &source, authority.as_deref(), &context.config) else {
        let why = settle::cannot(commit, status, context);
        let why = rules::fits(&commit.spec, &source.spec).or(why);
        let why = why.unwrap_or_else(|| "its status does not say what it is of".into());
        return stop(commit, status, (reason::INVALID, why), context).await;
    };
    let name = ours.name_any();
    let jobs: Api<Job> = objects::namespaced(&context.client, &namespace);
    let found = objects::get(&jobs, &name).await?.filter(|job| status.job_uid.is_none() || job.uid() == status.job_uid);
    let job = match found {
        Some(job) => job,
        None if status.job_uid.is_some() => {
            let gone = outcome::temporary(format!("Job {namespace}/{name} was deleted before it ended"));
            return Ok(conclude(commit, status, gone));
        }
        None => {
            // Who comes to mend it may take a while: it is counted again as long as something is missing, and once more when it is
            // there.
            if let Some((why, message)) = job::lacks(&ours, &context.client).await? {
                set(commit, status, Wanted::no(COMPLETE, why, message));
                let again = review(commit, status, keys, context).await?;
                return Ok(if status.phase == Some(CommitPhase::Running) { Some(patience(status)) } else { again });
            }
            let lacked = conditions::get(&status.conditions, COMPLETE).is_some_and(|complete| {
                [reason::SECRET_NOT_FOUND, reason::CLAIM_NOT_FOUND].contains(&complete.reason.as_str())
            });
            if lacked {
                set(commit, status, Wanted::no(COMPLETE, reason::IN_PROGRESS, "what was missing is there"));
                return review(commit, status, keys, context).await;
            }
            if authority.is_some() {
                admission::provide_account(&context.client, &namespace, admission::COMMITTER).await?;
            }
            crash_point!("commit.admitted");
            match objects::create(&jobs, &ours).await? {
                Some(made) => {
                    crash_point!("commit.job.made");
                    made
                }
                None => return Ok(Some(POLL)),
            }
        }
    };
    (status.job, status.job_uid) = (Some(name.clone()), job.uid());
    let pods: Api<Pod> = objects::namespaced(&context.client, &namespace);
    let labelled = objects::list(&pods, &format!("job-name={name}")).await?;
    let template = ours.spec.map(|spec| spec.template).unwrap_or_default();
    let outcome = hear(&job, labelled, &template);
    if let Outcome::Failed(Failure { reason: why, .. }) = &outcome
        && why == reason::INVALID_JOB
    {
        objects::delete(&jobs, &job).await?;
        crash_point!("commit.job.deleted");
    }
    Ok(conclude(commit, status, outcome))
}

/// How long until it is looked again for what a Job lacks: as long as it has been missing, so that the pauses double. Nothing is
/// written meanwhile.
fn patience(status: &AetherCommitStatus) -> Duration {
    let since =
        conditions::get(&status.conditions, COMPLETE).map(|complete| objects::since(&complete.last_transition_time));
    since.unwrap_or_default().clamp(FIRST_PAUSE, LONGEST_PAUSE)
}

/// Ends a commit that may not go on, and its Job with it. What that has done by now is done.
async fn stop(
    commit: &AetherCommit,
    status: &mut AetherCommitStatus,
    (why, mut message): (&str, String),
    context: &Context,
) -> Result<Again> {
    let namespace = status.source.clone().unwrap_or_default().namespace;
    let jobs: Api<Job> = objects::namespaced(&context.client, &namespace);
    let name = status.job.clone().filter(|_| status.job_uid.is_some()).unwrap_or_default();
    let found = if name.is_empty() { None } else { objects::get(&jobs, &name).await? };
    if let Some(job) = found.filter(|job| job.uid() == status.job_uid) {
        let pods: Api<Pod> = objects::namespaced(&context.client, &namespace);
        let labelled = objects::list(&pods, &format!("job-name={name}")).await?;
        // It was what this operator asks for when it was noted, and cannot be changed.
        let template = job.spec.clone().map(|spec| spec.template).unwrap_or_default();
        let outcome = hear(&job, labelled, &template);
        if matches!(outcome, Outcome::Done(_)) {
            return Ok(conclude(commit, status, outcome));
        }
        objects::delete(&jobs, &job).await?;
        crash_point!("commit.job.deleted");
        message +=
            &format!("; Job {namespace}/{name} was on its way and is deleted: see whether it had come to its end");
    }
    fail(commit, status, why, message);
    Ok(None)
}

/// What the Job and its pods say, as far as they are what this operator asked for.
fn hear(job: &Job, mut pods: Vec<Pod>, template: &PodTemplateSpec) -> Outcome {
    let given = job.spec.as_ref().map(|spec| &spec.template);
    let metadata = given.and_then(|given| given.metadata.as_ref());
    if let Some(what) = genuine::difference(template, metadata, given.and_then(|given| given.spec.as_ref())) {
        let name = job.name_any();
        return Outcome::Failed(Failure {
            reason: reason::INVALID_JOB.into(),
            message: format!(
                "Job {name} differs from what this operator asks for in {what}: an older operator or somebody else made it, or the source was changed meanwhile"
            ),
            conflicts: Vec::new(),
            temporary: true,
        });
    }
    let mut doubt = None;
    pods.retain(|pod| objects::is_owned_by(pod, job));
    pods.retain(|pod| {
        let different = genuine::difference(template, Some(&pod.metadata), pod.spec.as_ref());
        if let Some(what) = different {
            doubt = Some(format!(
                "pod {} is not believed: it differs from what this operator asks for in {what}, by an admission webhook or by somebody's hand",
                pod.name_any()
            ));
        }
        different.is_none()
    });
    let pod = pods.into_iter().max_by_key(|pod| pod.creation_timestamp().map(|time| time.0));
    match (outcome::outcome(job, pod.as_ref()), doubt) {
        (Outcome::Running(None), doubt) => Outcome::Running(doubt),
        (Outcome::Failed(failure), Some(doubt)) if pod.is_none() => {
            Outcome::Failed(Failure { message: format!("{}; {doubt}", failure.message), ..failure })
        }
        (outcome, _) => outcome,
    }
}

/// Notes what has become of the Job.
fn conclude(commit: &AetherCommit, status: &mut AetherCommitStatus, outcome: Outcome) -> Again {
    match outcome {
        Outcome::Running(trouble) => {
            let job = status.job.as_deref().unwrap_or_default();
            let message = trouble.unwrap_or_else(|| format!("Job {job} commits"));
            set(commit, status, Wanted::no(COMPLETE, reason::IN_PROGRESS, message));
            Some(POLL)
        }
        Outcome::Done(done) => {
            crash_point!("commit.heard");
            let message = done.tell(commit, status);
            succeed(commit, status, message);
            None
        }
        Outcome::Failed(failure) => {
            let retries = status.retries.unwrap_or(0);
            if failure.temporary && retries < MOST_RETRIES {
                let pause = FIRST_PAUSE.saturating_mul(1 << retries.min(10)).min(LONGEST_PAUSE);
                status.retries = Some(retries + 1);
                (status.job, status.job_uid) = (None, None);
                let at = objects::now().0 + SignedDuration::try_from(pause).unwrap_or_default();
                status.retry_at = Some(Time(at));
                let message = format!("{}; it is tried again at {at}", failure.message);
                set(commit, status, Wanted::no(COMPLETE, failure.reason, message));
                return Some(pause);
            }
            status.conflicts = failure.conflicts;
            fail(commit, status, &failure.reason, failure.message);
            None
        }
    }
}

/// Makes the tree a revision of the source.
async fn promote(
    commit: &AetherCommit,
    status: &mut AetherCommitStatus,
    source: AetherSource,
    context: &Context,
) -> Result<Again> {
    let namespace = source.namespace().unwrap_or_default();
    let of = commit.namespace().unwrap_or_default();
    let mark = format!("{of}/{} (uid {})", commit.name_any(), commit.uid().unwrap_or_default());
    let base = status.base.as_ref().and_then(|base| base.revision.as_deref());
    let root = status.root.clone().unwrap_or_default();
    let (wanted, name) = promote::promoted(&source, &root, base, &mark);
    let sources: Api<AetherSource> = objects::namespaced(&context.client, &namespace);
    if let Some(written) = objects::write_status(&sources, &source, &wanted).await? {
        let message = format!("revision {name}: promoted from AetherCommit {of}/{}", commit.name_any());
        crash_point!("commit.promoted");
        context.tell(&written, EventType::Normal, "RevisionPromoted", &message).await;
    }
    status.revision = Some(name.clone());
    succeed(commit, status, format!("it is revision {name} of AetherSource {namespace}/{}", source.name_any()));
    Ok(None)
}

fn set(commit: &AetherCommit, status: &mut AetherCommitStatus, wanted: Wanted) {
    conditions::set(&mut status.conditions, wanted, commit.meta().generation);
}

fn wait(commit: &AetherCommit, status: &mut AetherCommitStatus, why: &str, message: impl Into<String>) {
    status.phase = Some(CommitPhase::Pending);
    set(commit, status, Wanted::no(APPROVED, why, message));
}

/// Leaves it as it is until the audit log can be written.
fn hold(commit: &AetherCommit, status: &mut AetherCommitStatus, why: String) {
    let about = if status.phase == Some(CommitPhase::Running) { COMPLETE } else { APPROVED };
    status.phase.get_or_insert(CommitPhase::Pending);
    set(commit, status, Wanted::no(about, reason::AUDIT_LOG_UNAVAILABLE, why));
}

fn succeed(commit: &AetherCommit, status: &mut AetherCommitStatus, message: String) {
    status.phase = Some(CommitPhase::Succeeded);
    status.finished = Some(objects::now());
    status.retry_at = None;
    set(commit, status, Wanted::yes(COMPLETE, reason::DONE, message));
}

fn fail(commit: &AetherCommit, status: &mut AetherCommitStatus, why: &str, message: impl Into<String>) {
    let message = message.into();
    status.phase = Some(CommitPhase::Failed);
    status.finished = Some(objects::now());
    status.retry_at = None;
    set(commit, status, Wanted::no(COMPLETE, why, message.clone()));
    set(commit, status, Wanted::yes(FAILED, why, message));
}

/// An event for each change of state, once.
async fn tell(commit: &AetherCommit, before: &AetherCommitStatus, now: &AetherCommitStatus, context: &Context) {
    let voices = |status: &AetherCommitStatus| {
        status.approvals.clone().map(|approvals| (approvals.by, approvals.rejected)).unwrap_or_default()
    };
    let held = |status: &AetherCommitStatus| {
        let mut conditions = status.conditions.iter();
        conditions.find(|one| one.reason == reason::AUDIT_LOG_UNAVAILABLE).map(|one| one.message.clone())
    };
    if let (None, Some(message)) = (held(before), held(now)) {
        context.tell(commit, EventType::Warning, reason::AUDIT_LOG_UNAVAILABLE, &message).await;
    }
    if (before.phase, voices(before)) == (now.phase, voices(now)) {
        return;
    }
    let Some(phase) = now.phase else { return };
    let speaks = match phase {
        CommitPhase::Failed => FAILED,
        CommitPhase::Succeeded => COMPLETE,
        _ => APPROVED,
    };
    let message = conditions::get(&now.conditions, speaks).map_or("", |condition| condition.message.as_str());
    let bad = matches!(phase, CommitPhase::Failed | CommitPhase::Rejected);
    let type_ = if bad { EventType::Warning } else { EventType::Normal };
    context.tell(commit, type_, &format!("{phase:?}"), message).await;
}

fn pins_of(commit: &AetherCommit) -> Vec<Pin> {
    let (owner, status) = (commit.uid().unwrap_or_default(), commit.status.clone().unwrap_or_default());
    let pin = |name: &str, tree| Pin { owner: owner.clone(), kind: pins::COMMIT, name: name.into(), tree };
    let base = status.base.map(|base| pin("base", base.root));
    status.root.map(|root| pin("", root)).into_iter().chain(base).collect()
}
