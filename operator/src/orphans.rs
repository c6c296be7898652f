//! Whose pins nobody needs: owners that the API server has not known for a while.
//!
//! Forgetting a pin costs the work that only the store still has, so every doubt keeps it. An owner must be missing from
//! every list for the whole grace, as this process has seen it: a restart begins anew, and so does an owner that was
//! seen again. When the API server knows none of the owners, it is not believed: the store may be that of another cluster. Pins that
//! are older than the cluster are not asked about at all ([`crate::sweep`]): it may have been made anew from nothing, with a few
//! objects applied again since. Lists are of all namespaces; one that is refused fails the sweep before anything is decided.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// For how long an owner must be missing.
pub const GRACE: Duration = Duration::from_secs(60 * 60);

/// The owners that are missing.
pub struct Orphans {
    grace: Duration,
    /// Since when each has been missing.
    missing: Mutex<HashMap<String, Instant>>,
}

impl Orphans {
    /// Owners count as gone after this time.
    pub fn new(grace: Duration) -> Self {
        Self { grace, missing: Mutex::default() }
    }

    /// Of the owners that pinned something, those that have been missing for the whole grace. Call it at each sweep.
    pub fn gone(&self, owners: &HashSet<&str>, living: &HashSet<String>, now: Instant) -> Vec<String> {
        let mut missing = self.missing.lock().expect("no holder panics");
        let lost: HashSet<&str> = owners.iter().filter(|owner| !living.contains(**owner)).copied().collect();
        if !owners.is_empty() && lost.len() == owners.len() {
            tracing::warn!(
                owners = owners.len(),
                "of those who pinned trees in the store this cluster knows none: all pins are kept"
            );
            missing.clear();
            return Vec::new();
        }
        missing.retain(|owner, _| lost.contains(owner.as_str()));
        for owner in lost {
            missing.entry(owner.to_owned()).or_insert(now);
        }
        let gone = missing.iter().filter(|(_, since)| now.duration_since(**since) >= self.grace);
        gone.map(|(owner, _)| owner.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn an_owner_is_gone_when_it_was_missing_all_the_time() {
        let orphans = Orphans::new(60 * MINUTE);
        let (begin, owners) = (Instant::now(), HashSet::from(["a", "b", "c", "d"]));
        let gone = |minutes: u32, living: &[&str]| {
            let living = living.iter().map(|uid| (*uid).to_owned()).collect();
            let mut gone = orphans.gone(&owners, &living, begin + minutes * MINUTE);
            gone.sort();
            gone
        };
        assert!(gone(0, &["a", "d"]).is_empty());
        assert!(gone(30, &["a", "b", "d"]).is_empty(), "b is back");
        assert_eq!(gone(60, &["a", "d"]), ["c"]);
        assert!(gone(89, &["a", "c", "d"]).is_empty());
        assert_eq!(gone(120, &["a", "d"]), ["b"]);
    }

    #[test]
    fn a_cluster_that_knows_none_is_not_believed() {
        let orphans = Orphans::new(Duration::ZERO);
        let owners = HashSet::from(["a", "b", "c", "d"]);
        let gone = |living: &[&str]| {
            let living = living.iter().map(|uid| (*uid).to_owned()).collect();
            let mut gone = orphans.gone(&owners, &living, Instant::now());
            gone.sort();
            gone
        };
        assert!(gone(&[]).is_empty());
        assert!(gone(&["x"]).is_empty());
        assert_eq!(gone(&["a"]), ["b", "c", "d"]);
        assert!(orphans.gone(&HashSet::new(), &HashSet::new(), Instant::now()).is_empty());
    }

    #[test]
    fn doubt_begins_the_grace_anew() {
        let orphans = Orphans::new(60 * MINUTE);
        let (begin, owners) = (Instant::now(), HashSet::from(["a", "b"]));
        let gone = |minutes: u32, living: &[&str]| {
            let living = living.iter().map(|uid| (*uid).to_owned()).collect();
            orphans.gone(&owners, &living, begin + minutes * MINUTE)
        };
        assert!(gone(0, &["a"]).is_empty());
        assert!(gone(59, &[]).is_empty());
        assert!(gone(60, &["a"]).is_empty());
        assert_eq!(gone(120, &["a"]), ["b"]);
    }
}
