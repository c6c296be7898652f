//! Keeps what TLS needs up to date: the Secret with the certificate, the API server's word on its front proxy, and the
//! authority in our APIService. All three are watched; nothing is written that is as it should be.

use std::fmt::Debug;
use std::time::Duration;

use aether_api::names;
use aether_runtime::CancellationToken;
use aether_runtime::readiness::Part;
use anyhow::{Context, Result, anyhow, bail};
use futures::{Stream, StreamExt};
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watch_object};
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::certificate::{Certificate, Data};
use crate::front_proxy::{self, Trust};
use crate::server::Settings;

/// Field manager of our writes.
const MANAGER: &str = "aether-review";
/// How soon something that failed is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// The longest that a clock is trusted to run without another look at it.
const LONGEST_SLEEP: Duration = Duration::from_secs(3600);

/// Keeps the settings of one server.
pub struct Keeper {
    /// The API server, as this program.
    pub client: Client,
    /// The namespace of the Secret and the Service.
    pub namespace: String,
    /// The Secret's name.
    pub secret: String,
    /// The Service's name.
    pub service: String,
    /// Where settings go.
    pub settings: watch::Sender<Option<Settings>>,
    /// Ready when the API server can reach and believe us.
    pub ready: Part,
}

/// What the watches have shown. `None` before the first look, `Some(None)` when there is no such object.
#[derive(Default)]
struct Seen {
    secret: Option<Option<Secret>>,
    front_proxy: Option<Option<ConfigMap>>,
    service: Option<Option<APIService>>,
}

/// What the settings were last made from.
#[derive(Default)]
struct Applied {
    certificate: Option<Data>,
    trust: Option<Trust>,
}

impl Keeper {
    /// Runs until `stop`.
    ///
    /// # Errors
    /// None that pass: those are logged and shown in readiness, and tried again.
    pub async fn run(self, stop: CancellationToken) -> Result<()> {
        let mut secrets =
            std::pin::pin!(states::<Secret>(Api::namespaced(self.client.clone(), &self.namespace), &self.secret));
        let config_maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), front_proxy::NAMESPACE);
        let mut config_maps = std::pin::pin!(states(config_maps, front_proxy::NAME));
        let mut services = std::pin::pin!(states::<APIService>(Api::all(self.client.clone()), &api_service()));
        let mut seen = Seen::default();
        let mut applied = Applied::default();
        let mut sleep = LONGEST_SLEEP;
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(sleep) => {}
                Some(state) = secrets.next() => take(&mut seen.secret, state, "the Secret of the certificate"),
                Some(state) = config_maps.next() => take(&mut seen.front_proxy, state, "the authentication ConfigMap"),
                Some(state) = services.next() => take(&mut seen.service, state, "the APIService"),
            }
            sleep = match self.reconcile(&seen, &mut applied).await {
                Ok(Some(renew_at)) => {
                    self.ready.ready();
                    Duration::try_from(renew_at.duration_since(Timestamp::now()))
                        .unwrap_or(RETRY)
                        .clamp(RETRY, LONGEST_SLEEP)
                }
                Ok(None) => LONGEST_SLEEP,
                Err(error) => {
                    warn!("{error:#}");
                    self.ready.not_ready(format!("{error:#}"));
                    RETRY
                }
            };
        }
    }

    /// One look at everything; when to look again for the certificate's sake. `None` while something is still unseen.
    async fn reconcile(&self, seen: &Seen, applied: &mut Applied) -> Result<Option<Timestamp>> {
        let (Some(secret), Some(front_proxy), Some(service)) = (&seen.secret, &seen.front_proxy, &seen.service) else {
            return Ok(None);
        };
        let names = self.names();
        let data = secret.as_ref().and_then(|secret| secret.data.clone()).unwrap_or_default();
        let certificate = match Certificate::read(&data, &names) {
            Ok(certificate) if certificate.renew_at > Timestamp::now() => certificate,
            stale => {
                self.renew(secret.as_ref(), &data, &names).await?;
                // The watch brings what was written, by us or by another replica; until then the old one serves.
                match stale {
                    Ok(certificate) => certificate,
                    Err(_) => return Ok(None),
                }
            }
        };
        let map = front_proxy
            .as_ref()
            .ok_or_else(|| anyhow!("ConfigMap {}/{} does not exist", front_proxy::NAMESPACE, front_proxy::NAME))?;
        let trust = Trust::of(map)?;
        if applied.certificate.as_ref() != Some(&data) || applied.trust.as_ref() != Some(&trust) {
            let settings = Settings::new(&certificate, trust.clone()).context("cannot serve by the certificate")?;
            self.settings.send_replace(Some(settings));
            info!(renew_at = %certificate.renew_at, "serving under a new certificate or to new clients");
            (applied.certificate, applied.trust) = (Some(data), Some(trust));
        }
        self.register(service.as_ref(), &certificate.bundle).await?;
        Ok(Some(certificate.renew_at))
    }

    /// The names by which the API server asks for us; it verifies the first.
    fn names(&self) -> Vec<String> {
        let base = format!("{}.{}.svc", self.service, self.namespace);
        vec![base.clone(), format!("{base}.cluster.local")]
    }

    /// Writes a new certificate, unless another replica was faster.
    async fn renew(&self, secret: Option<&Secret>, data: &Data, names: &[String]) -> Result<()> {
        let api: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let fresh = Certificate::issue(Some(data), names, Timestamp::now())?;
        let how = PostParams { field_manager: Some(MANAGER.into()), ..Default::default() };
        let written = match secret {
            None => {
                let mut secret =
                    Secret { data: Some(fresh), type_: Some("kubernetes.io/tls".into()), ..Default::default() };
                secret.metadata.name = Some(self.secret.clone());
                secret.metadata.labels = Some(
                    [("app.kubernetes.io/name", "aether"), ("app.kubernetes.io/component", "review")]
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

    /// Puts our authority into the APIService, so that the API server believes our certificate.
    async fn register(&self, service: Option<&APIService>, bundle: &str) -> Result<()> {
        let name = api_service();
        let Some(service) = service else { bail!("APIService {name} does not exist: Aether's chart makes it") };
        let wanted = ByteString(bundle.as_bytes().to_vec());
        if service.spec.as_ref().and_then(|spec| spec.ca_bundle.as_ref()) == Some(&wanted) {
            return Ok(());
        }
        let api: Api<APIService> = Api::all(self.client.clone());
        let patch = Patch::Merge(json!({"spec": {"caBundle": wanted}}));
        api.patch(&name, &PatchParams { field_manager: Some(MANAGER.into()), ..Default::default() }, &patch)
            .await
            .with_context(|| format!("cannot put the authority into APIService {name}"))?;
        info!(name, "put the authority into the APIService");
        Ok(())
    }
}

/// The APIService by which the API server finds us.
fn api_service() -> String {
    format!("{}.{}", names::VERSION, names::REVIEW_GROUP)
}

fn states<K>(api: Api<K>, name: &str) -> impl Stream<Item = Result<Option<K>, watcher::Error>> + use<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    watch_object(api, name).default_backoff()
}

fn take<K>(place: &mut Option<Option<K>>, state: Result<Option<K>, watcher::Error>, what: &str) {
    match state {
        Ok(state) => *place = Some(state),
        Err(error) => warn!("cannot watch {what}: {error}"),
    }
}
