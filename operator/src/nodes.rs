//! Whether a node that the operator would wait for still lives.

use std::time::Instant;

use aether_api::AetherSession;
use aether_api::liveness::{Holders, Liveness, NODE_LEASES};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use kube::Client;

use crate::error::Result;
use crate::objects;

/// What was seen of the nodes.
pub struct Nodes {
    client: Client,
    seen: Holders,
}

impl Nodes {
    /// Has seen nothing yet.
    pub fn new(client: Client) -> Self {
        Self { client, seen: Holders::default() }
    }

    /// Why the node counts as lost; `None` while it lives, and until it was silent for long enough before our eyes.
    ///
    /// # Errors
    /// The read that failed.
    pub async fn lost(&self, name: &str) -> Result<Option<String>> {
        let node = objects::get::<Node>(&objects::cluster(&self.client), name).await?;
        let lease = objects::get::<Lease>(&objects::namespaced(&self.client, NODE_LEASES), name).await?;
        Ok(match self.seen.judge(name, node.is_some(), lease.as_ref(), Instant::now()) {
            Liveness::Alive { .. } | Liveness::Unknown => None,
            Liveness::NodeGone => Some(format!("node {name} does not exist any more")),
            Liveness::Expired => Some(format!("node {name} has not been heard of for longer than its lease lasts")),
        })
    }

    /// Why the session's holder counts as lost; `None` while it lives, and when nobody holds the session.
    ///
    /// # Errors
    /// The read that failed.
    pub async fn lost_holder(&self, session: Option<&AetherSession>) -> Result<Option<String>> {
        match session.and_then(AetherSession::holder) {
            Some(node) => self.lost(node).await,
            None => Ok(None),
        }
    }
}

/// What is in the way while a lost node holds a session, and what a person can do about it.
pub fn way_out(why: &str, session: &str) -> String {
    format!(
        "AetherSession {session} is held by a node that is lost ({why}): mount the session in a pod to take it over"
    )
}
