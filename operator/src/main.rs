//! The operator's process: settings, leader election, controllers, health and metrics, and an orderly end.

use std::sync::Arc;
use std::time::Duration;

use aether_operator::admission::{self, Admission, Keeper};
use aether_operator::audit::{self, Audit, ClusterAnchor};
use aether_operator::config::Config;
use aether_operator::context::Context;
use aether_operator::controllers;
use aether_operator::damage::Damage;
use aether_operator::events::Events;
use aether_operator::leader::{Candidate, Times};
use aether_operator::pins::Pins;
use aether_operator::store_certificate::StoreCertificate;
use aether_runtime::{Metrics, Readiness, Stage, Tasks, http, logs, signals, tls};
use anyhow::Context as _;
use clap::FromArgMatches;
use kube::{Api, Client};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};

/// How long reconciles that have begun may take to end.
const GRACE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = audit::command::program().get_matches();
    if let Some(("audit", arguments)) = arguments.subcommand() {
        let command = audit::command::Command::from_arg_matches(arguments)?;
        std::process::exit(command.run(&mut std::io::stdout()).await?);
    }
    let config = Config::from_arg_matches(&arguments)?;
    logs::init()?;
    let client = Client::try_default()
        .await
        .context("no cluster: neither a pod's service account nor a KUBECONFIG was found")?;
    let pins = Pins::connect(&config.store, &config.credentials)?;
    let damage = Damage::connect(&config)?;
    let (readiness, metrics) = (Readiness::new(), Metrics::new());
    let shutdown = signals::shutdown()?;
    let tasks = Tasks::new();

    let serving = http::routes(readiness.clone(), metrics.clone());
    let address = config.listen;
    tasks.essential(Stage::Foundation, "health and metrics", |token| http::serve(address, serving, token));

    let (elected, election) = oneshot::channel();
    let mut candidate =
        Candidate::new(Api::namespaced(client.clone(), &config.namespace), config.identity.clone(), Times::default());
    let api = readiness.part("kubernetes");
    let asked = client.clone();
    tasks.essential(Stage::Foundation, "leader election", |token| async move {
        // A replica that waits for its turn is ready: it serves health, and takes over when asked.
        while let Err(error) = asked.apiserver_version().await {
            api.not_ready(format!("the API server does not answer: {error}"));
            tokio::select! {
                () = token.cancelled() => return Ok(()),
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
        }
        api.ready();
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            () = candidate.acquire() => {}
        }
        let _ = elected.send(());
        tokio::select! {
            () = token.cancelled() => candidate.release().await.context("give the leader's Lease back"),
            lost = candidate.hold() => {
                // At once, because another replica may lead in a few seconds.
                tracing::error!("leadership lost: {}", lost.err().map(|error| format!("{error:#}")).unwrap_or_default());
                std::process::exit(1)
            }
        }
    });

    if let Some(file) = config.credentials.authority.clone().filter(|_| !config.store_names.is_empty()) {
        // By every replica: of several that write, one wins, and one that takes over has the authority at hand.
        let certificate = StoreCertificate::new(client.clone(), &config.namespace, config.store_names.clone(), file);
        tasks.essential(Stage::Work, "the store's certificate", |token| certificate.run(token));
    }

    let events = Events::new(&client, &config.identity);
    let pinned = Pins::connect(&config.store, &config.credentials)?;
    let anchor = ClusterAnchor::new(&client, &config.namespace, pinned, events.clone());
    let audit = Arc::new(Audit::new(audit::store(&config.store, &config.credentials)?, anchor));
    let context = Arc::new(Context::new(client.clone(), config, pins, audit.clone()));
    let (keyring, namespace) = (context.keyring.clone(), context.config.namespace.clone());
    let (seen, watched, within) = (keyring.clone(), client.clone(), namespace.clone());
    tasks.essential(Stage::Work, "the keys of signatures", |stop| seen.follow(watched, within, stop));
    if let Some(service) = context.config.admission_service.clone() {
        // By every replica too: the API server asks any of them.
        let address = context.config.admission_listen;
        let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
        let (settings, served) = watch::channel(None);
        let router = admission::router(Admission { client: client.clone(), keyring: keyring.clone(), audit, events });
        tasks.essential(Stage::Intake, "admission webhook", |stop| tls::serve(listener, served, router, stop));
        let ready = readiness.part("admission");
        let keeper = Keeper { client, namespace, service, keyring, settings, ready };
        tasks.essential(Stage::Work, "the webhook's certificate", |stop| keeper.run(stop));
    }

    tasks.essential(Stage::Work, "controllers", |token| async move {
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            elected = election => elected.context("the election ended")?,
        }
        controllers::run(context, damage, metrics, token).await
    });
    tasks.run(shutdown, GRACE).await
}
