//! What every part of the driver shares: engine, store, caches, records, locks.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use aether_api::AetherSession;
use aether_api::liveness::Holders;
use aether_cas::{Blob, Store};
use aether_engine::Engine;
use aether_engine::freeze::{self, PodProcesses};
use aether_runtime::{CancellationToken, Stage, Tasks};
use kube::ResourceExt as _;
use tokio::sync::{OwnedMutexGuard, Semaphore, watch};

use crate::cluster::Cluster;
use crate::config::Config;
use crate::events::Events;
use crate::failure::{Failure, Result, chain};
use crate::hydration::Background;
use crate::lease;
use crate::metrics::Metrics;
use crate::moments::Moments;
use crate::records::{PublishRecord, Records, SessionRecord, Upper};

/// The driver of one node.
pub(crate) struct Driver {
    pub config: Config,
    pub engine: Engine,
    /// The cluster's store.
    pub remote: Arc<dyn Store>,
    pub cluster: Cluster,
    pub events: Events,
    pub metrics: Metrics,
    /// What this node has of sessions, by uid.
    pub sessions: Records<SessionRecord>,
    /// What pods have mounted, by target.
    pub publishes: Records<PublishRecord>,
    /// Held while a session's upper, mount, record or lease changes.
    pub session_locks: Locks,
    /// Held while a target changes.
    pub target_locks: Locks,
    /// What was seen of nodes that hold sessions which are wanted here.
    pub holders: Holders,
    /// Publishes under way, by target, so that an unpublish can end their wait.
    pub underway: Mutex<HashMap<String, CancellationToken>>,
    /// Bounds digests and uploads.
    pub workers: Semaphore,
    pub moments: Moments,
    /// The fetching of contents that sessions are mounted without.
    pub background: Background,
    /// Wakes the automatic checkpoints when a session is attached or let go here.
    pub attached: watch::Sender<u64>,
    /// Every task of the process.
    pub tasks: Tasks,
    /// Cancelled when the process begins to end: who waits stops waiting, what can be resumed later stops.
    pub stop: CancellationToken,
}

impl Driver {
    /// Opens the records and puts everything together. The caches are empty until they are followed.
    pub(crate) fn new(
        config: Config,
        engine: Engine,
        remote: Arc<dyn Store>,
        client: kube::Client,
        metrics: Metrics,
        tasks: Tasks,
    ) -> Result<Self> {
        let directory = config.state_dir.join("driver");
        Ok(Self {
            sessions: Records::open(&directory.join("sessions"))?,
            publishes: Records::open(&directory.join("publishes"))?,
            events: Events::new(client.clone(), &config.node),
            cluster: Cluster::new(client),
            workers: Semaphore::new(config.workers),
            session_locks: Locks::default(),
            target_locks: Locks::default(),
            holders: Holders::default(),
            underway: Mutex::default(),
            moments: Moments::default(),
            background: Background::default(),
            attached: watch::Sender::new(0),
            config,
            engine,
            remote,
            metrics,
            stop: tasks.token(Stage::Intake),
            tasks,
        })
    }

    /// Refuses to begin where sessions were written that no record speaks of, and there is no record at all: it was lost, and
    /// without it what was not saved would be taken for leftovers.
    ///
    /// # Errors
    /// [`Failure::Denied`] says what to do.
    pub(crate) async fn require_records(&self) -> Result<()> {
        if !self.sessions.all().is_empty() {
            return Ok(());
        }
        let written = self.engine.session_records().await?.into_iter().filter(is_written).count();
        if written == 0 {
            return Ok(());
        }
        let state = self.config.state_dir.display();
        Err(Failure::Denied(format!(
            "the records in {state}/driver/sessions are gone, but sessions ({written}) were written on this node: bring them \
             back, or, to begin without them, move {state} elsewhere and keep it until nobody misses what is in it"
        )))
    }

    /// This node's name.
    pub(crate) fn node(&self) -> &str {
        &self.config.node
    }

    /// Whether this node holds the session for writing, as its own record says.
    pub(crate) fn holds(&self, uid: &str) -> bool {
        self.sessions.get(uid).is_some_and(|record| record.upper == Upper::Dirty)
    }

    /// The mounts of a session in pods here.
    pub(crate) fn mounts_of(&self, uid: &str) -> Vec<PublishRecord> {
        self.publishes.select(|publish| publish.uid.as_deref() == Some(uid) && !publish.unpublished)
    }

    /// Whether a pod here may write the session.
    pub(crate) fn published_for_writing(&self, uid: &str) -> bool {
        self.publishes.any(|publish| publish.uid.as_deref() == Some(uid) && !publish.unpublished && !publish.read_only)
    }

    /// The pods here that may write the session. One that has no process, because it has ended or was not started yet,
    /// writes nothing and is none of them.
    pub(crate) async fn writers(&self, uid: &str) -> Result<Writers> {
        let mut writers = Writers::default();
        let mut pods = BTreeSet::new();
        for publish in self.mounts_of(uid).into_iter().filter(|publish| !publish.read_only) {
            match publish.pod.map(|pod| pod.uid).or_else(|| crate::volume::pod_uid_of_target(&publish.target)) {
                Some(pod) => _ = pods.insert(pod),
                None => writers.doubts.push(format!("which pod has {} is not known", publish.target.display())),
            }
        }
        if pods.is_empty() {
            return Ok(writers);
        }
        let root = self.config.cgroup_root.clone();
        tokio::task::spawn_blocking(move || {
            let pods: Vec<String> = pods.into_iter().collect();
            match root.map_or_else(freeze::hierarchy, Ok).and_then(|root| freeze::pod_processes(&root, &pods)) {
                Ok(found) => {
                    for processes in found {
                        match processes {
                            PodProcesses::In(cgroup) => writers.cgroups.push(cgroup),
                            PodProcesses::None => {}
                            PodProcesses::Unknown(why) => writers.doubts.push(why),
                        }
                    }
                }
                // A snapshot that says that it is not exact is better than none.
                Err(error) => writers.doubts.push(format!("the cgroups of pods cannot be read: {}", chain(&error))),
            }
            Ok(writers)
        })
        .await
        .map_err(|_| Failure::Lost("the search for cgroups"))?
    }

    /// The session that a record speaks of, if it still exists: from the cache, or from the API server when the cache
    /// does not have it.
    pub(crate) async fn session_of(&self, record: &SessionRecord) -> Result<Option<Arc<AetherSession>>> {
        let same = |session: &Arc<AetherSession>| session.uid().as_deref() == Some(&record.uid);
        match self.cluster.sessions.get(&record.namespace, &record.name).filter(same) {
            Some(session) => Ok(Some(session)),
            None => Ok(self.cluster.sessions.read(&record.namespace, &record.name).await?.filter(same)),
        }
    }

    /// The session as this node holds it: its record says that it wrote, and the API names this node under the same epoch.
    /// A cache that says otherwise may be behind, so the API server decides. Whoever acts on the answer holds the session's
    /// lock.
    pub(crate) async fn holds_now(&self, uid: &str) -> Result<Option<(Arc<AetherSession>, SessionRecord)>> {
        let Some(record) = self.sessions.get(uid).filter(|record| record.upper == Upper::Dirty) else {
            return Ok(None);
        };
        let held = |session: &Arc<AetherSession>| {
            let attachment = session.status.as_ref().and_then(|status| status.attachment.as_ref());
            session.uid().as_deref() == Some(uid) && lease::holds(attachment, &record, self.node())
        };
        let session = match self.cluster.sessions.get(&record.namespace, &record.name).filter(held) {
            Some(session) => Some(session),
            None => self.cluster.sessions.read(&record.namespace, &record.name).await?.filter(held),
        };
        Ok(session.map(|session| (session, record)))
    }

    /// Tells the control loops to look at a session, and at what waits for it, again.
    pub(crate) fn poke(&self, namespace: &str, name: &str) {
        self.cluster.sessions.poke_name(namespace, name);
    }

    /// What waits for a session to be attached here: checkpoints, restores and forks that were seen before.
    pub(crate) fn poke_dependents(&self, namespace: &str, name: &str) {
        let of = |spec_session: &str, object_namespace: Option<String>| {
            spec_session == name && object_namespace.as_deref() == Some(namespace)
        };
        for checkpoint in self.cluster.checkpoints.all() {
            if of(&checkpoint.spec.session, checkpoint.namespace())
                && checkpoint.status.as_ref().is_none_or(|status| status.durability.is_none())
            {
                self.cluster.checkpoints.poke(checkpoint.as_ref());
            }
        }
        for restore in self.cluster.restores.all() {
            if of(&restore.spec.session, restore.namespace()) && !restore.finished() {
                self.cluster.restores.poke(restore.as_ref());
            }
        }
        for fork in self.cluster.sessions.all() {
            if fork.spec.session.as_ref().is_some_and(|parent| of(parent, fork.namespace()))
                && fork.status.as_ref().is_none_or(|status| status.forked_from.is_none())
            {
                self.cluster.sessions.poke(fork.as_ref());
            }
        }
        self.attached.send_modify(|version| *version += 1);
        self.count();
    }

    /// Brings the gauges up to date.
    pub(crate) fn count(&self) {
        self.metrics.sessions.set(i64::try_from(self.sessions.all().len()).unwrap_or(i64::MAX));
        self.metrics.published.set(i64::try_from(self.publishes.all().len()).unwrap_or(i64::MAX));
    }
}

/// Whether an engine session was ever mounted for writing.
pub(crate) fn is_written(session: &aether_engine::Session) -> bool {
    session.generation > 0 && !session.deleting && !session.id.starts_with(crate::publish::VIEW)
}

/// The pods that may write a session.
#[derive(Debug, Default)]
pub(crate) struct Writers {
    /// By which they can be held still.
    pub cgroups: Vec<PathBuf>,
    /// Why there may be others, which cannot be.
    pub doubts: Vec<String>,
}

/// A tree's name as it stands in a status.
///
/// # Errors
/// [`Failure::Invalid`] names the object that says it.
pub(crate) fn parse_root(text: &str, object: &str) -> Result<Blob> {
    text.parse().map_err(|error| Failure::Invalid(format!("{object} names the tree {text:?}: {error}")))
}

/// A lock for every name that is asked for.
#[derive(Debug, Default)]
pub(crate) struct Locks {
    locks: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl Locks {
    /// Waits for the lock of `name`.
    pub(crate) async fn lock(&self, name: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            if locks.len() > 4096 {
                locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            }
            locks.entry(name.to_owned()).or_default().clone()
        };
        lock.lock_owned().await
    }
}
