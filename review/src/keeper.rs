//! Keeps what TLS needs up to date: the Secret with the certificate, the API server's word on its front proxy, and the
//! authority in our APIService. All three are watched; nothing is written that is as it should be.

use std::fmt::Debug;
use std::time::Duration;

use aether_api::names;
use aether_runtime::CancellationToken;
use aether_runtime::certificate::{Data, Kept};
use aether_runtime::readiness::Part;
use anyhow::{Context, Result, anyhow, bail};
use futures::{Stream, StreamExt};
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watch_object};
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::sync::watch;
use tracing::{info, warn};

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
        let data = secret.as_ref().and_then(|secret| secret.data.clone()).unwrap_or_default();
        let Some(certificate) = self.kept().look(secret.as_ref()).await? else { return Ok(None) };
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

    /// The certificate, made out to the names by which the API server asks for us; it verifies the first.
    fn kept(&self) -> Kept {
        let base = format!("{}.{}.svc", self.service, self.namespace);
        Kept {
            client: self.client.clone(),
            namespace: self.namespace.clone(),
            secret: self.secret.clone(),
            component: "review",
            names: vec![base.clone(), format!("{base}.cluster.local")],
        }
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

#[cfg(test)]
mod tests {
    use aether_runtime::readiness::Readiness;
    use aether_testkit::ApiServer;

    use super::*;

    const NAMESPACE: &str = "aether-system";
    const SECRET: &str = "aether-review-tls";

    /// A keeper, and the API server that it has looked at.
    struct World {
        api: ApiServer,
        keeper: Keeper,
        settings: watch::Receiver<Option<Settings>>,
        applied: Applied,
    }

    impl World {
        /// What a cluster with Aether's chart has at its first start.
        fn new() -> Self {
            let api = ApiServer::new();
            let (sender, settings) = watch::channel(None);
            let keeper = Keeper {
                client: api.client(),
                namespace: NAMESPACE.into(),
                secret: SECRET.into(),
                service: "aether-review".into(),
                settings: sender,
                ready: Readiness::new().part("certificate"),
            };
            let mut service = APIService::default();
            service.metadata.name = Some(api_service());
            service.spec.get_or_insert_default().group = Some(names::REVIEW_GROUP.into());
            api.put(&service);
            let world = Self { api, keeper, settings, applied: Applied::default() };
            world.trust(&world.issued());
            world
        }

        /// A certificate and its authority, as any replica would make it now.
        fn issued(&self) -> Data {
            self.keeper.kept().issue(None, Timestamp::now()).unwrap()
        }

        /// The front proxy has certificates of this authority from now on.
        fn trust(&self, authority: &Data) {
            let pem = String::from_utf8(authority["ca.crt"].0.clone()).unwrap();
            let mut map = ConfigMap::default();
            map.metadata.namespace = Some(front_proxy::NAMESPACE.into());
            map.metadata.name = Some(front_proxy::NAME.into());
            let users = "[\"X-Remote-User\"]".to_owned();
            let data = [("requestheader-client-ca-file".into(), pem), ("requestheader-username-headers".into(), users)];
            map.data = Some(data.into());
            self.api.put(&map);
        }

        fn seen(&self) -> Seen {
            Seen {
                secret: Some(self.api.get(NAMESPACE, SECRET)),
                front_proxy: Some(self.api.get(front_proxy::NAMESPACE, front_proxy::NAME)),
                service: Some(self.api.get("", &api_service())),
            }
        }

        /// One look at what is there now.
        async fn look(&mut self) -> Result<Option<Timestamp>> {
            let seen = self.seen();
            self.keeper.reconcile(&seen, &mut self.applied).await
        }

        /// The looks until everything is as it should be.
        async fn settle(&mut self) {
            self.look().await.unwrap();
            self.look().await.unwrap().expect("a certificate is there");
            self.api.take_writes();
            self.settings.mark_unchanged();
        }

        fn data(&self) -> Data {
            self.api.get::<Secret>(NAMESPACE, SECRET).and_then(|secret| secret.data).expect("the Secret has data")
        }

        fn bundle(&self) -> Option<ByteString> {
            self.api.get::<APIService>("", &api_service()).unwrap().spec.unwrap().ca_bundle
        }

        /// `METHOD plural accepted` of each write since the last call.
        fn writes(&self) -> Vec<String> {
            let told = |write: aether_testkit::Write| format!("{} {} {}", write.method, write.plural, write.accepted);
            self.api.take_writes().into_iter().map(told).collect()
        }
    }

    #[tokio::test]
    async fn a_first_start_makes_a_certificate_serves_by_it_and_then_rests() {
        let mut world = World::new();
        assert_eq!(world.keeper.reconcile(&Seen::default(), &mut world.applied).await.unwrap(), None);
        assert!(world.writes().is_empty(), "nothing is made before everything was looked at");

        assert_eq!(world.look().await.unwrap(), None, "the watch is to bring what was written");
        assert_eq!(world.writes(), ["POST secrets true"]);
        assert!(world.settings.borrow().is_none());
        let made: Secret = world.api.get(NAMESPACE, SECRET).unwrap();
        assert_eq!(made.type_.as_deref(), Some("kubernetes.io/tls"));

        let renew_at = world.look().await.unwrap().expect("a certificate is there");
        assert!(renew_at > Timestamp::now());
        assert!(world.settings.borrow_and_update().is_some());
        assert_eq!(world.writes(), ["PATCH apiservices true"]);
        assert_eq!(world.bundle().as_ref(), Some(&world.data()["ca.crt"]));
        let service: APIService = world.api.get("", &api_service()).unwrap();
        assert_eq!(service.spec.unwrap().group.as_deref(), Some(names::REVIEW_GROUP), "the rest is left alone");

        assert_eq!(world.look().await.unwrap(), Some(renew_at));
        assert!(world.writes().is_empty() && !world.settings.has_changed().unwrap());
    }

    #[tokio::test]
    async fn a_replica_that_was_faster_wins() {
        let mut world = World::new();
        let before = world.seen();
        let mut theirs = Secret { data: Some(world.issued()), ..Secret::default() };
        theirs.metadata.namespace = Some(NAMESPACE.into());
        theirs.metadata.name = Some(SECRET.into());
        world.api.put(&theirs);
        assert_eq!(world.keeper.reconcile(&before, &mut world.applied).await.unwrap(), None);
        assert_eq!(world.writes(), ["POST secrets false"]);
        assert_eq!(Some(world.data()), theirs.data);

        // The same for one that has become useless: what was read is older than what is there.
        world.api.change::<Secret>(NAMESPACE, SECRET, |secret| secret.data = None);
        let before = world.seen();
        world.api.change::<Secret>(NAMESPACE, SECRET, |secret| secret.data = theirs.data.clone());
        assert_eq!(world.keeper.reconcile(&before, &mut world.applied).await.unwrap(), None);
        assert_eq!(world.writes(), ["PUT secrets false"]);
        assert_eq!(Some(world.data()), theirs.data);
        world.look().await.unwrap().expect("theirs is as good");
        assert_eq!(world.bundle().as_ref(), Some(&world.data()["ca.crt"]));
    }

    #[tokio::test]
    async fn a_certificate_near_its_end_is_renewed_while_it_still_serves() {
        let mut world = World::new();
        world.settle().await;
        // 80 of its 90 days ago; the authority lasts for years.
        let then = Timestamp::now() - jiff::SignedDuration::from_hours(80 * 24);
        let old = world.keeper.kept().issue(Some(&world.data()), then).unwrap();
        world.api.change::<Secret>(NAMESPACE, SECRET, |secret| {
            secret.data = Some(old.clone());
            secret.metadata.annotations = Some([("kept".to_owned(), "yes".to_owned())].into());
        });
        world.look().await.unwrap();
        assert_eq!(world.writes(), ["PUT secrets true"], "the authority is believed already");
        assert!(world.settings.borrow_and_update().is_some(), "the old one serves until the new one is seen");
        let renewed = world.data();
        assert_ne!(renewed["tls.crt"], old["tls.crt"]);
        assert_eq!(renewed["ca.crt"], old["ca.crt"]);
        let secret: Secret = world.api.get(NAMESPACE, SECRET).unwrap();
        assert!(secret.metadata.annotations.is_some_and(|all| all.contains_key("kept")));
        let renew_at = world.look().await.unwrap().unwrap();
        assert!(renew_at > Timestamp::now() && world.settings.has_changed().unwrap());
    }

    #[tokio::test]
    async fn a_useless_secret_is_replaced_and_the_new_authority_announced() {
        let mut world = World::new();
        world.settle().await;
        let before = world.bundle();
        world.api.change::<Secret>(NAMESPACE, SECRET, |secret| {
            secret.data = Some([("tls.crt".to_owned(), ByteString(b"garbage".to_vec()))].into());
        });
        assert_eq!(world.look().await.unwrap(), None);
        assert_eq!(world.writes(), ["PUT secrets true"]);
        assert!(!world.settings.has_changed().unwrap(), "what served goes on serving");
        world.look().await.unwrap().unwrap();
        assert_eq!(world.writes(), ["PATCH apiservices true"]);
        assert_ne!(world.bundle(), before);
        assert_eq!(world.bundle().as_ref(), Some(&world.data()["ca.crt"]));
    }

    #[tokio::test]
    async fn a_new_front_proxy_is_believed_without_a_write() {
        let mut world = World::new();
        world.settle().await;
        world.trust(&world.issued());
        world.look().await.unwrap();
        assert!(world.settings.has_changed().unwrap());
        assert!(world.writes().is_empty());
    }

    #[tokio::test]
    async fn what_the_cluster_lacks_is_named() {
        let mut world = World::new();
        world.settle().await;
        let named = async |world: &mut World, words: &[&str]| {
            let error = format!("{:#}", world.look().await.unwrap_err());
            for word in words {
                assert!(error.contains(word), "{error}");
            }
        };
        world.api.remove::<APIService>("", &api_service());
        named(&mut world, &["APIService", &api_service(), "chart"]).await;
        world.api.change::<ConfigMap>(front_proxy::NAMESPACE, front_proxy::NAME, |map| map.data = None);
        named(&mut world, &[front_proxy::NAME, "requestheader-client-ca-file"]).await;
        world.api.remove::<ConfigMap>(front_proxy::NAMESPACE, front_proxy::NAME);
        named(&mut world, &[front_proxy::NAMESPACE, front_proxy::NAME, "does not exist"]).await;
        assert!(world.writes().is_empty() && !world.settings.has_changed().unwrap());
    }
}
