//! What every reconciler is given: the client, the settings, events, and the store's pins.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aether_api::conditions::Wanted;
use kube::Client;
use kube::runtime::events::EventType;

use crate::audit::Audit;
use crate::config::Config;
use crate::events::Events;
use crate::nodes::Nodes;
use crate::objects::Object;
use crate::orphans::{self, Orphans};
use crate::pins::Pins;
use crate::signature::Keyring;

/// When to ask again for what the API server refused.
pub const REFUSED: Duration = Duration::from_secs(10);

/// What every reconciler is given.
pub struct Context {
    /// The Kubernetes API.
    pub client: Client,
    /// The operator's settings.
    pub config: Config,
    /// The store's pins.
    pub pins: Pins,
    /// Who pinned trees and is missing.
    pub orphans: Orphans,
    /// The keys of signatures.
    pub keyring: Keyring,
    /// What was seen of the nodes.
    pub nodes: Nodes,
    /// Keeps the progress of imports from being written more often than people can read.
    pub progress: Throttle,
    /// Keeps pods that the API server refuses from being asked for again at once.
    pub refused: Throttle,
    /// The audit log.
    pub audit: Arc<Audit>,
    /// What people are told.
    pub events: Events,
}

impl Context {
    /// A context for this client and these settings.
    pub fn new(client: Client, config: Config, pins: Pins, audit: Arc<Audit>) -> Self {
        Self {
            events: Events::new(&client, &config.identity),
            audit,
            progress: Throttle::new(Duration::from_secs(1)),
            refused: Throttle::new(REFUSED),
            orphans: Orphans::new(orphans::GRACE),
            keyring: Keyring::default(),
            nodes: Nodes::new(client.clone()),
            client,
            config,
            pins,
        }
    }

    /// Tells people about `object`.
    pub async fn tell<K: Object>(&self, object: &K, type_: EventType, reason: &str, message: &str) {
        self.events.tell(object, type_, reason, message).await;
    }

    /// A warning about `object`.
    pub async fn warn<K: Object>(&self, object: &K, wanted: &Wanted) {
        self.tell(object, EventType::Warning, &wanted.reason, &wanted.message).await;
    }
}

/// Says at most once per period and key that something is due. Forgetting does no harm.
pub struct Throttle {
    period: Duration,
    last: Mutex<HashMap<String, Instant>>,
}

impl Throttle {
    fn new(period: Duration) -> Self {
        Self { period, last: Mutex::default() }
    }

    /// Whether it is due for `key`; if so, it is not for the next period.
    pub fn due(&self, key: &str) -> bool {
        let mut last = self.last.lock().expect("no holder panics");
        let now = Instant::now();
        last.retain(|_, then| now.duration_since(*then) < self.period);
        if last.contains_key(key) {
            return false;
        }
        last.insert(key.into(), now);
        true
    }
}
