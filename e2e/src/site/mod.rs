//! Where a test or the story is played: on the harness's own cluster, or on the one of the current kubeconfig.
//!
//! What only the harness can do (cut a node off, read the API server's audit log) is behind [`Site::cluster`], which says so
//! elsewhere.

pub mod current;

use std::collections::BTreeMap;

use aether_api::AetherSession;
use anyhow::{Context, Result};
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};

use crate::cluster::Cluster;
use crate::tools::Tools;
use crate::{images, product};

/// Where the product runs on the harness's cluster, and where it is installed when it is not there.
pub const SYSTEM_NAMESPACE: &str = "aether-system";

/// A cluster with Aether on it, and what a story needs to know of it.
#[derive(Clone)]
pub struct Site {
    /// A client with all rights.
    pub client: Client,
    /// kubectl, helm and `kubectl aether` with the same rights.
    pub tools: Tools,
    /// The names of the nodes to play on, never none; one is enough for most steps.
    pub nodes: Vec<String>,
    /// Where the product runs.
    pub system_namespace: String,
    /// Where the shared source lives, as a platform team would have it.
    pub platform_namespace: String,
    /// The image of agents' pods.
    pub tools_image: String,
    /// The URL below which the story's repository is served to everybody.
    pub git_url: String,
    /// The same for those who have a password.
    pub locked_git_url: String,
    /// Labels of namespaces that are made here, by which they are found again.
    pub labels: BTreeMap<String, String>,
    /// Whether parts of Aether may be killed although others use it.
    pub disrupt: bool,
    cluster: Option<Cluster>,
}

impl Site {
    /// On the harness's cluster.
    pub fn harness(cluster: Cluster) -> Result<Self> {
        Ok(Self {
            client: cluster.client.clone(),
            tools: Tools::new(&cluster, SYSTEM_NAMESPACE)?,
            nodes: cluster.nodes().iter().map(crate::node::Node::name).collect(),
            system_namespace: SYSTEM_NAMESPACE.to_owned(),
            platform_namespace: "platform".to_owned(),
            tools_image: images::TOOLS.to_owned(),
            git_url: product::git_url(),
            locked_git_url: product::locked_git_url(),
            labels: BTreeMap::new(),
            disrupt: true,
            cluster: Some(cluster),
        })
    }

    /// The harness's cluster; an error on another.
    pub fn cluster(&self) -> Result<&Cluster> {
        self.cluster.as_ref().context("this needs the cluster that `make cluster-up` starts")
    }

    /// Why parts of Aether must not be killed here, if so: others use them.
    pub async fn others_at_work(&self) -> Result<Option<String>> {
        if self.disrupt {
            return Ok(None);
        }
        let selector = self.labels.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(",");
        let namespaces: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(self.client.clone());
        let ours = namespaces.list(&ListParams::default().labels(&selector)).await?.items;
        let ours: Vec<String> = ours.iter().map(ResourceExt::name_any).collect();
        let sessions: Api<AetherSession> = Api::all(self.client.clone());
        let mut others = sessions.list(&ListParams::default()).await?.items;
        others.retain(|session| !ours.contains(&session.namespace().unwrap_or_default()));
        Ok(others.first().map(|one| {
            format!(
                "it stops parts of Aether, which others use: {} sessions, such as {}/{}; DISRUPT=1 plays it all the same",
                others.len(),
                one.namespace().unwrap_or_default(),
                one.name_any()
            )
        }))
    }
}
