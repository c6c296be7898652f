//! Where the end of the log is held: in ConfigMap `aether-audit`, and for the store's collection in a pin.
//!
//! The ConfigMap says which tree the log is, how many lines it has, and the hash of the last one. It is changed only as it was
//! read, so that of two operators one wins and the other begins again. The tree is pinned first, under a name that says
//! where it ends, then the ConfigMap is moved, then what was pinned before is given up: killed anywhere, the log can be read.
//! Only pins that end where the ConfigMap does or before are given up, because whoever has pinned one of these can not move the
//! ConfigMap any more.
//!
//! A ConfigMap that is gone is written again from the pin that ends last, and an event says so: that somebody takes the end of the
//! log away must not begin another one.

use std::sync::atomic::{AtomicBool, Ordering};

use aether_audit::{Anchor, Head, Held, Refusal};
use aether_cas::Blob;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::runtime::events::EventType;
use kube::{Api, Client, ResourceExt};
use serde_json::json;

use crate::error::Result;
use crate::events::Events;
use crate::objects;
use crate::pins::{AUDIT_LOG, Pin, Pins};

/// The ConfigMap, and the owner of the pins.
pub const NAME: &str = "aether-audit";

/// The end of the log of one cluster.
pub struct ClusterAnchor {
    maps: Api<ConfigMap>,
    pins: Pins,
    events: Events,
    /// Whether there may be pins that nobody needs, of writers who were killed or slower.
    strays: AtomicBool,
}

impl ClusterAnchor {
    /// In this namespace, with the pins of the store of the log.
    pub fn new(client: &Client, namespace: &str, pins: Pins, events: Events) -> Self {
        Self { maps: objects::namespaced(client, namespace), pins, events, strays: AtomicBool::new(true) }
    }

    /// What the ConfigMap says; `None` when there is none.
    ///
    /// # Errors
    /// That it cannot be read or makes no sense, for people.
    pub async fn look(&self) -> Result<Option<Held>, String> {
        let map = objects::get(&self.maps, NAME).await.map_err(|error| error.to_string())?;
        map.map(|map| read(&map)).transpose()
    }

    /// The end that the pins know of; `None` when there are none.
    ///
    /// # Errors
    /// That they cannot be read, or that two end last.
    pub async fn pinned(&self) -> Result<Option<(Head, Blob)>, String> {
        let pinned = self.pins.of(NAME, AUDIT_LOG).await;
        let pinned =
            pinned.map_err(|status| format!("the store does not say what is pinned of it: {}", status.message()))?;
        let mut ends: Vec<(Head, Blob)> =
            pinned.iter().filter_map(|pin| Some((parse(&pin.name)?, pin.tree.parse().ok()?))).collect();
        ends.sort_by_key(|(head, _)| head.count);
        let last = ends.pop();
        match (ends.pop(), last) {
            (Some((other, other_root)), Some((head, root))) if other.count == head.count => Err(format!(
                "ConfigMap {NAME} is gone, and two logs are pinned that end last: {head} ({root}) and {other} ({other_root}). One of them never was the log; write the ConfigMap by hand, with root, lines and hash"
            )),
            (_, last) => Ok(last),
        }
    }

    /// Gives up every pin of the log that ends here by the ConfigMap's word.
    ///
    /// # Errors
    /// That it ends elsewhere, or what the store said.
    pub async fn forget(&self, end: Head) -> Result<(), String> {
        match self.look().await? {
            Some(held) if held.head == end => {}
            Some(held) => return Err(format!("ConfigMap {NAME} says that the log ends {}", held.head)),
            None => return Err(format!("there is no ConfigMap {NAME} that says so")),
        }
        self.pins.forget(NAME).await.map_err(|status| status.message().to_owned())
    }

    async fn recover(&self) -> Result<Held, String> {
        let Some((head, root)) = self.pinned().await? else { return Ok(Held::NOTHING) };
        let message = format!(
            "ConfigMap {NAME} was gone. It is written again from what is pinned in the store: {head}. Compare that with a head that was written down elsewhere (`aether-operator audit verify --expect LINES:HASH`)"
        );
        tracing::error!(lines = head.count, hash = %head.hash, "{message}");
        let made = objects::create(&self.maps, &map(head, root)).await.map_err(|error| error.to_string())?;
        match made {
            Some(made) => {
                self.events.tell(&made, EventType::Warning, "AuditLogRecovered", &message).await;
                read(&made)
            }
            None => self.look().await?.ok_or_else(|| format!("ConfigMap {NAME} comes and goes")),
        }
    }

    /// Gives up the pins that are not needed any more. One that stays does no harm.
    async fn give_up(&self, before: &Held, head: Head) {
        let unneeded = if self.strays.swap(false, Ordering::Relaxed) {
            let pinned = self.pins.of(NAME, AUDIT_LOG).await.unwrap_or_default();
            let names = pinned.into_iter().map(|pin| pin.name);
            names.filter(|name| parse(name).is_some_and(|end| end.count <= head.count && end != head)).collect()
        } else if before.root.is_some() {
            vec![name(before.head)]
        } else {
            Vec::new()
        };
        for name in unneeded {
            if let Err(status) = self.pins.forget_one(NAME, AUDIT_LOG, &name).await {
                self.strays.store(true, Ordering::Relaxed);
                tracing::info!(name, said = status.message(), "an old pin of the audit log stays for now");
            }
        }
    }
}

#[async_trait::async_trait]
impl Anchor for ClusterAnchor {
    async fn newest(&self) -> Result<Held, String> {
        match self.look().await? {
            Some(held) => Ok(held),
            None => self.recover().await,
        }
    }

    async fn hold(&self, before: &Held, head: Head, root: Blob) -> Result<(), Refusal> {
        let pin = Pin { owner: NAME.into(), kind: AUDIT_LOG, name: name(head), tree: root.to_string() };
        if let Err(status) = self.pins.hold(pin).await {
            // Its answer may be what was lost.
            self.strays.store(true, Ordering::Relaxed);
            return Err(Refusal::Failed(format!("the store did not pin it: {}", status.message())));
        }
        let mut wanted = map(head, root);
        let moved = match &before.version {
            None => objects::create(&self.maps, &wanted).await.map(|made| made.is_some()),
            Some(version) => {
                wanted.metadata.resource_version = Some(version.clone());
                match objects::merge(&self.maps, &wanted, &json!({"data": wanted.data})).await {
                    Err(error) if error.is_conflict() || error.is_not_found() => Ok(false),
                    written => written.map(|()| true),
                }
            }
        };
        match moved {
            Ok(true) => {
                self.give_up(before, head).await;
                Ok(())
            }
            Ok(false) => {
                self.strays.store(true, Ordering::Relaxed);
                Err(Refusal::Conflict)
            }
            Err(error) => {
                // What was pinned for it is needed only if it was moved, which nobody knows.
                self.strays.store(true, Ordering::Relaxed);
                Err(Refusal::Failed(error.to_string()))
            }
        }
    }
}

fn map(head: Head, root: Blob) -> ConfigMap {
    let mut map = ConfigMap { data: Some(Held::fields(head, root)), ..ConfigMap::default() };
    map.metadata.name = Some(NAME.into());
    map.metadata.labels = Some([("app.kubernetes.io/name".to_owned(), "aether".to_owned())].into());
    map
}

fn read(map: &ConfigMap) -> Result<Held, String> {
    let held = map.data.as_ref().and_then(|fields| Held::read(fields, map.resource_version()));
    held.ok_or_else(|| {
        format!(
            "ConfigMap {NAME} does not say where the log ends (root, lines, hash): write it again as it was, or delete it, and it is made from what is pinned in the store"
        )
    })
}

/// The name of the pin of a log that ends here: names are in the order of the ends.
fn name(head: Head) -> String {
    format!("{:020}-{}", head.count, head.hash)
}

fn parse(name: &str) -> Option<Head> {
    let (count, hash) = name.split_once('-')?;
    Some(Head { count: count.parse().ok()?, hash: hash.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use aether_cas::Digest;

    use super::*;

    #[test]
    fn what_is_written_is_read_and_what_makes_no_sense_is_refused() {
        let (head, root) = (Head { count: 7, hash: Digest::of(b"line") }, Blob::of(b"tree"));
        let written = map(head, root);
        assert_eq!(read(&written), Ok(Held { head, root: Some(root), version: None }));
        assert_eq!(parse(&name(head)), Some(head));
        assert!(name(head) < name(Head { count: 10, ..head }));
        for key in ["root", "lines", "hash"] {
            let mut other = written.clone();
            other.data.as_mut().unwrap().insert(key.into(), "x".into());
            assert!(read(&other).unwrap_err().contains("delete it"));
            other.data.as_mut().unwrap().remove(key);
            assert!(read(&other).is_err());
        }
    }
}
