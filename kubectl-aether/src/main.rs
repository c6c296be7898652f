//! `kubectl aether`: the command line of Aether. Everything it does, it does through the Kubernetes API, as whoever the
//! kubeconfig says, so that what a person may do is decided by the cluster.

mod checkpoint;
mod cli;
mod cluster;
mod completion;
mod delete;
mod describe;
mod diff;
mod get;
mod kinds;
mod lineage;
mod output;
mod parse;
mod restore;
mod review;
mod run;
mod sessions;
mod signals;
mod wait;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use cli::{Cli, Command};
use cluster::Cluster;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    // Codes that the command's own cannot be mistaken for: timeout(1) and docker use 125, git and kubectl diff 2.
    let failure = match cli.command {
        Command::Run(_) => 125,
        Command::Diff(_) => 2,
        _ => 1,
    };
    let code = match act(&cli).await {
        Ok(code) => code,
        Err(error) => match error.downcast_ref::<signals::Interrupted>() {
            Some(interrupted) => interrupted.exit_code(),
            None => {
                eprintln!("error: {error:#}");
                failure
            }
        },
    };
    ExitCode::from(code)
}

async fn act(cli: &Cli) -> Result<u8> {
    match &cli.command {
        Command::Completion(args) => return completion::script(args.shell).map(|()| 0),
        Command::Complete { words } => return completion::answer(words).await.map(|()| 0),
        _ => {}
    }
    let cluster = Cluster::connect(&cli.connection).await?;
    match &cli.command {
        Command::Create(args) => sessions::create(&cluster, args).await?,
        Command::Get(args) => get::sessions(&cluster, args).await?,
        Command::Fork(args) => sessions::fork(&cluster, args).await?,
        Command::Checkpoint(args) => checkpoint::checkpoint(&cluster, args).await?,
        Command::Checkpoints(args) => get::checkpoints(&cluster, args).await?,
        Command::Diff(args) => return diff::diff(&cluster, args).await,
        Command::Restore(args) => restore::restore(&cluster, args).await?,
        Command::Run(args) => return run::run(&cluster, args).await,
        Command::Logs(args) => run::logs(&cluster, args).await?,
        Command::Describe(args) => describe::describe(&cluster, args).await?,
        Command::Delete(args) => delete::delete(&cluster, args).await?,
        Command::Commit(args) => review::commit::commit(&cluster, args).await?,
        Command::Review(args) => review::waiting::review(&cluster, args, cli.connection.namespace.is_some()).await?,
        Command::Show(args) => review::show::show(&cluster, args).await?,
        Command::Approve(args) => review::decide::approve(&cluster, args).await?,
        Command::Reject(args) => review::decide::reject(&cluster, args).await?,
        Command::Note(args) => review::note::note(&cluster, &args.action).await?,
        Command::Log(args) => review::history::log(&cluster, args).await?,
        Command::Compare(args) => review::compare::compare(&cluster, args).await?,
        Command::Completion(_) | Command::Complete { .. } => {}
    }
    Ok(0)
}
