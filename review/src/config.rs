//! Configuration, parsed once into typed values.

use std::net::SocketAddr;
use std::path::PathBuf;

use aether_credentials::Credentials;
use clap::Parser;

/// Serves the contents of sessions to reviewers, as group review.aether.dev of the Kubernetes API.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "aether-review",
    version,
    about,
    after_help = "The API server is the only client: it finds this program by APIService v1alpha1.review.aether.dev, proves who it is
with its front-proxy certificate, and says in headers on whose behalf it asks. Logs are set by AETHER_LOG.

Examples:
  aether-review --store https://aether-store.aether-system.svc:8980 --store-ca /var/run/aether/store/ca.crt \\
    --store-token /var/run/aether/store/token
  aether-review --store http://127.0.0.1:8980 --listen 127.0.0.1:8443 --health 127.0.0.1:8080 --namespace aether-system"
)]
pub struct Config {
    /// Where to serve the API, by TLS
    #[arg(long, env = "AETHER_LISTEN", default_value = "0.0.0.0:8443", value_name = "ADDRESS")]
    pub listen: SocketAddr,
    /// Where to serve /healthz, /readyz and /metrics, in the clear
    #[arg(long, env = "AETHER_HEALTH", default_value = "0.0.0.0:8080", value_name = "ADDRESS")]
    pub health: SocketAddr,
    /// The store that holds the contents
    #[arg(long, env = "AETHER_STORE", default_value = "http://aether-store:8980", value_name = "URL")]
    pub store: String,
    /// How to know the store, and what to show to it
    #[command(flatten)]
    pub credentials: Credentials,
    /// The namespace of this program, its Service and its Secret
    #[arg(long, env = "POD_NAMESPACE", default_value = "aether-system", value_name = "NAME")]
    pub namespace: String,
    /// The Service by which the API server reaches this program; the certificate is made out to it
    #[arg(long, env = "AETHER_SERVICE", default_value = "aether-review", value_name = "NAME")]
    pub service: String,
    /// The Secret that keeps the certificate; made when there is none
    #[arg(long, env = "AETHER_SECRET", default_value = "aether-review-tls", value_name = "NAME")]
    pub secret: String,
    /// Where contents that are too large for memory pass through; the system's folder for temporary files when absent
    #[arg(long, env = "AETHER_SPOOL", value_name = "FOLDER")]
    pub spool: Option<PathBuf>,
    /// How many diffs are sent at one time; others wait
    #[arg(long, env = "AETHER_STREAMS", default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub streams: u16,
    /// The most bytes of directory listings that one diff may read; a diff that needs more is refused
    #[arg(long, env = "AETHER_DIRECTORY_BYTES", default_value_t = 64 << 20, value_name = "BYTES")]
    pub directory_bytes: u64,
    /// How long diffs that are being sent may go on after the wish to end, in seconds
    #[arg(long, env = "AETHER_GRACE_SECONDS", default_value_t = 25, value_name = "SECONDS")]
    pub grace_seconds: u64,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_holds_together() {
        Config::command().debug_assert();
        let error = Config::try_parse_from(["aether-review", "--streams", "0"]).unwrap_err().to_string();
        assert!(error.contains("--streams"), "{error}");
    }
}
