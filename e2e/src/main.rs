//! `aether-cluster`: a real Kubernetes on one machine, for tests and the demo.

use std::{path::PathBuf, process::ExitCode};

use aether_e2e::{cluster::Cluster, density, init, options::Options, product};
use anyhow::Result;
use clap::{Parser, Subcommand};

/// A real Kubernetes of several nodes on one machine, without a container engine.
///
/// Needs root, Debian bookworm and its package mirror. The first start builds Kubernetes from Debian's source (five minutes); later
/// ones take some seconds. Everything lies in ~/.cache/aether (or $AETHER_CACHE).
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:\n  aether-cluster up\n  eval \"$(aether-cluster env)\" && kubectl get nodes\n  aether-cluster down"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Bring the cluster up; does nothing when it is.
    Up {
        /// Settings.
        #[command(flatten)]
        options: Options,
        /// Install Aether, as `make build` has built it, with its Helm chart.
        #[arg(long)]
        install: bool,
    },
    /// End everything and leave nothing behind.
    Down,
    /// Say what runs.
    Status,
    /// Print shell lines that make kubectl and helm use the cluster.
    Env,
    /// Load images of what `make build` has built into all nodes. Running parts go on as they are; `up --install` loads and rolls.
    LoadImages {
        /// Load only the image of agents' pods.
        #[arg(long)]
        tools_only: bool,
    },
    /// Print the path of a kubeconfig for a user.
    User {
        /// The user's name.
        name: String,
        /// The user's group.
        #[arg(long)]
        group: Option<String>,
    },
    /// Do something to one node.
    Node {
        /// What to do.
        #[command(subcommand)]
        action: NodeAction,
    },
    /// In a node: make that many mounts, and take them away when the input ends.
    #[command(hide = true)]
    HoldMounts {
        /// How many.
        mounts: usize,
    },
    /// Serve the repositories of tests and the demo to the cluster.
    #[command(hide = true)]
    GitServer,
    /// Be the first process of a node's namespaces.
    #[command(hide = true)]
    NodeInit {
        /// The node's description.
        spec: PathBuf,
    },
}

#[derive(Subcommand)]
enum NodeAction {
    /// Take it off the network.
    Cut {
        /// The node.
        name: String,
    },
    /// Put it back on the network.
    Heal {
        /// The node.
        name: String,
    },
    /// End all its processes at once; its disk stays.
    Kill {
        /// The node.
        name: String,
    },
    /// Start it again with the disk it had.
    Start {
        /// The node.
        name: String,
    },
    /// Measure what its kubelet costs without and beside that many more mounts.
    Measure {
        /// The node.
        name: String,
        /// How many: sessions of one node.
        #[arg(long, default_value_t = 10_000)]
        mounts: usize,
        /// How long each time.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// Run a command inside it.
    Run {
        /// The node.
        name: String,
        /// The command.
        #[arg(required = true, trailing_var_arg = true)]
        argv: Vec<String>,
    },
}

fn main() -> ExitCode {
    match start(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(command: Command) -> Result<()> {
    // The first process of a node must not have threads: it reaps whatever ends.
    if let Command::NodeInit { spec } = &command {
        return init::run(spec);
    }
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(run(command))
}

async fn run(command: Command) -> Result<()> {
    match command {
        Command::NodeInit { .. } => unreachable!("handled before the runtime starts"),
        Command::Up { options, install } => {
            let cluster = Cluster::up(&options, &std::env::current_exe()?).await?;
            if install {
                product::provide(&cluster).await?;
            }
            println!("{}", cluster.environment());
        }
        Command::HoldMounts { mounts } => density::hold(mounts)?,
        Command::GitServer => product::serve_git().await?,
        Command::Down => Cluster::down().await?,
        Command::Status => {
            let cluster = Cluster::connect().await?;
            cluster.ready().await?;
            println!("up, all nodes Ready: {:?}", cluster.options);
        }
        Command::Env => println!("{}", Cluster::connect().await?.environment()),
        Command::LoadImages { tools_only } => {
            let cluster = Cluster::connect().await?;
            if tools_only { cluster.load_tools().await? } else { cluster.load_images().await.map(drop)? }
        }
        Command::User { name, group } => {
            println!("{}", Cluster::connect().await?.kubeconfig_for(&name, group.as_deref(), "default")?.display());
        }
        Command::Node { action } => act(action).await?,
    }
    Ok(())
}

async fn act(action: NodeAction) -> Result<()> {
    let cluster = Cluster::connect().await?;
    match action {
        NodeAction::Cut { name } => cluster.node(&name)?.network().cut().await,
        NodeAction::Heal { name } => cluster.node(&name)?.network().heal().await,
        NodeAction::Kill { name } => cluster.node(&name)?.kill().await,
        NodeAction::Start { name } => cluster.start_node(&name).await,
        NodeAction::Measure { name, mounts, seconds } => {
            let costs = density::measure(&cluster.node(&name)?, mounts, seconds).await?;
            println!("percent of a processor, over {seconds} s each    without    beside {mounts} mounts");
            for cost in costs {
                println!("{:<40} {:>9.2} {:>10.2}", cost.program, cost.before, cost.with);
            }
            Ok(())
        }
        NodeAction::Run { name, argv } => {
            let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
            let output = cluster.node(&name)?.output(&argv).await?;
            print!("{}", output.stdout);
            eprint!("{}", output.stderr);
            std::process::exit(output.code);
        }
    }
}
