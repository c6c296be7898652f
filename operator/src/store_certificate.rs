//! Keeps the certificate by which the store serves: the store itself may write nothing in the cluster.
//!
//! Certificate, key and authority are in Secret `aether-store-tls`, of which the store mounts the first two and the kubelet
//! brings it what changes. The authority alone is in ConfigMap `aether-store-ca`, which all clients mount, and in a file
//! for this process, which could not start if it waited for a mount of what it makes. Pods wait for both until they are
//! there. They are made here and not by the chart because a chart that is rendered and applied, as GitOps does, would make
//! others each time, and would renew none between two upgrades.

use std::path::{Path, PathBuf};
use std::time::Duration;

use aether_runtime::CancellationToken;
use aether_runtime::certificate::Kept;
use anyhow::{Context, Result};
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::watch_object;
use kube::{Client, ResourceExt};
use serde_json::json;

/// The Secret of the store.
pub const SECRET: &str = "aether-store-tls";
/// The ConfigMap of its clients.
pub const AUTHORITY: &str = "aether-store-ca";
/// The key of the authority.
pub const AUTHORITY_KEY: &str = "ca.crt";

/// How soon something that failed is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// The longest that a clock is trusted to run without another look at it.
const LONGEST_SLEEP: Duration = Duration::from_secs(3600);

/// The certificate of the store.
pub struct StoreCertificate {
    kept: Kept,
    file: PathBuf,
}

impl StoreCertificate {
    /// To be kept in this namespace, made out to `names`, with the authority in `file`.
    pub fn new(client: Client, namespace: &str, names: Vec<String>, file: PathBuf) -> Self {
        let kept = Kept { client, namespace: namespace.into(), secret: SECRET.into(), component: "store", names };
        Self { kept, file }
    }

    /// Runs until `stop`.
    ///
    /// # Errors
    /// None: those are logged, and it is tried again.
    pub async fn run(self, stop: CancellationToken) -> Result<()> {
        let secrets: Api<Secret> = Api::namespaced(self.kept.client.clone(), &self.kept.namespace);
        let mut secrets = std::pin::pin!(watch_object(secrets, SECRET).default_backoff());
        let mut maps = std::pin::pin!(watch_object(self.maps(), AUTHORITY).default_backoff());
        let (mut secret, mut map) = (None, None);
        let mut sleep = LONGEST_SLEEP;
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(sleep) => {}
                Some(seen) = secrets.next() => match seen {
                    Ok(seen) => secret = Some(seen),
                    Err(error) => tracing::warn!("cannot watch Secret {SECRET}: {error}"),
                },
                Some(seen) = maps.next() => match seen {
                    Ok(seen) => map = Some(seen),
                    Err(error) => tracing::warn!("cannot watch ConfigMap {AUTHORITY}: {error}"),
                },
            }
            let (Some(secret), Some(map)) = (&secret, &map) else { continue };
            sleep = match self.look(secret.as_ref(), map.as_ref()).await {
                Ok(Some(renew_at)) => Duration::try_from(renew_at.duration_since(Timestamp::now()))
                    .unwrap_or(RETRY)
                    .clamp(RETRY, LONGEST_SLEEP),
                Ok(None) => LONGEST_SLEEP,
                Err(error) => {
                    tracing::warn!("the store's certificate: {error:#}");
                    RETRY
                }
            };
        }
    }

    /// One look at everything; when to look again for the certificate's sake. `None` while a new one is on its way.
    ///
    /// # Errors
    /// What cannot be written.
    pub async fn look(&self, secret: Option<&Secret>, map: Option<&ConfigMap>) -> Result<Option<Timestamp>> {
        let Some(certificate) = self.kept.look(secret).await? else { return Ok(None) };
        self.publish(map, &certificate.bundle).await?;
        if std::fs::read_to_string(&self.file).ok().as_deref() != Some(&certificate.bundle) {
            replace(&self.file, &certificate.bundle)
                .with_context(|| format!("cannot write {} (--store-ca)", self.file.display()))?;
        }
        Ok(Some(certificate.renew_at))
    }

    fn maps(&self) -> Api<ConfigMap> {
        Api::namespaced(self.kept.client.clone(), &self.kept.namespace)
    }

    async fn publish(&self, map: Option<&ConfigMap>, bundle: &str) -> Result<()> {
        let there = map.and_then(|map| map.data.as_ref()).and_then(|data| data.get(AUTHORITY_KEY));
        if there.is_some_and(|there| there == bundle) {
            return Ok(());
        }
        let manager = Some(aether_api::names::OPERATOR_MANAGER.to_owned());
        let written = if let Some(map) = map {
            let change = Patch::Merge(json!({"data": {AUTHORITY_KEY: bundle}}));
            let how = PatchParams { field_manager: manager, ..PatchParams::default() };
            self.maps().patch(&map.name_any(), &how, &change).await
        } else {
            let mut map = ConfigMap {
                data: Some([(AUTHORITY_KEY.to_owned(), bundle.to_owned())].into()),
                ..ConfigMap::default()
            };
            map.metadata.name = Some(AUTHORITY.into());
            map.metadata.labels =
                Some([("app.kubernetes.io/name", "aether")].map(|(key, value)| (key.into(), value.into())).into());
            self.maps().create(&PostParams { field_manager: manager, ..PostParams::default() }, &map).await
        };
        match written {
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
            written => written.map(drop).with_context(|| format!("cannot write ConfigMap {AUTHORITY}")),
        }
    }
}

/// So that nobody reads half of it.
fn replace(file: &Path, text: &str) -> std::io::Result<()> {
    let new = file.with_extension("new");
    std::fs::write(&new, text)?;
    std::fs::rename(new, file)
}
