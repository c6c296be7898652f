//! Whether the node that holds a session lives, from the node lease that its kubelet renews. No I/O: whoever judges asks the
//! API server and brings the answer.
//!
//! The time that stands in a node lease decides nothing: clocks differ, and when the API server was away for longer than a
//! lease lasts, all of them are old for a moment. A holder is lost when the API server answered again and again for as long
//! as the lease lasts, by the clock of this process, and the lease was the same each time.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;

/// The namespace of node leases.
pub const NODE_LEASES: &str = "kube-node-lease";
/// A node is looked at so often while its lease lasts. A kubelet renews its lease as often.
const LOOKS: u32 = 4;
/// How long a node lease lasts when it does not say: the kubelet's default.
const DEFAULT_LEASE: Duration = Duration::from_secs(40);

/// Whether the holder of a lease lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// Its node lease was renewed, or has not been watched for long enough.
    Alive {
        /// When to look again.
        again: Duration,
    },
    /// It has a Node object but no node lease to judge by: it counts as alive.
    Unknown,
    /// Its Node object is gone.
    NodeGone,
    /// Its node lease was not renewed in all the time that it lasts.
    Expired,
}

/// What was seen of the node leases of holders. Several who wait for one node look for each other.
#[derive(Debug, Default)]
pub struct Holders(Mutex<HashMap<String, Seen>>);

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
    /// The judgement on a holder from what the API server says at `now`. Without a node lease the Node object decides.
    pub fn judge(&self, holder: &str, node_exists: bool, lease: Option<&Lease>, now: Instant) -> Liveness {
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
    pub fn lost(self) -> bool {
        matches!(self, Self::NodeGone | Self::Expired)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::Timestamp;
    use k8s_openapi::api::coordination::v1::LeaseSpec;

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
