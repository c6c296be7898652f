//! The committer's process: one request, its result, and nothing left behind.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use aether_cas::RemoteStore;
use aether_cas::remote::RemoteConfig;
use aether_committer::cli::{Cli, Export, Target};
use aether_committer::failure::{Failure, Reason};
use aether_committer::report::{self, Done};
use aether_committer::{export, git};
use aether_runtime::{logs, signals};
use clap::Parser;

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    logs::init()?;
    let shutdown = signals::shutdown()?;
    let outcome = tokio::select! {
        outcome = carry_out(&cli) => outcome,
        // Dropping the work ends git. What was pushed by then is found by the next run.
        () = shutdown.cancelled() => Err(Failure::new(Reason::CommitFailed, "the commit was stopped before it ended; it can be done again")),
    };
    let result = report::result(&outcome);
    println!("{result}");
    report::write_result(&result, cli.result.as_deref())?;
    Ok(match outcome {
        Ok(_) => ExitCode::SUCCESS,
        Err(failure) => {
            tracing::error!("{failure}");
            ExitCode::FAILURE
        }
    })
}

async fn carry_out(cli: &Cli) -> Result<Done, Failure> {
    let begun = Instant::now();
    let address = cli.store.as_deref().ok_or_else(|| {
        Failure::new(Reason::Invalid, "--store is missing: say the store's address, such as http://127.0.0.1:8980")
    })?;
    let config = RemoteConfig { credentials: cli.credentials.clone(), ..RemoteConfig::new(address) };
    let store = RemoteStore::lazy(&config).map_err(|error| Failure::other("reach the store", error))?;
    let scratch = tempfile::Builder::new()
        .prefix("aether-commit-")
        .tempdir()
        .map_err(|error| Failure::other("make a directory for the commit", error))?;
    let done = match &cli.target {
        Target::Git(asked) => Done::Committed(git::commit(asked, scratch.path(), &store).await?),
        Target::Export(Export::Folder(asked)) => {
            Done::Exported(export::folder(asked, scratch.path(), Arc::new(store)).await?)
        }
        Target::Export(Export::S3(asked)) => Done::Exported(export::s3(asked, scratch.path(), &store).await?),
    };
    Ok(done.after(begun.elapsed()))
}
