//! What the API is served under: the certificate to show, and which clients speak for users.

use std::sync::Arc;

use aether_runtime::certificate::Certificate;
use aether_runtime::tls;
use anyhow::Result;
use axum::{Extension, Router};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls_pki_types::CertificateDer;

use crate::api::Peer;
use crate::front_proxy::Trust;

/// The certificate to show and the clients to believe.
#[derive(Clone)]
pub struct Settings {
    tls: Arc<ServerConfig>,
    trust: Arc<Trust>,
}

impl Settings {
    /// Checks that the two can be served by.
    ///
    /// # Errors
    /// A certificate or authority that TLS refuses.
    pub fn new(certificate: &Certificate, trust: Trust) -> Result<Self> {
        let clients = trust.verifier(Arc::new(ring::default_provider()))?;
        Ok(Self { tls: tls::config(certificate, Some(clients))?, trust: Arc::new(trust) })
    }
}

impl tls::Settings for Settings {
    fn tls(&self) -> Arc<ServerConfig> {
        self.tls.clone()
    }

    /// Each request carries a [`Peer`]. The handshake has verified the chain; what is left to check is the name.
    fn routes(&self, router: Router, client: Option<&CertificateDer<'_>>) -> Router {
        let front_proxy = client.is_some_and(|client| self.trust.accepts(client));
        router.layer(Extension(Peer { trust: self.trust.clone(), front_proxy }))
    }
}
