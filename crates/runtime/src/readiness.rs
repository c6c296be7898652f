//! Whether the process can do its job: a set of named parts, each ready or not for a reason.

use std::collections::BTreeMap;
use std::fmt;

use tokio::sync::watch;
use tracing::info;

/// Reason of a part that has not said anything yet.
const STARTING: &str = "starting";

/// Ready when all of its parts are. Clones are handles to the same set.
#[derive(Clone, Debug, Default)]
pub struct Readiness(watch::Sender<State>);

/// The parts that are not ready, by name, with the reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    missing: BTreeMap<&'static str, String>,
}

impl State {
    /// Whether nothing is missing.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.missing.is_empty()
    }
}

/// `ready`, or a line for each part that is not.
impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_ready() {
            return f.write_str("ready");
        }
        for (index, (part, reason)) in self.missing.iter().enumerate() {
            write!(f, "{}{part}: {reason}", if index == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

/// One part; dropping it changes nothing.
#[derive(Debug)]
pub struct Part {
    name: &'static str,
    all: Readiness,
}

impl Readiness {
    /// Without parts, and so ready.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a part, which is not ready until it says so.
    #[must_use]
    pub fn part(&self, name: &'static str) -> Part {
        let part = Part { name, all: self.clone() };
        part.not_ready(STARTING);
        part
    }

    /// How it stands now.
    #[must_use]
    pub fn state(&self) -> State {
        self.0.borrow().clone()
    }

    /// For who wants to see each change.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<State> {
        self.0.subscribe()
    }

    /// Waits until all parts are ready.
    pub async fn ready(&self) {
        // The sender is in `self`, so it cannot be gone.
        let _ = self.subscribe().wait_for(State::is_ready).await;
    }
}

impl Part {
    /// The part can do its job.
    pub fn ready(&self) {
        let changed = self.all.0.send_if_modified(|state| state.missing.remove(self.name).is_some());
        if changed {
            info!(part = self.name, "ready");
        }
    }

    /// The part cannot do its job, because of `reason`.
    pub fn not_ready(&self, reason: impl Into<String>) {
        let reason = reason.into();
        let changed = self
            .all
            .0
            .send_if_modified(|state| state.missing.insert(self.name, reason.clone()).as_ref() != Some(&reason));
        if changed {
            info!(part = self.name, reason, "not ready");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_parts_count() {
        let readiness = Readiness::new();
        assert!(readiness.state().is_ready());
        let (store, pool) = (readiness.part("store"), readiness.part("pool"));
        assert_eq!(readiness.state().to_string(), "pool: starting\nstore: starting");
        store.ready();
        pool.not_ready("no space");
        assert_eq!(readiness.state().to_string(), "pool: no space");
        let waiting = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.ready().await }
        });
        pool.ready();
        waiting.await.unwrap();
        assert_eq!(readiness.state().to_string(), "ready");
        store.not_ready("connection lost");
        assert!(!readiness.state().is_ready());
    }

    #[test]
    fn saying_it_again_wakes_nobody() {
        let readiness = Readiness::new();
        let part = readiness.part("store");
        let mut seen = readiness.subscribe();
        part.not_ready(STARTING);
        assert!(!seen.has_changed().unwrap());
        part.ready();
        assert!(seen.has_changed().unwrap());
        seen.mark_unchanged();
        part.ready();
        assert!(!seen.has_changed().unwrap());
    }
}
