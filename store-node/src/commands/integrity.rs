//! `integrity`: where the scrub is, what is lost, and which sessions and checkpoints need it.

use std::process::ExitCode;

use aether_cas::LocalStore;
use aether_proto::store::v1::{GetIntegrityRequest, Integrity, ScrubStatus};
use anyhow::Context;
use clap::Args;

use super::{NodeArgs, describe, moment};
use crate::{config::DataArgs, service::integrity};

/// How `integrity --help` shows what it is for.
pub const EXAMPLES: &str = "Examples:
  What has a node found damaged, and whom does it concern?
    aether-store-node integrity --address http://127.0.0.1:8980

  The same of a store that no node runs on, of which nothing is changed:
    aether-store-node integrity --data-dir /var/lib/aether-store

A root is named by the uid of its owner; this says which session that is:
    kubectl get aethersessions,aethercheckpoints,aethersources -A \\
      -o custom-columns=KIND:.kind,NAMESPACE:.metadata.namespace,NAME:.metadata.name,UID:.metadata.uid";

/// Options of `integrity`.
#[derive(Debug, Args)]
pub struct IntegrityArgs {
    /// Which store.
    #[command(flatten)]
    pub data: DataArgs,
    /// Or which node.
    #[command(flatten)]
    pub node: NodeArgs,
}

/// Runs it. Fails when something is lost.
///
/// # Errors
/// Those of the store, or of reaching it.
pub async fn run(args: IntegrityArgs) -> anyhow::Result<ExitCode> {
    let report = if let Some(mut admin) = args.node.admin()? {
        admin.get_integrity(GetIntegrityRequest::default()).await.context("the node does not say")?.into_inner()
    } else {
        let (config, folder) = (args.data.store(), args.data.existing()?);
        let store = LocalStore::open_read_only(config).with_context(|| format!("cannot read the store in {folder}"))?;
        integrity::report(&store.into(), 0)?
    };
    Ok(print(&report))
}

fn say(what: &str, scrub: ScrubStatus) {
    let state = if scrub.running { "running" } else { "not running" };
    println!(
        "{what}: {state}, {} of {} bytes read, {} damaged, {} healed, {} passes ended",
        scrub.bytes, scrub.total_bytes, scrub.damaged, scrub.healed, scrub.passes
    );
}

fn print(report: &Integrity) -> ExitCode {
    say("scrub", report.scrub.unwrap_or_default());
    if let Some(cache) = report.cache_scrub {
        say("scrub of the volume", cache);
    }
    for lost in &report.damaged {
        println!("lost blob {} (since {}): {}", lost.blob, moment(lost.found_at), lost.reason);
    }
    if report.more > 0 {
        println!("{} lost blobs more", report.more);
    }
    for affected in &report.affected {
        for path in &affected.paths {
            println!("affected {}: {:?} is {}", describe(affected.root.as_ref()), path.path, path.blob);
        }
        if affected.more > 0 {
            println!("affected {}: {} paths more", describe(affected.root.as_ref()), affected.more);
        }
    }
    if report.damaged.is_empty() {
        println!("nothing is lost");
        return ExitCode::SUCCESS;
    }
    println!("what is lost is there again when anybody who has it uploads it");
    ExitCode::FAILURE
}
