//! What the operator does for the store's sake: its certificate, and what lets imports in.

mod common;

use std::path::PathBuf;
use std::sync::Arc;

use aether_api::source::EmptySource;
use aether_api::{AetherSource, AetherSourceSpec};
use aether_operator::config::Config;
use aether_operator::context::Context;
use aether_operator::pins::Pins;
use aether_operator::store_certificate::{AUTHORITY, AUTHORITY_KEY, SECRET, StoreCertificate};
use aether_runtime::certificate::Certificate;
use aether_testkit::{ApiServer, Fate};
use clap::Parser;
use common::{NAMESPACE, short};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Secret, ServiceAccount};
use tempfile::TempDir;

const SYSTEM: &str = "aether-system";

struct World {
    api: ApiServer,
    folder: TempDir,
    names: Vec<String>,
}

impl World {
    fn new() -> Self {
        let names = ["aether-store.aether-system.svc", "*.aether-store.aether-system.svc", "10.96.0.80"];
        Self { api: ApiServer::new(), folder: tempfile::tempdir().unwrap(), names: names.map(Into::into).into() }
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("ca.crt")
    }

    fn secret(&self) -> Option<Secret> {
        self.api.get(SYSTEM, SECRET)
    }

    fn published(&self) -> Option<String> {
        self.api.get::<ConfigMap>(SYSTEM, AUTHORITY)?.data?.remove(AUTHORITY_KEY)
    }

    /// One look, and the writes that it took.
    async fn look(&self) -> Vec<String> {
        let certificate = StoreCertificate::new(self.api.client(), SYSTEM, self.names.clone(), self.file());
        certificate.look(self.secret().as_ref(), self.api.get(SYSTEM, AUTHORITY).as_ref()).await.unwrap();
        short(&self.api.take_writes())
    }
}

#[tokio::test]
async fn the_stores_certificate_is_made_published_and_renewed() {
    let mut world = World::new();
    assert_eq!(world.look().await, ["POST secrets"]);
    assert_eq!(world.published(), None, "nobody is told before it is seen that it was written");
    assert_eq!(world.look().await, ["POST configmaps"]);
    let secret = world.secret().unwrap();
    assert_eq!(secret.type_.as_deref(), Some("kubernetes.io/tls"));
    let certificate = Certificate::read(&secret.data.unwrap(), &world.names).unwrap();
    assert_eq!(world.published().as_ref(), Some(&certificate.bundle));
    assert_eq!(std::fs::read_to_string(world.file()).unwrap(), certificate.bundle);
    assert!(!certificate.bundle.contains("PRIVATE"));
    assert!(world.look().await.is_empty(), "nothing is written that is as it should be");

    // The store gets another address: another certificate of the same authority.
    world.names.push("10.96.0.81".into());
    assert_eq!(world.look().await, ["PUT secrets"]);
    assert!(world.look().await.is_empty());
    let renewed = Certificate::read(&world.secret().unwrap().data.unwrap(), &world.names).unwrap();
    assert_eq!(renewed.bundle, certificate.bundle);
    assert_ne!(renewed.chain, certificate.chain);

    // Somebody spoils what clients believe; and a replica starts with an empty disk.
    world.api.change::<ConfigMap>(SYSTEM, AUTHORITY, |map| map.data = None);
    std::fs::remove_file(world.file()).unwrap();
    assert_eq!(world.look().await, ["PATCH configmaps"]);
    assert_eq!(world.published().as_ref(), Some(&certificate.bundle));
    assert_eq!(std::fs::read_to_string(world.file()).unwrap(), certificate.bundle);
}

#[tokio::test]
async fn of_two_replicas_one_writes_and_both_have_the_same() {
    let world = World::new();
    let other =
        StoreCertificate::new(world.api.client(), SYSTEM, world.names.clone(), world.folder.path().join("other"));
    world.look().await;
    other.look(None, None).await.unwrap();
    let writes = world.api.take_writes();
    assert!(short(&writes) == ["POST secrets"] && !writes[0].accepted, "{writes:?}");
    world.look().await;
    other.look(world.secret().as_ref(), None).await.expect("another was faster with the ConfigMap too");
    assert_eq!(std::fs::read(world.file()).unwrap(), std::fs::read(world.folder.path().join("other")).unwrap());
}

fn operator(world: &World) -> Arc<Context> {
    let file = world.file().display().to_string();
    let arguments =
        ["aether-operator", "--store=https://store", "--importer-image=i", "--worker-image=w", "--command-image=c"];
    let credentials = ["--store-ca", &file, "--store-token", "/var/run/aether/store/token"];
    let config = Config::parse_from(arguments.into_iter().chain(credentials));
    Arc::new(Context::new(world.api.client(), config, Pins::nowhere(), common::audit(&world.api)))
}

#[tokio::test]
async fn an_import_gets_an_account_a_token_for_the_store_alone_and_its_authority() {
    let world = World::new();
    let mut source = AetherSource::new(
        "empty",
        AetherSourceSpec { empty: Some(EmptySource {}), revisions_to_keep: 3, ..Default::default() },
    );
    source.metadata.namespace = Some(NAMESPACE.into());
    world.api.put(&source);
    let context = operator(&world);
    let seen = Arc::new(world.api.get::<AetherSource>(NAMESPACE, "empty").unwrap());

    // Before there is an authority an import could not know the store.
    let error = aether_operator::source::reconcile(seen.clone(), context.clone()).await.unwrap_err().to_string();
    assert!(error.contains("--store-ca") && error.contains("authority"), "{error}");
    assert!(world.api.all::<Job>().is_empty());

    std::fs::write(world.file(), "-----BEGIN CERTIFICATE-----\n").unwrap();
    // The answer to the first write is lost: the next look finds the account there.
    let mut lost = false;
    world.api.before_writes(move |write| {
        let first = write.plural == "serviceaccounts" && !std::mem::replace(&mut lost, true);
        if first { Fate::AnswerLost } else { Fate::Answered }
    });
    aether_operator::source::reconcile(seen.clone(), context.clone()).await.unwrap_err();
    aether_operator::source::reconcile(seen, context).await.unwrap();
    let account: ServiceAccount = world.api.get(NAMESPACE, "aether-importer").unwrap();
    assert_eq!(account.automount_service_account_token, Some(false));

    let [job] = &world.api.all::<Job>()[..] else { panic!("one Job") };
    let template = &job.spec.as_ref().unwrap().template;
    let annotations = template.metadata.as_ref().unwrap().annotations.as_ref().unwrap();
    assert_eq!(annotations["aether.dev/store-ca"], "-----BEGIN CERTIFICATE-----\n");
    let pod = template.spec.as_ref().unwrap();
    assert_eq!(pod.service_account_name.as_deref(), Some("aether-importer"));
    assert_eq!(pod.automount_service_account_token, Some(false), "it has no token for the API server");
    let volume = pod.volumes.as_ref().unwrap().iter().find(|volume| volume.name == "store").unwrap();
    let sources = volume.projected.as_ref().unwrap().sources.as_ref().unwrap();
    let token = sources.iter().find_map(|source| source.service_account_token.as_ref()).unwrap();
    assert_eq!((token.audience.as_deref(), token.path.as_str()), (Some("aether-store"), "token"));
    let file = sources.iter().find_map(|source| source.downward_api.as_ref()?.items.as_ref()?.first()).unwrap();
    assert_eq!(file.field_ref.as_ref().unwrap().field_path, "metadata.annotations['aether.dev/store-ca']");
    let arguments = pod.containers[0].args.as_ref().unwrap().join(" ");
    let expected =
        "--store https://store --store-ca /var/run/aether/store/ca.crt --store-token /var/run/aether/store/token";
    assert!(arguments.ends_with(expected), "{arguments}");
    assert!(
        pod.containers[0]
            .volume_mounts
            .as_ref()
            .unwrap()
            .iter()
            .any(|mount| mount.mount_path == "/var/run/aether/store")
    );
}
