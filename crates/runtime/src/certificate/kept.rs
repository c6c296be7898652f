//! The Secret of a certificate: written when there is none that can be used, and again before its end.

use anyhow::{Context, Result};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use kube::api::{Api, PostParams};
use tracing::info;

use super::{Certificate, Data};

/// A certificate that is kept in a Secret. Several replicas may keep the same one: the first to write wins.
pub struct Kept {
    /// The API server.
    pub client: Client,
    /// The Secret's namespace.
    pub namespace: String,
    /// The Secret's name.
    pub secret: String,
    /// The part of Aether that serves by it: names the authority and our writes, and becomes a label.
    pub component: &'static str,
    /// What the certificate is made out to: names of DNS, or addresses.
    pub names: Vec<String>,
}

impl Kept {
    /// The certificate to serve by, given the Secret as it was last seen. Writes a new one when that one is not usable or
    /// near its end; whoever watches the Secret sees what was written, by us or by another replica, and until then the
    /// old one serves. `None` when there is no usable one yet.
    ///
    /// # Errors
    /// That the Secret cannot be written.
    pub async fn look(&self, secret: Option<&Secret>) -> Result<Option<Certificate>> {
        let data = secret.and_then(|secret| secret.data.clone()).unwrap_or_default();
        match Certificate::read(&data, &self.names) {
            Ok(certificate) if certificate.renew_at > Timestamp::now() => Ok(Some(certificate)),
            stale => {
                self.renew(secret, &data).await?;
                Ok(stale.ok())
            }
        }
    }

    /// What the Secret is to hold instead of `old`.
    ///
    /// # Errors
    /// Those of the cryptography.
    pub fn issue(&self, old: Option<&Data>, now: Timestamp) -> Result<Data, super::Error> {
        Certificate::issue(old, &format!("aether-{}-ca", self.component), &self.names, now)
    }

    /// Writes a new certificate, unless another replica was faster.
    async fn renew(&self, secret: Option<&Secret>, data: &Data) -> Result<()> {
        let api: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let fresh = self.issue(Some(data), Timestamp::now())?;
        let how = PostParams { field_manager: Some(format!("aether-{}", self.component)), ..Default::default() };
        let written = match secret {
            None => {
                let mut secret =
                    Secret { data: Some(fresh), type_: Some("kubernetes.io/tls".into()), ..Default::default() };
                secret.metadata.name = Some(self.secret.clone());
                secret.metadata.labels = Some(
                    [("app.kubernetes.io/name", "aether"), ("app.kubernetes.io/component", self.component)]
                        .map(|(key, value)| (key.into(), value.into()))
                        .into(),
                );
                api.create(&how, &secret).await
            }
            // With the resourceVersion that was read, so that of two replicas one wins.
            Some(secret) => api.replace(&self.secret, &how, &Secret { data: Some(fresh), ..secret.clone() }).await,
        };
        match written {
            Ok(_) => info!(secret = self.secret, "wrote a new certificate"),
            Err(kube::Error::Api(status)) if status.is_already_exists() || status.is_conflict() => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot write Secret {}/{}", self.namespace, self.secret));
            }
        }
        Ok(())
    }
}
