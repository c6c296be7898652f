//! A store behind Bazel's Remote Execution API: a store node, several of them, or any other REAPI cache with BLAKE3.
//!
//! Small blobs travel in batches under gRPC's 4 MiB, larger ones as streams of 1 MiB pieces, so
//! memory does not grow with their size. At most [`RemoteConfig::concurrency`] calls are under way to each node;
//! no call waits longer than [`RemoteConfig::stall`] for the other side to do something; a server
//! that is restarting is tried again for some seconds, since every call may be repeated safely. Of several
//! nodes one that fails is left out at once, and what it was asked for is asked of the next one.

mod node;
mod nodes;
pub mod resource;
mod spread;
mod stream;

use std::time::Duration;

use aether_credentials::Credentials;

pub use spread::RemoteStore;

/// How to talk to a remote store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteConfig {
    /// `http://host:port`, or `https://`; of several nodes with commas between them. One name that has several
    /// addresses, such as that of a headless Service, stands for a node at each, and each shows a certificate for the name.
    pub uri: String,
    /// Whom to believe to be the store, and what to show to it.
    pub credentials: Credentials,
    /// Longest wait for an answer, or for the next piece of a stream.
    pub stall: Duration,
    /// How long a server that is not there, or that broke the connection, is tried again after it first failed; of
    /// several nodes, all of them. One that answers that it is busy is tried six times as long.
    pub patience: Duration,
    /// Calls under way at one time, to each node.
    pub concurrency: usize,
}

impl RemoteConfig {
    /// The usual settings: 30 s for an answer, 10 s for a server to come back (60 s for one that is busy), 16 calls.
    pub fn new(uri: impl Into<String>) -> Self {
        Self {
            uri: uri.into(),
            credentials: Credentials::default(),
            stall: Duration::from_secs(30),
            patience: Duration::from_secs(10),
            concurrency: 16,
        }
    }
}
