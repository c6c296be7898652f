//! Which nodes there are, which of them answer, and which of them is asked for a blob.
//!
//! Placement is rendezvous hashing: each node has a score for each digest, and the best one that answers is
//! asked. So a node that comes or goes moves only what was, or becomes, its own. A node that fails is left
//! out for a time that grows with its failures, and then tried again.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, RwLock},
    time::{Duration, Instant},
};

use tokio::task::JoinHandle;
use tonic::transport::Uri;

use super::{RemoteConfig, node::NodeClient};
use crate::{Blob, Digest, StoreError, store::Result};

/// How long a node is left out after its first failure, and at most.
const FIRST_REST: Duration = Duration::from_millis(500);
const LONGEST_REST: Duration = Duration::from_secs(15);
/// How often a name is looked up again.
const LOOK_UP: Duration = Duration::from_secs(10);
/// Longest wait for an answer about a name.
const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(3);

/// One of several nodes.
pub(super) struct Node {
    pub(super) client: NodeClient,
    address: String,
    id: u64,
    health: Mutex<Health>,
}

#[derive(Default)]
struct Health {
    failures: u32,
    rests_until: Option<Instant>,
}

impl Node {
    fn new(client: NodeClient, address: String) -> Self {
        Self { client, id: word(&Digest::of(address.as_bytes())), address, health: Mutex::default() }
    }

    pub(super) fn answers(&self) -> bool {
        self.health().rests_until.is_none_or(|until| until <= Instant::now())
    }

    pub(super) fn answered(&self) {
        *self.health() = Health::default();
    }

    pub(super) fn failed(&self) {
        let mut health = self.health();
        let rest = FIRST_REST.saturating_mul(1 << health.failures.min(8)).min(LONGEST_REST);
        health.failures += 1;
        health.rests_until = Some(Instant::now() + rest);
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// How much this node is the one for a blob.
    fn score(&self, blob: &Blob) -> u64 {
        mix(word(&blob.digest) ^ self.id)
    }
}

fn word(digest: &Digest) -> u64 {
    digest.0.iter().take(8).fold(0, |word, byte| word << 8 | u64::from(*byte))
}

/// Spreads what differs little over all bits (the finalizer of SplitMix64).
fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// The node for `blob` among those that `may` be asked: the best one that answers, or the best one if none does.
pub(super) fn choose<'a>(
    nodes: &'a [Arc<Node>],
    blob: &Blob,
    may: impl Fn(usize) -> bool,
) -> Option<(usize, &'a Arc<Node>)> {
    nodes.iter().enumerate().filter(|(n, _)| may(*n)).max_by_key(|(_, node)| (node.answers(), node.score(blob)))
}

/// The nodes behind the addresses that were given.
pub(super) struct Nodes {
    config: RemoteConfig,
    now: RwLock<Arc<Vec<Arc<Node>>>>,
    /// The name to look up, when one address was given and it is a name.
    name: Option<(String, u16)>,
    look: tokio::sync::Mutex<Option<Look>>,
}

/// A question about a name.
struct Look {
    begun: Instant,
    /// Until it is taken.
    answer: Option<JoinHandle<io::Result<Vec<SocketAddr>>>>,
    /// Whether somebody has waited for it in vain.
    late: bool,
}

impl Look {
    fn begin(host: String, port: u16) -> Self {
        let ask = async move { Ok(tokio::net::lookup_host((host, port)).await?.collect()) };
        Self { begun: Instant::now(), answer: Some(tokio::spawn(ask)), late: false }
    }

    fn is_over(&self) -> bool {
        self.answer.is_none() && self.begun.elapsed() > LOOK_UP
    }
}

impl Nodes {
    pub(super) fn new(config: &RemoteConfig) -> Result<Self> {
        let uris: Vec<&str> = config.uri.split(',').map(str::trim).collect();
        let mut nodes: Vec<Arc<Node>> = Vec::new();
        for uri in &uris {
            let node = Node::new(client(config, uri, None, uris.len() > 1)?, (*uri).to_owned());
            if nodes.iter().any(|other| other.address == node.address) {
                return Err(StoreError::Invalid(format!("{uri} comes twice among the addresses of the store")));
            }
            nodes.push(Arc::new(node));
        }
        let name = match uris[..] {
            [uri] => uri.parse::<Uri>().ok().and_then(|uri| name_of(&uri)),
            _ => None,
        };
        Ok(Self {
            config: config.clone(),
            now: RwLock::new(Arc::new(nodes)),
            name,
            look: tokio::sync::Mutex::new(None),
        })
    }

    /// The nodes there are now.
    pub(super) async fn now(&self) -> Arc<Vec<Arc<Node>>> {
        if let Some((host, port)) = &self.name
            && let Ok(mut look) = self.look.try_lock()
        {
            let due = look.as_ref().is_none_or(Look::is_over);
            // A name server that kept one call waiting keeps no other, until it has answered.
            let waits = due && look.as_ref().is_none_or(|last| !last.late);
            if due {
                *look = Some(Look::begin(host.clone(), *port));
            }
            // Without an answer, what is known goes on serving.
            if let Some(look) = look.as_mut()
                && let Some(answer) = &mut look.answer
                && (waits || answer.is_finished())
            {
                match tokio::time::timeout(LOOK_UP_TIMEOUT, answer).await {
                    Ok(answered) => {
                        look.answer = None;
                        if let Ok(Ok(found)) = answered {
                            self.found(found);
                        }
                    }
                    Err(_) => look.late = true,
                }
            }
        }
        self.now.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Takes over the addresses of a name: those of several nodes, when it is the name of a headless Service.
    fn found(&self, mut addresses: Vec<SocketAddr>) {
        // A node has an address of each family.
        if addresses.iter().any(SocketAddr::is_ipv4) {
            addresses.retain(SocketAddr::is_ipv4);
        }
        addresses.sort();
        addresses.dedup();
        let several = addresses.len() > 1;
        let places: Vec<Option<SocketAddr>> = match addresses[..] {
            [] => return,
            [_] => vec![None],
            _ => addresses.into_iter().map(Some).collect(),
        };
        let named = |at: &Option<SocketAddr>| at.map_or_else(|| self.config.uri.clone(), |at| at.to_string());
        let before = self.now.read().unwrap_or_else(|e| e.into_inner()).clone();
        if before.iter().map(|node| node.address.clone()).eq(places.iter().map(named)) {
            return;
        }
        let nodes: Vec<Arc<Node>> = places
            .into_iter()
            .filter_map(|at| {
                let address = named(&at);
                match before.iter().find(|node| node.address == address) {
                    Some(node) => Some(node.clone()),
                    None => {
                        let client = client(&self.config, &self.config.uri, at, several).ok()?;
                        Some(Arc::new(Node::new(client, address)))
                    }
                }
            })
            .collect();
        tracing::debug!(store = %self.config.uri, nodes = nodes.len(), "the nodes of the store");
        *self.now.write().unwrap_or_else(|e| e.into_inner()) = Arc::new(nodes);
    }
}

fn client(config: &RemoteConfig, uri: &str, at: Option<SocketAddr>, several: bool) -> Result<NodeClient> {
    let mut config = RemoteConfig { uri: uri.to_owned(), ..config.clone() };
    if several {
        // It is not waited for: another one is asked.
        config.patience = Duration::ZERO;
    }
    NodeClient::lazy(&config, at)
}

/// The name and port of an address, if it may stand for several nodes.
fn name_of(uri: &Uri) -> Option<(String, u16)> {
    let host = uri.host()?;
    let is_name = host.trim_matches(['[', ']']).parse::<IpAddr>().is_err();
    let usual = if uri.scheme_str() == Some("https") { 443 } else { 80 };
    is_name.then(|| (host.to_owned(), uri.port_u16().unwrap_or(usual)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(uri: &str) -> Result<Nodes> {
        Nodes::new(&RemoteConfig::new(uri))
    }

    fn addresses(nodes: &Nodes) -> Vec<String> {
        addresses_of(&nodes.now.read().unwrap())
    }

    fn addresses_of(nodes: &[Arc<Node>]) -> Vec<String> {
        nodes.iter().map(|node| node.address.clone()).collect()
    }

    #[tokio::test]
    async fn each_node_has_its_share_and_one_that_fails_gives_only_its_own_away() {
        let nodes = nodes("http://a:1, http://b:1,http://c:1").unwrap();
        let nodes = nodes.now.read().unwrap().clone();
        let blobs: Vec<Blob> = (0..3000u32).map(|n| Blob::of(&n.to_le_bytes())).collect();
        let place = |blob: &Blob| choose(&nodes, blob, |_| true).unwrap().0;
        let before: Vec<usize> = blobs.iter().map(place).collect();
        for node in 0..3 {
            let share = before.iter().filter(|place| **place == node).count();
            assert!((900..1100).contains(&share), "{share}");
        }
        nodes[1].failed();
        for (blob, before) in blobs.iter().zip(&before) {
            let now = place(blob);
            assert!(now != 1 && (now == *before || *before == 1));
        }
        // When nobody answers, somebody is asked all the same.
        nodes[0].failed();
        nodes[2].failed();
        assert!(blobs.iter().zip(&before).all(|(blob, before)| place(blob) == *before));
        nodes[1].answered();
        assert!(blobs.iter().all(|blob| place(blob) == 1));
        assert_eq!(choose(&nodes, &blobs[0], |n| n == 2).unwrap().0, 2);
        assert!(choose(&nodes, &blobs[0], |_| false).is_none());
    }

    #[tokio::test]
    async fn a_name_with_several_addresses_is_several_nodes() {
        let nodes = nodes("http://store.example:8980").unwrap();
        let mut tls = RemoteConfig::new("https://store.example:8980");
        tls.credentials.authority = Some("ca.crt".into());
        let tls = Nodes::new(&tls).unwrap();
        assert!([&nodes, &tls].iter().all(|nodes| nodes.name == Some(("store.example".to_owned(), 8980))));
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        nodes.found(vec![at("10.0.0.1:8980"), at("[fd00::1]:8980")]);
        assert_eq!(addresses(&nodes), ["http://store.example:8980"], "one node, as before");
        nodes.found(vec![at("10.0.0.2:8980"), at("10.0.0.1:8980"), at("10.0.0.2:8980")]);
        assert_eq!(addresses(&nodes), ["10.0.0.1:8980", "10.0.0.2:8980"]);
        let first = nodes.now.read().unwrap()[0].clone();
        nodes.found(vec![at("10.0.0.3:8980"), at("10.0.0.1:8980")]);
        assert_eq!(addresses(&nodes), ["10.0.0.1:8980", "10.0.0.3:8980"]);
        assert!(Arc::ptr_eq(&first, &nodes.now.read().unwrap()[0]), "its connection stays");
        nodes.found(vec![]);
        assert_eq!(addresses(&nodes).len(), 2, "no answer changes nothing");
        for fixed in ["http://10.0.0.1:8980", "http://a:1,http://b:1", "http://[::1]:8980"] {
            assert_eq!(super::tests::nodes(fixed).map(|nodes| nodes.name).ok().flatten(), None, "{fixed}");
        }
    }

    #[tokio::test]
    async fn a_name_server_that_does_not_answer_delays_one_call() {
        let nodes = nodes("http://store.example:8980").unwrap();
        let look = |answer| Look { begun: Instant::now(), answer: Some(answer), late: true };
        *nodes.look.lock().await = Some(look(tokio::spawn(std::future::pending())));
        let begun = Instant::now();
        assert_eq!(addresses_of(&nodes.now().await), ["http://store.example:8980"]);
        assert!(begun.elapsed() < LOOK_UP_TIMEOUT);
        // An answer is taken when it is there.
        let found = ["10.0.0.1:8980", "10.0.0.2:8980"].map(|at| at.parse().unwrap()).to_vec();
        let answered = tokio::spawn(std::future::ready(Ok(found)));
        while !answered.is_finished() {
            tokio::task::yield_now().await;
        }
        *nodes.look.lock().await = Some(look(answered));
        assert_eq!(addresses_of(&nodes.now().await), ["10.0.0.1:8980", "10.0.0.2:8980"]);
    }

    #[tokio::test]
    async fn every_address_is_checked() {
        for bad in ["", "http://a:1,", "http://a:1,b:1", "http://a:1,http://a:1"] {
            assert!(matches!(nodes(bad), Err(StoreError::Invalid(_))), "{bad}");
        }
    }
}
