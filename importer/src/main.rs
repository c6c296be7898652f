//! The importer's process: one import, its result, and nothing left behind.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use aether_cas::RemoteStore;
use aether_cas::remote::RemoteConfig;
use aether_importer::cli::{Cli, Source};
use aether_importer::failure::{Failure, Reason};
use aether_importer::git;
use aether_importer::report::{self, Imported, Reporter};
use aether_importer::{s3, scan};
use aether_runtime::{logs, signals};
use clap::Parser;

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    logs::init()?;
    let shutdown = signals::shutdown()?;
    let outcome = tokio::select! {
        outcome = import(&cli) => outcome,
        // Dropping the import ends git and removes what was cloned.
        () = shutdown.cancelled() => Err(Failure::new(Reason::ImportFailed, "the import was stopped before it ended; it can be done again")),
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

async fn import(cli: &Cli) -> Result<Imported, Failure> {
    let begun = Instant::now();
    let address = cli.store.as_deref().ok_or_else(|| {
        Failure::new(Reason::Invalid, "--store is missing: say the store's address, such as http://127.0.0.1:8980")
    })?;
    // Before anything is fetched: an import without a store is of no use.
    let config = RemoteConfig { credentials: cli.credentials.clone(), ..RemoteConfig::new(address) };
    let store = RemoteStore::lazy(&config).map_err(|error| Failure::other("reach the store", error))?;
    store.check().await.map_err(|error| Failure::other("reach the store", error))?;
    let reporter = Arc::new(Reporter::stdout());
    let scratch = tempfile::Builder::new()
        .prefix("aether-import-")
        .tempdir()
        .map_err(|error| Failure::other("make a directory for the import", error))?;
    let worktree = scratch.path().join("worktree");
    let mut imported = Imported::default();
    let stored = match &cli.source {
        Source::Git(asked) => {
            let home = scratch.path().join("home");
            std::fs::create_dir(&home).map_err(|error| Failure::other("make a home for git", error))?;
            let (commit, stored) = match git::import(asked, &worktree, &home, &store, reporter).await? {
                git::Imported::Unchanged(commit) => (commit, None),
                git::Imported::Commit(commit, stored) => (commit, Some(stored)),
            };
            imported.commit = Some(commit);
            stored
        }
        Source::S3(asked) => {
            let (listing, stored) = match s3::import(asked, scratch.path(), &store, reporter).await? {
                s3::Imported::Unchanged(listing) => (listing, None),
                s3::Imported::Tree(listing, stored) => (listing, Some(stored)),
            };
            imported.listing = Some(listing);
            stored
        }
        Source::Claim { path } => Some(scan::store(path, &store, reporter).await?),
        Source::Empty => {
            empty_directory(&worktree).map_err(|error| Failure::other("make an empty directory", error))?;
            Some(scan::store(&worktree, &store, reporter).await?)
        }
    };
    match stored {
        Some(stored) => {
            imported.root = Some(stored.root.to_string());
            imported.files = stored.counts.files;
            imported.bytes = stored.counts.bytes;
        }
        None => imported.unchanged = true,
    }
    imported.milliseconds = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(imported)
}

/// The same tree each time: an empty directory of 1970.
fn empty_directory(path: &Path) -> std::io::Result<()> {
    use rustix::fs::{AtFlags, CWD, Mode, Timespec, Timestamps};
    rustix::fs::mkdir(path, Mode::from_raw_mode(0o755))?;
    rustix::fs::chmod(path, Mode::from_raw_mode(0o755))?;
    let epoch = Timespec { tv_sec: 0, tv_nsec: 0 };
    Ok(rustix::fs::utimensat(
        CWD,
        path,
        &Timestamps { last_access: epoch, last_modification: epoch },
        AtFlags::empty(),
    )?)
}
