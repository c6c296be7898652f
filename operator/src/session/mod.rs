//! AetherSession: where it starts, and the claim by which pods mount it.
//!
//! From the object to its bound claim there are three writes: the claim, the volume, and one status once the claim is
//! bound. Waits that are short by nature are not written down, so they cost nothing; those that last, and everything a
//! person has to mend, become the `Ready` condition.

mod base;
mod claim;
pub mod remains;
mod validate;

use std::sync::Arc;
use std::time::Duration;

use aether_api::conditions::{self, READY, Wanted, reason};
use aether_api::session::ClaimPolicy;
use aether_api::{AetherSession, AetherSessionStatus};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::runtime::controller::Action;
use kube::runtime::events::EventType;
use kube::{Api, Resource, ResourceExt};

use crate::context::Context;
use crate::error::Result;
use crate::objects;
use crate::pins::{self, Pin};
use crate::schedule::{self, Again};
use base::Waiting;
use claim::Step;

/// How long a wait that is short by nature may last before it is worth a write.
const QUIET: Duration = Duration::from_secs(5);
/// When to look again for something that no event tells of.
const POLL: Duration = Duration::from_secs(2);
/// When to look again although an event should tell.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// Brings one session a step nearer to what its spec says.
///
/// # Errors
/// The read or write that failed; everything before it stands, and the next activation goes on from there.
pub async fn reconcile(seen: Arc<AetherSession>, context: Arc<Context>) -> Result<Action> {
    let namespace = seen.namespace().unwrap_or_default();
    let sessions: Api<AetherSession> = objects::namespaced(&context.client, &namespace);
    // Read anew, because the cache may be older than our own last write.
    let Some(session) = objects::get(&sessions, &seen.name_any()).await? else { return Ok(Action::await_change()) };
    if session.meta().deletion_timestamp.is_some() {
        // It waits for a finalizer of somebody else's. Nothing is created any more, because the namespace may be going too.
        return Ok(Action::await_change());
    }
    if let Some(expired) = expiry(&session)
        && expired.is_zero()
    {
        context.tell(&session, EventType::Normal, "Expired", "deleted: its timeToLive is over").await;
        objects::delete(&sessions, &session).await?;
        return Ok(Action::await_change());
    }
    let again = apply(&sessions, session.clone(), &context).await?;
    Ok(schedule::action(match expiry(&session) {
        Some(left) => schedule::sooner(again, left),
        None => again,
    }))
}

/// How long the session has still to live; `None` without a limit.
fn expiry(session: &AetherSession) -> Option<Duration> {
    let limit: Duration = session.spec.time_to_live?.into();
    Some(limit.saturating_sub(objects::age(session)))
}

async fn apply(sessions: &Api<AetherSession>, session: AetherSession, context: &Context) -> Result<Again> {
    if belongs_to_inline_volume(&session) {
        // The driver made it, resolves it and mounts it alone; two writers would only get in each other's way.
        return Ok(keep(&session, context).await);
    }
    if let Some(violation) = validate::violation(&session.spec) {
        let wanted = Wanted::no(READY, reason::INVALID, violation);
        report(sessions, &session, context, "Failed", wanted).await?;
        return Ok(None);
    }
    let start = match base::resolve(&session, &base::dereference(&session, context).await?) {
        Ok(start) => start,
        Err(waiting) => return wait(sessions, &session, context, waiting, objects::age(&session)).await,
    };
    if session.spec.claim != ClaimPolicy::None
        && let Some((waiting, since)) = ensure_claim(&session, context).await?
    {
        return wait(sessions, &session, context, waiting, since).await;
    }
    let notice = start.notice.clone();
    let mut status = start.stamp(session.status.clone().unwrap_or_default());
    status.claim_name = (session.spec.claim != ClaimPolicy::None).then(|| session.name_any());
    status.phase = Some("Bound".into());
    status.observed_generation = session.meta().generation;
    conditions::set(&mut status.conditions, ready(&session), session.meta().generation);
    let session = objects::write_status(sessions, &session, &status).await?.unwrap_or(session);
    if let Some(notice) = notice {
        context.tell(&session, EventType::Warning, "ForkedFromSaved", &notice).await;
    }
    let again = keep(&session, context).await;
    // No event tells that a node is lost, and it takes many looks to know.
    let under_way = base::moment_under_way(&session).is_some();
    Ok(if under_way { schedule::sooner(again, POLL) } else { again })
}

/// Whether the session was made by the driver for an inline volume, and lives and dies with its pod.
fn belongs_to_inline_volume(session: &AetherSession) -> bool {
    session.spec.claim == ClaimPolicy::None && session.owner_references().iter().any(|owner| owner.kind == "Pod")
}

fn ready(session: &AetherSession) -> Wanted {
    let message = match session.spec.claim {
        ClaimPolicy::None => "an inline volume can mount it".into(),
        ClaimPolicy::Create | ClaimPolicy::Existing => format!("claim {} is bound", session.name_any()),
    };
    Wanted::yes(READY, reason::READY, message)
}

/// Makes what is missing of claim and volume. Says what it waits for and how long it has waited; `None` when bound.
async fn ensure_claim(session: &AetherSession, context: &Context) -> Result<Option<(Waiting, Duration)>> {
    let namespace = session.namespace().unwrap_or_default();
    let claims: Api<PersistentVolumeClaim> = objects::namespaced(&context.client, &namespace);
    let volumes: Api<PersistentVolume> = objects::cluster(&context.client);
    let volume_name = aether_api::names::volume_name(&session.uid().unwrap_or_default());
    let mut claim = objects::get(&claims, &session.name_any()).await?;
    let mut volume = objects::get(&volumes, &volume_name).await?;
    // Each round makes or removes one object, so a few are enough; what then still differs is the next activation's.
    for _ in 0..4 {
        match claim::next(session, claim.as_ref(), volume.as_ref()) {
            Step::Bound => return Ok(None),
            Step::Wait(waiting) => {
                return Ok(Some((waiting, claim.as_ref().map_or_else(|| objects::age(session), waited_for))));
            }
            Step::CreateClaim => {
                claim = match objects::create(&claims, &claim::claim(session)).await? {
                    Some(claim) => Some(claim),
                    None => objects::get(&claims, &session.name_any()).await?,
                };
            }
            Step::CreateVolume(wanted) => {
                volume = match objects::create(&volumes, &wanted).await? {
                    Some(volume) => Some(volume),
                    None => objects::get(&volumes, &volume_name).await?,
                };
            }
            Step::DeleteVolume(old) => {
                objects::delete(&volumes, &old).await?;
                let message = "its claim was deleted: it gets a new one, and keeps all its changes";
                context.tell(session, EventType::Normal, "ClaimRenewed", message).await;
                volume = objects::get(&volumes, &volume_name).await?;
            }
        }
    }
    Ok(Some((Waiting::quietly(reason::WAITING_FOR_CLAIM, "its claim and volume keep changing"), objects::age(session))))
}

/// For how long a claim has been waited for: since it is going, or else since it is there.
fn waited_for(claim: &PersistentVolumeClaim) -> Duration {
    claim.meta().deletion_timestamp.as_ref().map_or_else(|| objects::age(claim), objects::since)
}

/// Writes down what the session waits for, unless that is short by nature and has only begun.
async fn wait(
    sessions: &Api<AetherSession>,
    session: &AetherSession,
    context: &Context,
    waiting: Waiting,
    since: Duration,
) -> Result<Again> {
    if waiting.quiet && since < QUIET {
        return Ok(Some(POLL.min(QUIET - since)));
    }
    let phase = if waiting.fatal { "Failed" } else { "Pending" };
    report(sessions, session, context, phase, Wanted::no(READY, waiting.reason, waiting.message)).await?;
    Ok(Some(if waiting.quiet { POLL } else { LOOK_AGAIN }))
}

/// Writes a `Ready` condition that does not hold, and an event when it is news.
async fn report(
    sessions: &Api<AetherSession>,
    session: &AetherSession,
    context: &Context,
    phase: &str,
    wanted: Wanted,
) -> Result<()> {
    let mut status = session.status.clone().unwrap_or_default();
    status.phase = Some(phase.into());
    status.observed_generation = session.meta().generation;
    let news = is_news(&status, &wanted);
    conditions::set(&mut status.conditions, wanted.clone(), session.meta().generation);
    if objects::write_status(sessions, session, &status).await?.is_some() && news {
        context.warn(session, &wanted).await;
    }
    Ok(())
}

fn is_news(status: &AetherSessionStatus, wanted: &Wanted) -> bool {
    conditions::get(&status.conditions, READY).is_none_or(|old| old.reason != wanted.reason)
}

/// Has the store keep what the session is and what its differences are shown against.
async fn keep(session: &AetherSession, context: &Context) -> Again {
    (!context.pins.keep(pins_of(session)).await).then_some(pins::RETRY)
}

fn pins_of(session: &AetherSession) -> Vec<Pin> {
    let owner = session.uid().unwrap_or_default();
    let base = session.status.as_ref().and_then(|status| status.base.as_ref()?.revision_root.as_deref());
    [("", session.head_root()), ("base", base)]
        .into_iter()
        .filter_map(|(name, tree)| {
            Some(Pin { owner: owner.clone(), kind: pins::SESSION_HEAD, name: name.into(), tree: tree?.into() })
        })
        .collect()
}
