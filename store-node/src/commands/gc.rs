//! `gc`: collects a store, or says what that would do.

use std::{
    io::{self, BufWriter, Write},
    num::NonZeroU64,
    process::ExitCode,
};

use aether_cas::LocalStore;
use aether_proto::store::v1::{
    BlobVerdict, CollectProgress, CollectRequest, CollectResponse, blob_verdict::Verdict, collect_progress::Phase,
};
use aether_runtime::Metrics;
use anyhow::Context;
use clap::Args;
use tokio_stream::StreamExt;

use super::{NodeArgs, describe, moment};
use crate::{
    config::DataArgs,
    service::collect,
    tiered::options::trace_of_bucket,
    upkeep::{LEASE, UpkeepMetrics},
};

/// How `gc --help` shows what it is for.
pub const EXAMPLES: &str = "Examples:
  What would be deleted from a store that no node runs on, and why does each other blob stay?
    aether-store-node gc --dry-run --blobs --data-dir /var/lib/aether-store

  The same of a node that runs:
    aether-store-node gc --dry-run --blobs --address http://127.0.0.1:8980

  Delete now what nothing keeps, at most 200 blobs per second:
    aether-store-node gc --rate 200 --address http://127.0.0.1:8980";

/// Options of `gc`.
#[derive(Debug, Args)]
pub struct GcArgs {
    /// Which store.
    #[command(flatten)]
    pub data: DataArgs,
    /// Or which node.
    #[command(flatten)]
    pub node: NodeArgs,
    /// Change nothing, and say what would be deleted.
    #[arg(long)]
    pub dry_run: bool,
    /// Say of each blob why it stays, or does not.
    #[arg(long, requires = "dry_run")]
    pub blobs: bool,
    /// Blobs deleted per second at most; as fast as can be without it.
    #[arg(long, value_name = "BLOBS")]
    pub rate: Option<NonZeroU64>,
}

/// Runs it. Fails when pins that are incomplete keep everything.
///
/// # Errors
/// Those of the store, or of reaching it.
pub async fn run(args: GcArgs) -> anyhow::Result<ExitCode> {
    let request =
        CollectRequest { dry_run: args.dry_run, explain: args.blobs, rate: args.rate.map_or(0, NonZeroU64::get) };
    let done = if let Some(mut admin) = args.node.admin()? {
        let answers = admin.collect(request).await.context("the node does not collect")?;
        print(answers.into_inner()).await?
    } else {
        let (config, folder) = (args.data.store(), args.data.existing()?);
        if let Some(trace) = trace_of_bucket(&args.data.data_dir) {
            anyhow::bail!(
                "{folder} was the cache of a bucket, and its pins are there: remove {} if the bucket is gone for good",
                trace.display()
            );
        }
        let store = LocalStore::open_collected(config, LEASE).with_context(|| {
            format!("cannot open the store in {folder}; if a store node is running on it, ask that one (--address)")
        })?;
        print(collect::answer(store.into(), request, UpkeepMetrics::new(&Metrics::new()))?).await?
    };
    Ok(summary(&done, args.dry_run))
}

async fn print(
    mut answers: impl StreamExt<Item = Result<CollectResponse, tonic::Status>> + Unpin,
) -> anyhow::Result<CollectProgress> {
    let mut output = BufWriter::new(io::stdout().lock());
    let mut done = None;
    while let Some(answer) = answers.next().await {
        let answer = answer?;
        for verdict in &answer.verdicts {
            writeln!(output, "{}", reason(verdict))?;
        }
        if let Some(progress) = answer.progress {
            if progress.phase() != Phase::Done {
                output.flush()?;
                tracing::info!(
                    phase = progress.phase().as_str_name(),
                    directories = progress.directories,
                    examined = progress.examined_blobs,
                    condemned = progress.condemned_blobs,
                    deleted = progress.deleted_blobs,
                    "collecting"
                );
            }
            done = Some(progress);
        }
    }
    output.flush()?;
    done.filter(|progress| progress.phase() == Phase::Done).context("the collection did not end")
}

fn reason(verdict: &BlobVerdict) -> String {
    let why = match &verdict.verdict {
        Some(Verdict::KeptBy(root)) => format!("kept: {}", describe(Some(root))),
        Some(Verdict::LeasedUntil(until)) => format!("kept: lease until {}", moment(*until)),
        Some(Verdict::CondemnedSince(since)) => format!("deleted next: condemned since {}", moment(*since)),
        Some(Verdict::Unreachable(_)) | None => "deleted: nothing keeps it".to_owned(),
    };
    format!("{} {why}", verdict.blob)
}

fn summary(done: &CollectProgress, dry_run: bool) -> ExitCode {
    println!("{} blobs, {} bytes; {} directories followed", done.examined_blobs, done.examined_bytes, done.directories);
    println!("{} blobs, {} bytes are kept by nothing", done.condemned_blobs, done.condemned_bytes);
    if !dry_run {
        println!("{} blobs, {} bytes deleted", done.deleted_blobs, done.deleted_bytes);
    }
    if done.protected_until > 0 {
        println!(
            "nothing is collected before {}: what an older version promised is not known",
            moment(done.protected_until)
        );
    }
    for incomplete in &done.incomplete_roots {
        println!("incomplete root {}: {}", describe(incomplete.root.as_ref()), incomplete.problem);
    }
    if done.incomplete_roots.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!(
        "nothing is collected while a root is incomplete, since nobody knows what it reached: bring back what it misses, or unpin it"
    );
    ExitCode::FAILURE
}
