//! Keeps what the API server needs to ask here: a certificate for the Service, and in both webhook configurations of the chart
//! whom to believe and where to ask. Nothing is written that is as it should be.

use std::sync::Arc;
use std::time::Duration;

use aether_runtime::CancellationToken;
use aether_runtime::certificate::{Data, Kept};
use aether_runtime::readiness::Part;
use aether_runtime::tls;
use anyhow::{Context, Result, anyhow};
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration, WebhookClientConfig,
};
use k8s_openapi::api::core::v1::Secret;
use kube::api::PostParams;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::watch_object;
use kube::{Api, Client};
use rustls::ServerConfig;
use tokio::sync::watch;

use crate::objects::{self, Object};
use crate::signature::Keyring;

/// The Secret of the certificate.
pub(super) const SECRET: &str = "aether-admission-tls";
/// How soon something that failed or is not there yet is tried again, and how often the configurations are looked at.
const RETRY: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_secs(30);

/// Keeps the certificate and the configurations of one webhook.
pub struct Keeper {
    /// The Kubernetes API.
    pub client: Client,
    /// The namespace of Secret and Service.
    pub namespace: String,
    /// The Service by which the API server asks; the configurations have its name and namespace, as `NAMESPACE-NAME`.
    pub service: String,
    /// The keys, of which the address has its secret word.
    pub keyring: Keyring,
    /// Where settings go.
    pub settings: watch::Sender<Option<Arc<ServerConfig>>>,
    /// Ready when the API server can ask here.
    pub ready: Part,
}

impl Keeper {
    /// Runs until `stop`.
    ///
    /// # Errors
    /// None that pass: those are logged and shown in readiness, and tried again.
    pub async fn run(self, stop: CancellationToken) -> Result<()> {
        let secrets: Api<Secret> = objects::namespaced(&self.client, &self.namespace);
        let mut secrets = std::pin::pin!(watch_object(secrets, SECRET).default_backoff());
        let (mut secret, mut served) = (None, None);
        let mut sleep = RETRY;
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(sleep) => {}
                Some(seen) = secrets.next() => match seen {
                    Ok(seen) => secret = Some(seen),
                    Err(error) => tracing::warn!("cannot watch Secret {SECRET}: {error}"),
                },
            }
            let Some(secret) = &secret else { continue };
            sleep = match self.look(secret.as_ref(), &mut served).await {
                Ok(()) => {
                    self.ready.ready();
                    LOOK
                }
                Err(error) => {
                    tracing::warn!("the webhook: {error:#}");
                    self.ready.not_ready(format!("{error:#}"));
                    RETRY
                }
            };
        }
    }

    /// One look at everything. `served` is what the settings were last made from.
    async fn look(&self, secret: Option<&Secret>, served: &mut Option<Data>) -> Result<()> {
        let base = format!("{}.{}.svc", self.service, self.namespace);
        let kept = Kept {
            client: self.client.clone(),
            namespace: self.namespace.clone(),
            secret: SECRET.into(),
            component: "admission",
            names: vec![base.clone(), format!("{base}.cluster.local")],
        };
        let certificate = kept.look(secret).await?.ok_or_else(|| anyhow!("its certificate is being made"))?;
        let data = secret.and_then(|secret| secret.data.clone());
        if *served != data {
            self.settings.send_replace(Some(tls::config(&certificate, None).context("its certificate")?));
            tracing::info!(renew_at = %certificate.renew_at, now = %Timestamp::now(), "the webhook has a new certificate");
            *served = data;
        }
        let word = self.keyring.keys().ok_or_else(|| anyhow!("there are no keys to sign by yet"))?.word();
        let name = format!("{}-{}", self.namespace, self.service);
        self.announce::<MutatingWebhookConfiguration>(&name, |configuration| {
            let hooks = configuration.webhooks.iter_mut().flatten();
            hooks.filter_map(|hook| set(&mut hook.client_config, &certificate.bundle, "mutate", &word)).count() > 0
        })
        .await?;
        self.announce::<ValidatingWebhookConfiguration>(&name, |configuration| {
            let hooks = configuration.webhooks.iter_mut().flatten();
            hooks.filter_map(|hook| set(&mut hook.client_config, &certificate.bundle, "validate", &word)).count() > 0
        })
        .await
    }

    /// Writes the configuration if `change` changes anything; of two replicas that do, one wins.
    async fn announce<K>(&self, name: &str, change: impl FnOnce(&mut K) -> bool) -> Result<()>
    where
        K: Object + kube::Resource<Scope = k8s_openapi::ClusterResourceScope>,
    {
        let api: Api<K> = objects::cluster(&self.client);
        let what = objects::describe::<K>(None, name);
        let mut configuration =
            objects::get(&api, name).await?.ok_or_else(|| anyhow!("{what} does not exist: it is part of the chart"))?;
        if !change(&mut configuration) {
            return Ok(());
        }
        let how =
            PostParams { field_manager: Some(aether_api::names::OPERATOR_MANAGER.into()), ..PostParams::default() };
        match api.replace(name, &how, &configuration).await {
            Ok(_) => tracing::info!(what, "the API server is told where to ask and whom to believe"),
            Err(kube::Error::Api(status)) if status.is_conflict() => {}
            Err(error) => return Err(error).with_context(|| format!("cannot write {what}")),
        }
        Ok(())
    }
}

/// Whom to believe and where to ask, where that is new.
fn set(client: &mut WebhookClientConfig, bundle: &str, verb: &str, word: &str) -> Option<()> {
    let (bundle, path) = (Some(ByteString(bundle.into())), Some(format!("/{verb}/{word}")));
    let service = client.service.as_mut()?;
    if client.ca_bundle == bundle && service.path == path {
        return None;
    }
    (client.ca_bundle, service.path) = (bundle, path);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::admissionregistration::v1::{MutatingWebhook, ServiceReference, ValidatingWebhook};

    fn client_config() -> WebhookClientConfig {
        let service = ServiceReference { name: "hook".into(), namespace: "ns".into(), ..ServiceReference::default() };
        WebhookClientConfig { service: Some(service), ..WebhookClientConfig::default() }
    }

    #[tokio::test]
    async fn the_api_server_is_told_once_and_again_when_something_changes() {
        let api = aether_testkit::ApiServer::new();
        let mut mutating = MutatingWebhookConfiguration::default();
        mutating.metadata.name = Some("ns-hook".into());
        let hook = || MutatingWebhook { client_config: client_config(), ..MutatingWebhook::default() };
        mutating.webhooks = Some(vec![hook(), hook()]);
        api.put(&mutating);
        let mut validating = ValidatingWebhookConfiguration::default();
        validating.metadata.name = Some("ns-hook".into());
        validating.webhooks =
            Some(vec![ValidatingWebhook { client_config: client_config(), ..ValidatingWebhook::default() }]);
        api.put(&validating);
        let (sender, receiver) = watch::channel(None);
        let keyring = Keyring::default();
        let keeper = Keeper {
            client: api.client(),
            namespace: "ns".into(),
            service: "hook".into(),
            keyring: keyring.clone(),
            settings: sender,
            ready: aether_runtime::Readiness::new().part("webhook"),
        };
        let mut served = None;
        let secret = || api.get::<Secret>("ns", SECRET);
        assert!(keeper.look(secret().as_ref(), &mut served).await.is_err(), "the certificate is only being made");
        let said = keeper.look(secret().as_ref(), &mut served).await.unwrap_err().to_string();
        assert!(said.contains("no keys"), "{said}");
        assert!(receiver.borrow().is_some(), "it serves already");

        crate::signature::rotate(&api.client(), "ns", Timestamp::now()).await.unwrap();
        keyring.set(crate::signature::Keys::read(&api.get("ns", crate::signature::SECRET).unwrap()));
        keeper.look(secret().as_ref(), &mut served).await.unwrap();
        let word = keyring.keys().unwrap().word();
        let told: MutatingWebhookConfiguration = api.get("", "ns-hook").unwrap();
        for hook in told.webhooks.unwrap() {
            assert_eq!(hook.client_config.service.unwrap().path, Some(format!("/mutate/{word}")));
            assert_eq!(hook.client_config.ca_bundle, Some(secret().unwrap().data.unwrap()["ca.crt"].clone()));
        }
        let told: ValidatingWebhookConfiguration = api.get("", "ns-hook").unwrap();
        assert_eq!(
            told.webhooks.unwrap()[0].client_config.service.as_ref().unwrap().path,
            Some(format!("/validate/{word}"))
        );
        api.take_writes();
        keeper.look(secret().as_ref(), &mut served).await.unwrap();
        assert!(api.take_writes().is_empty());
        api.change::<ValidatingWebhookConfiguration>("", "ns-hook", |told| {
            told.webhooks.as_mut().unwrap()[0].client_config.ca_bundle = None;
        });
        keeper.look(secret().as_ref(), &mut served).await.unwrap();
        assert_eq!(api.take_writes().len(), 1);
    }
}
