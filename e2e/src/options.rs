//! What can be chosen when a cluster is brought up; recorded with the cluster and shown in reports.

use clap::Args;
use serde::{Deserialize, Serialize};

/// Settings of the test cluster.
#[derive(Debug, Clone, PartialEq, Eq, Args, Serialize, Deserialize)]
pub struct Options {
    /// Number of nodes.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub nodes: u8,
    /// Requests per second that the controller-manager allows itself; the burst is twice that. Kubernetes' default of 20
    /// bounds how fast claims are bound.
    #[arg(long, default_value_t = 200, value_name = "N")]
    pub controller_manager_qps: u32,
    /// Requests per second that a kubelet allows itself; the burst is twice that. The default is that of current Kubernetes.
    #[arg(long, default_value_t = 50, value_name = "N")]
    pub kubelet_qps: u32,
    /// How long a node's lease is valid; it is renewed four times as often. Short, so that tests of a lost node are.
    #[arg(long, default_value_t = 8, value_name = "SECONDS")]
    pub node_lease_seconds: u32,
    /// How long a silent node stays Ready.
    #[arg(long, default_value_t = 12, value_name = "SECONDS")]
    pub node_grace_seconds: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { nodes: 2, controller_manager_qps: 200, kubelet_qps: 50, node_lease_seconds: 8, node_grace_seconds: 12 }
    }
}
