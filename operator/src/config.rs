//! The operator's settings: parsed once, from flags or environment, into typed values.

use std::net::SocketAddr;
use std::time::Duration;

use aether_credentials::Credentials;
use clap::{Parser, ValueEnum};

/// Reconciles the sources, sessions, checkpoints, restores and commands of Aether.
#[derive(Parser, Clone, Debug)]
#[command(name = "aether-operator", version, after_help = EXAMPLES)]
pub struct Config {
    /// The namespace that holds the leader's Lease.
    #[arg(long, env = "POD_NAMESPACE", default_value = "aether-system")]
    pub namespace: String,
    /// What this replica calls itself in the Lease; the pod's name.
    #[arg(long, env = "POD_NAME", default_value = "aether-operator")]
    pub identity: String,
    /// Address of the store, such as https://aether-store.aether-system.svc:8980.
    #[arg(long, env = "AETHER_STORE")]
    pub store: String,
    /// Addresses of all nodes of the store: imports bring each content to the node for it, and all are asked what they have lost.
    /// --store when there are none.
    #[arg(long, env = "AETHER_STORE_NODES", value_delimiter = ',', value_name = "URL")]
    pub store_nodes: Vec<String>,
    /// How often they are asked, such as 5m; `off` for never.
    #[arg(long, env = "AETHER_DAMAGE_INTERVAL", default_value = "5m", value_name = "TIME", value_parser = interval)]
    pub damage_interval: Interval,
    /// How to know the store, and what to show to it. Import Jobs get the authority, and tokens of their own.
    #[command(flatten)]
    pub credentials: Credentials,
    /// What the store's certificate is made out to, a name or an address; repeat it for each. With any, this operator keeps
    /// that certificate: in Secret aether-store-tls, its authority in ConfigMap aether-store-ca, and in --store-ca for itself.
    #[arg(
        long = "store-certificate-name",
        env = "AETHER_STORE_CERTIFICATE_NAMES",
        value_delimiter = ',',
        value_name = "NAME",
        requires = "authority"
    )]
    pub store_names: Vec<String>,
    /// Image of the Jobs that import sources; its entry point is aether-importer.
    #[arg(long, env = "AETHER_IMPORTER_IMAGE")]
    pub importer_image: String,
    /// Image of the Jobs that push commits; its entry point is aether-committer. Without it no commit goes to git.
    #[arg(long, env = "AETHER_COMMITTER_IMAGE")]
    pub committer_image: Option<String>,
    /// Image that brings aether-worker into the pods of commands; its entry point is aether-worker.
    #[arg(long, env = "AETHER_WORKER_IMAGE")]
    pub worker_image: String,
    /// Image in which a command runs when it names none.
    #[arg(long, env = "AETHER_COMMAND_IMAGE")]
    pub command_image: String,
    /// When nodes pull these images.
    #[arg(long, env = "AETHER_IMAGE_PULL_POLICY", default_value = "IfNotPresent")]
    pub image_pull_policy: PullPolicy,
    /// Where health (/healthz), readiness (/readyz) and metrics (/metrics) are served.
    #[arg(long, env = "AETHER_LISTEN", default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,
    /// The Service by which the API server asks the admission webhook. Without it none is served, so that nothing is signed and
    /// no commit runs.
    #[arg(long, env = "AETHER_ADMISSION_SERVICE")]
    pub admission_service: Option<String>,
    /// Where the admission webhook is served, by TLS.
    #[arg(long, env = "AETHER_ADMISSION_LISTEN", default_value = "0.0.0.0:9443")]
    pub admission_listen: SocketAddr,
    /// How many objects of one kind are reconciled at the same time.
    #[arg(long, env = "AETHER_CONCURRENCY", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    pub concurrency: u16,
}

impl Config {
    /// The addresses of the store's nodes, or the one of the store.
    pub fn nodes(&self) -> &[String] {
        match &self.store_nodes[..] {
            [] => std::slice::from_ref(&self.store),
            nodes => nodes,
        }
    }
}

const EXAMPLES: &str = "\
Examples:
  In a cluster, as the chart runs it:
    aether-operator --store https://aether-store.aether-system.svc:8980 --store-certificate-name aether-store.aether-system.svc \\
      --store-ca /var/run/aether/authority/ca.crt --store-token /var/run/aether/store/token \\
      --importer-image aether/importer:0.1.0 --worker-image aether/worker:0.1.0 --command-image aether/tools:0.1.0

  On a machine, against the cluster of the current KUBECONFIG:
    aether-operator --namespace aether-system --identity $(hostname) --listen 127.0.0.1:8080 --store http://127.0.0.1:8980 \\
      --importer-image aether/importer:dev --worker-image aether/worker:dev --command-image aether/tools:dev";

/// A time between two looks, if there is to be a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval(pub Option<Duration>);

/// `off`, or a time as Kubernetes writes it.
fn interval(text: &str) -> Result<Interval, String> {
    if text == "off" {
        return Ok(Interval(None));
    }
    let time = text.parse::<kube::core::Duration>().ok().filter(|time| !time.is_negative()).map(Duration::from);
    match time.filter(|time| !time.is_zero()) {
        Some(time) => Ok(Interval(Some(time))),
        None => Err("a time such as 90s, 5m or 1h is expected, or off".to_owned()),
    }
}

/// When a node pulls an image, as Kubernetes names it.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PullPolicy {
    /// Each time a container starts.
    #[value(name = "Always")]
    Always,
    /// When the node has no image of that name.
    #[value(name = "IfNotPresent")]
    IfNotPresent,
    /// Never.
    #[value(name = "Never")]
    Never,
}

impl PullPolicy {
    /// The name in a pod's spec.
    pub fn name(self) -> &'static str {
        match self {
            Self::Always => "Always",
            Self::IfNotPresent => "IfNotPresent",
            Self::Never => "Never",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_value_stops_the_start_and_says_which() {
        let arguments =
            ["aether-operator", "--store", "s", "--importer-image", "i", "--worker-image", "w", "--command-image", "c"];
        let config = Config::try_parse_from(arguments).unwrap();
        assert_eq!(config.image_pull_policy.name(), "IfNotPresent");
        let error =
            Config::try_parse_from(arguments.into_iter().chain(["--listen", "nowhere"])).unwrap_err().to_string();
        assert!(error.contains("--listen") && error.contains("nowhere"), "{error}");
    }

    #[test]
    fn an_interval_is_a_time_or_off() {
        assert_eq!(interval("off"), Ok(Interval(None)));
        assert_eq!(interval("5m"), Ok(Interval(Some(Duration::from_secs(300)))));
        for bad in ["", "0s", "-5m", "5", "never"] {
            assert!(interval(bad).is_err(), "{bad}");
        }
    }
}
