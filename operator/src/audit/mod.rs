//! The audit log of commits, approvals and notes: who writes which line, and where its end is held.
//!
//! A line is written before what it tells of can be seen: the reconciler of commits writes before it writes a status, the webhook
//! before it lets somebody withdraw a decision or make, resolve or reopen a note. What cannot be written down does not happen, but
//! is tried again. What several have to say at a time is written at once, and by nobody's leave: who cannot wait any longer is told so,
//! and the writing goes on. Every line follows from an object ([`lines`]), so that whoever was killed writes the same one again, and
//! it is there once. The lines are in the store, their end in the cluster ([`anchor`]); `aether-operator audit` reads
//! them ([`command`]).

pub mod anchor;
pub mod command;
pub mod lines;

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aether_audit::{Entry, Error, Log, Memory, Verb, chain};
use aether_cas::remote::RemoteConfig;
use aether_cas::{RemoteStore, Store};
use aether_credentials::Credentials;
use jiff::{SignedDuration, Timestamp};
use tokio::sync::oneshot;
use tokio::time::timeout;

pub use anchor::ClusterAnchor;

/// How long whoever asks the webhook can wait.
pub const AT_ONCE: Duration = Duration::from_secs(8);
/// How long a reconciler waits, and the most that one writing may take.
pub const IN_TIME: Duration = Duration::from_secs(60);
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
    writer: Arc<Writer>,
}

struct Writer {
    store: Arc<dyn Store>,
    anchor: ClusterAnchor,
    memory: Memory,
    told: Mutex<Told>,
    /// Who has something to say and was not heard yet.
    waiting: Mutex<Vec<Waiting>>,
    /// One writes at a time, in this process: others would only be in its way.
    turn: tokio::sync::Mutex<()>,
}

/// What is known to be written.
#[derive(Default)]
struct Told {
    /// Without times.
    entries: HashSet<Entry>,
    /// How many lines the log had then.
    lines: u64,
}

impl Told {
    fn unknown(&self, entries: &[Entry]) -> Vec<Entry> {
        entries.iter().filter(|entry| !self.entries.contains(&entry.identity())).cloned().collect()
    }

    fn learn(&mut self, entries: &[Entry], lines: u64) {
        // Somebody has given the log up, and this is another one; or there is no room.
        if lines < self.lines || self.entries.len() >= REMEMBERED {
            self.entries.clear();
        }
        self.lines = lines;
        self.entries.extend(entries.iter().map(Entry::identity));
    }
}

struct Waiting {
    entries: Vec<Entry>,
    since: Timestamp,
    /// Whether it is their turn.
    begun: Arc<AtomicBool>,
    answer: oneshot::Sender<Result<(), String>>,
}

impl Audit {
    /// Of this store and this anchor.
    pub fn new(store: Arc<dyn Store>, anchor: ClusterAnchor) -> Self {
        let writer = Writer {
            store,
            anchor,
            memory: Memory::default(),
            told: Mutex::default(),
            waiting: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        };
        Self { writer: Arc::new(writer) }
    }

    /// Writes those of these lines that are not written yet, or says `within` this time why not. They are of an object that was made
    /// at `made`.
    ///
    /// # Errors
    /// Why they cannot be written, and what to do about it, for people.
    pub async fn tell(&self, entries: &[Entry], made: Timestamp, within: Duration) -> Result<(), String> {
        let fresh = self.writer.told.lock().expect("no holder panics").unknown(entries);
        if fresh.is_empty() {
            return Ok(());
        }
        // By itself, so that it is nobody else's trouble.
        fresh.iter().try_for_each(chain::fits).map_err(|error| explained("written", &error.into()))?;
        let (answer, answered) = oneshot::channel();
        let begun = Arc::new(AtomicBool::new(false));
        let waiting = Waiting { entries: fresh, since: made - SKEW, begun: begun.clone(), answer };
        self.writer.waiting.lock().expect("no holder panics").push(waiting);
        tokio::spawn(self.writer.clone().write());
        match timeout(within, answered).await {
            Ok(answer) => {
                answer.unwrap_or_else(|_| Err("the operator ends, and so does the writing of its log".into()))
            }
            Err(_) if begun.load(Ordering::Relaxed) => Err(late("written", within)),
            Err(_) => Err(format!(
                "the audit log cannot be written: others, who came before, took longer than {} s; try again; docs/audit.md says what it takes",
                within.as_secs()
            )),
        }
    }

    /// Whose rejection is the last that the log tells of what they said of this commit, which was made at `made`: by the name of the
    /// approval.
    ///
    /// # Errors
    /// Why that is not known, for people.
    pub async fn rejections(
        &self,
        namespace: &str,
        commit: &str,
        made: Timestamp,
    ) -> Result<BTreeMap<String, String>, String> {
        let mut rejections = BTreeMap::new();
        let log = self.writer.log();
        let reading = log.decisions(made - SKEW, &self.writer.memory, |entry| {
            let about = &entry.object;
            // One of the same name may have been of an earlier commit.
            if about.namespace == namespace && about.is_of("AetherCommit", commit) && entry.time >= made {
                match entry.verb {
                    Verb::Rejected => rejections.insert(about.name.clone(), entry.actor.clone()),
                    _ => rejections.remove(&about.name),
                };
            }
        });
        match timeout(IN_TIME, reading).await {
            Ok(Ok(())) => Ok(rejections),
            Ok(Err(error)) => Err(explained("read", &error)),
            Err(_) => Err(late("read", IN_TIME)),
        }
    }
}

impl Writer {
    /// Writes what all have to say who wait. Whoever finds nobody came after somebody who has.
    async fn write(self: Arc<Self>) {
        let _turn = self.turn.lock().await;
        let mut waiting = std::mem::take(&mut *self.waiting.lock().expect("no holder panics"));
        // They were told that it cannot be.
        waiting.retain(|one| !one.answer.is_closed());
        let Some(since) = waiting.iter().map(|one| one.since).min() else { return };
        waiting.iter().for_each(|one| one.begun.store(true, Ordering::Relaxed));
        let entries: Vec<Entry> = waiting.iter().flat_map(|one| one.entries.iter().cloned()).collect();
        let written = match timeout(IN_TIME, self.log().append(&entries, since, &self.memory)).await {
            Ok(Ok(head)) => {
                self.told.lock().expect("no holder panics").learn(&entries, head.count);
                Ok(())
            }
            Ok(Err(error)) => Err(explained("written", &error)),
            Err(_) => Err(late("written", IN_TIME)),
        };
        for one in waiting {
            // Who does not wait any more comes again.
            let _ = one.answer.send(written.clone());
        }
    }

    fn log(&self) -> Log<'_> {
        Log { store: self.store.as_ref(), anchor: &self.anchor }
    }
}

fn late(what: &str, within: Duration) -> String {
    let seconds = within.as_secs();
    format!(
        "the audit log cannot be {what}: the store and ConfigMap {} took longer than {seconds} s; what was read of a long log by then is remembered for the next attempt; docs/audit.md says what it takes",
        anchor::NAME
    )
}

fn explained(what: &str, error: &Error) -> String {
    let way_out = match error {
        Error::Broken(_) | Error::Foreign(_) => "`aether-operator audit verify` says where, docs/audit.md what to do",
        Error::TooLong(_) => return error.to_string(),
        Error::Store(_) | Error::Anchor(_) | Error::Busy => "it is tried again; docs/audit.md says what it takes",
    };
    format!("the audit log cannot be {what}: {error}; {way_out}")
}
