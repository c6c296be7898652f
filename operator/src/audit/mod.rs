//! The audit log of commits, approvals and notes: who writes which line, and where its end is held.
//!
//! A line is written before what it tells of can be seen: the reconciler of commits writes before it writes a status, the webhook
//! before it lets somebody withdraw a decision or make, resolve or reopen a note. What cannot be written down does not happen, but
//! is tried again. Every line follows from an object ([`lines`]), so that whoever was killed writes the same one again, and
//! it is there once. The lines are in the store, their end in the cluster ([`anchor`]); `aether-operator audit` reads
//! them ([`command`]).

pub mod anchor;
pub mod command;
pub mod lines;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aether_audit::{Entry, Error, Log, Verb};
use aether_cas::remote::RemoteConfig;
use aether_cas::{RemoteStore, Store};
use aether_credentials::Credentials;
use jiff::{SignedDuration, Timestamp};

pub use anchor::ClusterAnchor;

/// How long writing may take: whoever asks the webhook is answered by then.
const DEADLINE: Duration = Duration::from_secs(8);
/// The same for one answer of the store, and for a store that is not there.
const STALL: Duration = Duration::from_secs(4);
const PATIENCE: Duration = Duration::from_secs(3);
/// By how much clocks may differ.
const SKEW: SignedDuration = SignedDuration::from_hours(1);
/// So many lines are remembered. Forgetting them costs only that the log is read again.
const REMEMBERED: usize = 100_000;

/// The store of the log.
///
/// # Errors
/// An address that is not one, or credentials that do not fit it.
pub fn store(address: &str, credentials: &Credentials) -> anyhow::Result<Arc<dyn Store>> {
    let config = RemoteConfig {
        credentials: credentials.clone(),
        stall: STALL,
        patience: PATIENCE,
        ..RemoteConfig::new(address)
    };
    Ok(Arc::new(RemoteStore::lazy(&config)?))
}

/// Writes the log.
pub struct Audit {
    store: Arc<dyn Store>,
    anchor: ClusterAnchor,
    /// What is known to be written, without times.
    told: Mutex<HashSet<Entry>>,
    /// One at a time, in this process: others would only be in its way.
    turn: tokio::sync::Mutex<()>,
}

impl Audit {
    /// Of this store and this anchor.
    pub fn new(store: Arc<dyn Store>, anchor: ClusterAnchor) -> Self {
        Self { store, anchor, told: Mutex::default(), turn: tokio::sync::Mutex::default() }
    }

    /// Writes those of these lines that are not written yet. They are of an object that was made at `made`.
    ///
    /// # Errors
    /// Why they cannot be written, and what to do about it, for people.
    pub async fn tell(&self, entries: &[Entry], made: Timestamp) -> Result<(), String> {
        let unknown = |told: &HashSet<Entry>| -> Vec<Entry> {
            entries.iter().filter(|entry| !told.contains(&entry.identity())).cloned().collect()
        };
        let writing = async {
            let _turn = self.turn.lock().await;
            let fresh = unknown(&self.told.lock().expect("no holder panics"));
            if fresh.is_empty() {
                return Ok(());
            }
            self.log().append(&fresh, made - SKEW).await?;
            let mut told = self.told.lock().expect("no holder panics");
            if told.len() >= REMEMBERED {
                told.clear();
            }
            told.extend(fresh.iter().map(Entry::identity));
            Ok(())
        };
        if unknown(&self.told.lock().expect("no holder panics")).is_empty() {
            return Ok(());
        }
        match tokio::time::timeout(DEADLINE, writing).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(explained("written", &error)),
            Err(_) => Err(format!("the audit log cannot be written: that took longer than {} s", DEADLINE.as_secs())),
        }
    }

    /// Whether a rejection is the last that the log tells of the approval of this name, since `made`.
    ///
    /// # Errors
    /// Why that is not known, for people.
    pub async fn stands(&self, namespace: &str, approval: &str, made: Timestamp) -> Result<bool, String> {
        let mut last = None;
        let of_it = |entry: &Entry| {
            entry.object.kind == "AetherApproval"
                && entry.object.namespace == namespace
                && entry.object.name == approval
        };
        let log = self.log();
        let reading = log.since(made - SKEW, |entry| {
            // One of the same name may have been of an earlier commit.
            if of_it(&entry) && entry.time >= made {
                last = Some(entry.verb);
            }
        });
        match tokio::time::timeout(DEADLINE, reading).await {
            Ok(Ok(())) => Ok(last == Some(Verb::Rejected)),
            Ok(Err(error)) => Err(explained("read", &error)),
            Err(_) => Err(format!("the audit log cannot be read: that took longer than {} s", DEADLINE.as_secs())),
        }
    }

    fn log(&self) -> Log<'_> {
        Log { store: self.store.as_ref(), anchor: &self.anchor }
    }
}

fn explained(what: &str, error: &Error) -> String {
    let way_out = match error {
        Error::Broken(_) | Error::Foreign(_) => "`aether-operator audit verify` says where, docs/audit.md what to do",
        Error::TooLong(_) => return error.to_string(),
        Error::Store(_) | Error::Anchor(_) | Error::Busy => "it is tried again; docs/audit.md says what it takes",
    };
    format!("the audit log cannot be {what}: {error}; {way_out}")
}
