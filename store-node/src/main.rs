//! `aether-store-node`: serves a store, or checks one.

use std::{process::ExitCode, time::Duration};

use aether_cas::LocalStore;
use aether_runtime::{Metrics, Readiness, Stage, Tasks, http, logs, signals, tasks};
use aether_store_node::{
    Guard,
    access::{Access, Reviews, Times, Tls},
    commands::{gc, integrity},
    config::{Cli, Command, FsckArgs, GuardArgs, ServeArgs},
    metrics::{self, StoreMetrics},
    serve,
    tiered::options::trace_of_bucket,
    upkeep,
};
use anyhow::Context;
use clap::Parser;
use tokio::net::TcpListener;
use tracing::{error, info};

/// How often the files of the certificate are looked at.
const FOLLOW: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    logs::init()?;
    match cli.command {
        Some(Command::Fsck(args)) => tasks::blocking("fsck", move || fsck(&args)).await,
        Some(Command::Gc(args)) => gc::run(args).await,
        Some(Command::Integrity(args)) => integrity::run(args).await,
        None => run(cli.serve).await.map(|()| ExitCode::SUCCESS),
    }
}

async fn run(args: ServeArgs) -> anyhow::Result<()> {
    let shutdown = signals::shutdown()?;
    let tasks = Tasks::new();
    let readiness = Readiness::new();
    let ready = readiness.part("store");
    let metrics = Metrics::new();
    let store_metrics = StoreMetrics::new(&metrics);

    let guard = guard(args.guard, &metrics).await?;
    if let Some(tls) = guard.tls.clone() {
        tasks.essential(Stage::Work, "certificate", |token| tls.follow(FOLLOW, token));
    }
    let routes = http::routes(readiness, metrics);
    tasks.essential(Stage::Foundation, "health and metrics", |token| http::serve(args.http, routes, token));

    let config = args.data.store();
    let folder = args.data.data_dir.display().to_string();
    // After a crash this reads the sizes of all files.
    // A cache is not collected: what is in it need not be all there is. Nor is what was one.
    let trace = trace_of_bucket(&args.data.data_dir).filter(|_| args.tier.s3_bucket.is_none());
    if let Some(trace) = &trace {
        error!(
            folder, trace = %trace.display(),
            "nothing is collected: the folder was the cache of a bucket, and its pins are there: give --s3-bucket, or remove the folder `trace` if the bucket is gone for good"
        );
    }
    let lease = (args.tier.s3_bucket.is_none() && trace.is_none()).then_some(args.upkeep.gc_lease);
    let store = tasks::blocking("open the store", move || {
        Ok(match lease {
            Some(lease) => LocalStore::open_collected(config, lease)?,
            None => LocalStore::open_cache(config)?,
        })
    })
    .await
    .with_context(|| format!("cannot open the store in {folder} (--data-dir)"))?;
    let store = args
        .tier
        .over(store, &args.data.data_dir, args.upkeep.gc_lease)
        .await
        .context("cannot open the durable tier (--s3-bucket)")?;
    store.learn().await.context("cannot learn what the bucket holds (--s3-bucket)")?;
    if lease.is_some() || store.durable().is_some() {
        if let Some(schedule) = args.upkeep.collections() {
            let (collected, counts) = (store.clone(), store_metrics.upkeep.clone());
            tasks.essential(Stage::Work, "collection", |token| upkeep::collections(collected, schedule, counts, token));
        }
        if let Some(schedule) = args.upkeep.scrubs() {
            let (scrubbed, counts) = (store.clone(), store_metrics.upkeep.clone());
            tasks.essential(Stage::Work, "scrub", |token| upkeep::scrubs(scrubbed, schedule, counts, token));
        }
    }
    let worker = store.clone();
    tasks.essential(Stage::Work, "durable tier", |token| worker.work(token));
    let (held, shown) = (store.clone(), store_metrics.clone());
    tasks.essential(Stage::Work, "statistics", |token| metrics::follow(held, shown, token));
    let listener =
        TcpListener::bind(args.listen).await.with_context(|| format!("cannot listen on {} (--listen)", args.listen))?;
    let address = listener.local_addr()?;
    info!(%address, folder, "serving the store");
    tasks.essential(Stage::Intake, "store service", |token| serve(listener, store, store_metrics, guard, token));
    ready.ready();
    tasks.run(shutdown, args.grace).await
}

async fn guard(args: GuardArgs, metrics: &Metrics) -> anyhow::Result<Guard> {
    let tls = args.tls_cert.zip(args.tls_key).map(|(certificate, key)| Tls::load(certificate, key)).transpose()?;
    let access = if args.allow.is_empty() {
        None
    } else {
        let client = kube::Client::try_default().await.context("no API server to check tokens with (--allow)")?;
        Some(Access::new(Reviews::new(client, Times::default()), args.allow, metrics))
    };
    Ok(Guard { tls, access })
}

fn fsck(args: &FsckArgs) -> anyhow::Result<ExitCode> {
    let folder = args.data.existing()?;
    let store = LocalStore::open(args.data.store()).with_context(|| {
        format!("cannot open the store in {folder}; if a store node is running on it, ask that one (StoreAdmin.Fsck)")
    })?;
    let report = store.fsck(args.repair)?;
    println!("{} blobs, {} bytes read", report.blobs, report.bytes);
    let done = if args.repair { "set aside" } else { "not repaired" };
    for blob in &report.damaged {
        println!("damaged blob {blob} ({done})");
    }
    let done = if args.repair { "dropped" } else { "not repaired" };
    for row in &report.unreadable_rows {
        println!("unreadable row {row} of the index ({done})");
    }
    let done = if args.repair { "removed" } else { "harmless" };
    for path in &report.stray_files {
        println!("stray file {} ({done})", path.display());
    }
    for incomplete in &report.incomplete_roots {
        let root = &incomplete.root;
        println!("incomplete root {} of {} {:?}: {}", root.kind, root.owner_uid, root.name, incomplete.problem);
    }
    if report.is_healthy() {
        println!("the store is healthy");
        return Ok(ExitCode::SUCCESS);
    }
    Ok(ExitCode::FAILURE)
}
