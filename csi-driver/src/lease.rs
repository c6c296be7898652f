//! The writer's lease of a session: who holds it, and what a node that wants it has to do next. Pure.
//!
//! The lease is `status.attachment` of the session and changes by compare-and-swap only. Its epoch grows with each
//! taking and alone decides who lost: a holder that is cut off never gives a lease back. Whether a holder lives is
//! read from the node lease that its kubelet renews; a session writes no heartbeat.
//!
//! The time that stands in a node lease decides nothing: clocks differ, and when the API server was away for longer than a
//! lease lasts, all of them are old for a moment. A holder is lost when the API server answered again and again for as long as the
//! lease lasts, by the clock of this process, and the lease was the same each time.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use aether_api::session::Attachment;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;

use crate::records::{SessionRecord, Upper};

/// A node is looked at so often while its lease lasts. A kubelet renews its lease as often.
const LOOKS: u32 = 4;
/// How long a node lease lasts when it does not say: the kubelet's default.
const DEFAULT_LEASE: Duration = Duration::from_secs(40);

/// Whether the holder of a lease lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Liveness {
    /// Its node lease was renewed, or has not been watched for long enough. Look again after that time.
    Alive { again: Duration },
    /// It has a Node object but no node lease to judge by: it counts as alive.
    Unknown,
    /// Its Node object is gone.
    NodeGone,
    /// Its node lease was not renewed in all the time that it lasts.
    Expired,
}

/// What was seen of the node leases of holders. Several who wait for one node look for each other.
#[derive(Debug, Default)]
pub(crate) struct Holders(Mutex<HashMap<String, Seen>>);

/// A node lease that stays the same.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    renewed: MicroTime,
    /// When it was looked at last.
    looked: Instant,
    /// For how long it has been seen unchanged: no more between two looks than there should be.
    silent: Duration,
}

impl Holders {
    /// The judgement on a holder from what the API server says now. Without a node lease the Node object decides.
    pub(crate) fn judge(&self, holder: &str, node_exists: bool, lease: Option<&Lease>, now: Instant) -> Liveness {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody waits for those any more.
        all.retain(|_, seen| now.saturating_duration_since(seen.looked) < Duration::from_secs(3600));
        let (seen, liveness) = look(all.remove(holder), node_exists, lease, now);
        all.extend(seen.map(|seen| (holder.to_owned(), seen)));
        liveness
    }
}

/// What is to be remembered of a node lease, and the judgement.
fn look(before: Option<Seen>, node_exists: bool, lease: Option<&Lease>, now: Instant) -> (Option<Seen>, Liveness) {
    if !node_exists {
        return (None, Liveness::NodeGone);
    }
    let spec = lease.and_then(|lease| lease.spec.as_ref());
    let Some(renewed) = spec.and_then(|spec| spec.renew_time.clone()) else { return (None, Liveness::Unknown) };
    let seconds = spec.and_then(|spec| u64::try_from(spec.lease_duration_seconds?).ok());
    let lasts = seconds.map_or(DEFAULT_LEASE, |seconds| Duration::from_secs(seconds.max(1)));
    let pause = lasts / LOOKS;
    let silent = match before {
        // After a longer gap nobody knows whether it could have been renewed.
        Some(before) if before.renewed == renewed && now.saturating_duration_since(before.looked) <= lasts => {
            before.silent + now.saturating_duration_since(before.looked).min(pause)
        }
        _ => Duration::ZERO,
    };
    let again = pause.min(lasts.saturating_sub(silent));
    let liveness = if silent >= lasts { Liveness::Expired } else { Liveness::Alive { again } };
    (Some(Seen { renewed, looked: now, silent }), liveness)
}

impl Liveness {
    /// Whether another node may take over from it.
    pub(crate) fn lost(self) -> bool {
        matches!(self, Self::NodeGone | Self::Expired)
    }
}

/// What a node that wants to write a session does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// It holds the lease already, under this epoch, and its upper is the session.
    Keep { epoch: i64 },
    /// Take the lease under this epoch by compare-and-swap.
    Take { epoch: i64, from: Option<String> },
    /// First keep what the upper here has unsaved as the checkpoint `recovered-<epoch>`: others may have written since.
    Recover,
    /// What was seen of the lease is older than what this node wrote: read the session again. Never a reason to recover.
    Reread,
    /// Somebody else holds it: ask whether they live.
    Inspect { holder: String },
    /// Somebody else holds it and lives: wait, and look again when the session changes or the holder's lease ends.
    Wait { holder: String },
}

/// Decides for node `me`. `local` is what this node has of the session, `liveness` what is known of the holder, if it
/// was asked for.
pub(crate) fn decide(
    attachment: Option<&Attachment>,
    local: Option<&SessionRecord>,
    me: &str,
    liveness: Option<Liveness>,
) -> Action {
    let epoch = attachment.map_or(0, |attachment| attachment.epoch);
    let holder = attachment.and_then(|attachment| attachment.node.as_deref());
    if let Some(local) = local {
        let mine = holder == Some(me) && local.epoch == epoch;
        match local.upper {
            Upper::Dirty if mine => return Action::Keep { epoch },
            Upper::Dirty if local.epoch > epoch => return Action::Reread,
            Upper::Dirty | Upper::Fenced { .. } => return Action::Recover,
            Upper::Clean { .. } => {}
        }
    }
    match holder {
        None => Action::Take { epoch: epoch + 1, from: None },
        // This node took it and was killed before it wrote that down, or lost its records: nothing was mounted
        // under that epoch that is still here.
        Some(holder) if holder == me => Action::Take { epoch: epoch + 1, from: None },
        Some(holder) => match liveness {
            None => Action::Inspect { holder: holder.to_owned() },
            Some(liveness) if liveness.lost() => Action::Take { epoch: epoch + 1, from: Some(holder.to_owned()) },
            Some(_) => Action::Wait { holder: holder.to_owned() },
        },
    }
}

/// Whether `me` holds the lease under the epoch of its record, and the upper here is the session.
pub(crate) fn holds(attachment: Option<&Attachment>, local: &SessionRecord, me: &str) -> bool {
    local.upper == Upper::Dirty
        && attachment
            .is_some_and(|attachment| attachment.node.as_deref() == Some(me) && attachment.epoch == local.epoch)
}

/// Whether another node has taken the session over since this node wrote it.
pub(crate) fn lost(attachment: Option<&Attachment>, local: &SessionRecord, me: &str) -> bool {
    attachment.is_some_and(|attachment| {
        attachment.epoch > local.epoch
            && !(attachment.node.as_deref() == Some(me) && attachment.epoch == local.epoch + 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::Timestamp;
    use k8s_openapi::api::coordination::v1::LeaseSpec;

    fn attachment(node: Option<&str>, epoch: i64) -> Option<Attachment> {
        Some(Attachment { node: node.map(str::to_owned), epoch, since: None })
    }

    fn record(epoch: i64, upper: Upper) -> Option<SessionRecord> {
        Some(SessionRecord {
            uid: "u".into(),
            namespace: "team".into(),
            name: "fix".into(),
            epoch,
            upper,
            ..SessionRecord::default()
        })
    }

    fn clean() -> Upper {
        Upper::Clean { root: "ab/1".into() }
    }

    #[test]
    fn every_case_has_its_action() {
        let alive = Some(Liveness::Alive { again: Duration::from_secs(10) });
        let take = |epoch, from: Option<&str>| Action::Take { epoch, from: from.map(str::to_owned) };
        let wait = Action::Wait { holder: "b".into() };
        let inspect = Action::Inspect { holder: "b".into() };
        let cases = [
            ("never attached", None, None, None, take(1, None)),
            ("released by another", attachment(None, 4), None, None, take(5, None)),
            ("released here", attachment(None, 4), record(4, clean()), None, take(5, None)),
            ("held here", attachment(Some("a"), 4), record(4, Upper::Dirty), None, Action::Keep { epoch: 4 }),
            ("taken here, records lost", attachment(Some("a"), 4), None, None, take(5, None)),
            ("taken here, killed before the record", attachment(Some("a"), 5), record(4, clean()), None, take(6, None)),
            ("held elsewhere, not asked", attachment(Some("b"), 4), None, None, inspect.clone()),
            ("held elsewhere, with an old clean copy", attachment(Some("b"), 4), record(3, clean()), None, inspect),
            ("held elsewhere, alive", attachment(Some("b"), 4), None, alive, wait.clone()),
            ("held elsewhere, no lease to judge by", attachment(Some("b"), 4), None, Some(Liveness::Unknown), wait),
            ("holder deleted", attachment(Some("b"), 4), None, Some(Liveness::NodeGone), take(5, Some("b"))),
            ("holder expired", attachment(Some("b"), 4), None, Some(Liveness::Expired), take(5, Some("b"))),
            ("taken over by another", attachment(Some("b"), 5), record(4, Upper::Dirty), alive, Action::Recover),
            ("taken over and released", attachment(None, 5), record(4, Upper::Dirty), None, Action::Recover),
            ("let go by another hand", attachment(None, 4), record(4, Upper::Dirty), None, Action::Recover),
            ("two pods at once: the cache has not seen the lease", None, record(1, Upper::Dirty), None, Action::Reread),
            (
                "the cache shows the holder before",
                attachment(Some("b"), 3),
                record(4, Upper::Dirty),
                alive,
                Action::Reread,
            ),
            (
                "the cache shows our own lease before",
                attachment(Some("a"), 3),
                record(4, Upper::Dirty),
                None,
                Action::Reread,
            ),
            (
                "recovery not finished",
                attachment(Some("a"), 4),
                record(4, Upper::Fenced { snapshot: "s".into(), root: None }),
                None,
                Action::Recover,
            ),
        ];
        for (name, attachment, local, liveness, expected) in cases {
            assert_eq!(decide(attachment.as_ref(), local.as_ref(), "a", liveness), expected, "{name}");
        }
    }

    #[test]
    fn a_session_is_lost_when_another_node_took_it() {
        let local = record(4, Upper::Dirty).unwrap();
        let lost = |attachment: Option<Attachment>| lost(attachment.as_ref(), &local, "a");
        assert!(lost(attachment(Some("b"), 5)));
        assert!(lost(attachment(None, 5)));
        assert!(lost(attachment(Some("a"), 6)));
        assert!(!lost(attachment(Some("a"), 4)));
        assert!(!lost(attachment(None, 4)));
        // What the cache shows may be older than what this node has written.
        assert!(!lost(attachment(Some("b"), 3)));
        assert!(!lost(None));
    }

    #[test]
    fn a_node_holds_under_its_own_epoch_only() {
        let held = |attachment: Option<Attachment>, upper| holds(attachment.as_ref(), &record(4, upper).unwrap(), "a");
        assert!(held(attachment(Some("a"), 4), Upper::Dirty));
        assert!(!held(attachment(Some("a"), 4), clean()));
        assert!(!held(attachment(Some("a"), 5), Upper::Dirty));
        assert!(!held(attachment(Some("a"), 3), Upper::Dirty));
        assert!(!held(attachment(Some("b"), 4), Upper::Dirty));
        assert!(!held(attachment(None, 4), Upper::Dirty));
        assert!(!held(None, Upper::Dirty));
    }

    /// A node lease of 40 s, renewed so many seconds after some time long ago.
    fn lease(renewed: Option<i64>) -> Lease {
        let renew_time = renewed.map(|second| MicroTime(Timestamp::from_second(1_700_000_000 + second).unwrap()));
        let spec = LeaseSpec { renew_time, lease_duration_seconds: Some(40), ..LeaseSpec::default() };
        Lease { spec: Some(spec), ..Lease::default() }
    }

    /// Looks at a node at these seconds, each with the time of its lease; says in which of them it was lost.
    fn lost_at(looks: &[(u64, i64)]) -> Vec<u64> {
        let (holders, start) = (Holders::default(), Instant::now());
        let lost = |(second, renewed): &(u64, i64)| {
            let now = start + Duration::from_secs(*second);
            holders.judge("b", true, Some(&lease(Some(*renewed))), now).lost().then_some(*second)
        };
        looks.iter().filter_map(lost).collect()
    }

    #[test]
    fn a_holder_is_lost_when_its_node_lease_was_seen_unchanged_for_as_long_as_it_lasts() {
        // However old it is at the first look.
        assert_eq!(lost_at(&[(0, -999), (10, -999), (20, -999), (30, -999), (40, -999)]), [40]);
        // However new it says it is.
        assert_eq!(lost_at(&[(0, 999), (10, 999), (20, 999), (30, 999), (39, 999), (41, 999)]), [41]);
        // It lives: no time stays for long.
        let none: [u64; 0] = [];
        assert_eq!(lost_at(&[(0, 0), (10, 10), (20, 20), (30, 30), (40, 30), (50, 50)]), none);
        // Who waits with others is not faster, and no slower.
        assert_eq!(lost_at(&[(0, 0), (1, 0), (10, 0), (11, 0), (20, 0), (30, 0), (39, 0), (40, 0)]), [40]);
    }

    #[test]
    fn an_api_server_that_was_away_costs_no_holder_its_session() {
        let none: [u64; 0] = [];
        // It renewed last at 8, the API server was away from 9 to 45: nobody could renew, and nobody could look.
        assert_eq!(lost_at(&[(0, 0), (10, 8), (45, 8), (46, 46), (56, 56)]), none);
        // Away for longer than a lease lasts: all begins anew.
        assert_eq!(lost_at(&[(0, 0), (10, 0), (20, 0), (80, 0), (90, 0), (100, 0), (110, 0), (120, 0)]), [120]);
    }

    #[test]
    fn a_node_without_a_lease_counts_as_alive_as_long_as_it_exists() {
        let (holders, now) = (Holders::default(), Instant::now());
        assert_eq!(holders.judge("b", true, Some(&lease(None)), now), Liveness::Unknown);
        assert_eq!(holders.judge("b", true, None, now), Liveness::Unknown);
        assert_eq!(holders.judge("b", false, Some(&lease(Some(0))), now), Liveness::NodeGone);
        let first = holders.judge("b", true, Some(&lease(Some(0))), now);
        assert_eq!(first, Liveness::Alive { again: Duration::from_secs(10) });
    }
}
