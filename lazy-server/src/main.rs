//! `aether-lazy`: mounts the lazy layer of a node and serves it.
//!
//! The process that is started mounts and holds the connection to the kernel; a child of it answers. When the child
//! dies, another takes over, and readers notice nothing. The parent does next to nothing, so that nothing ends it but
//! the wish that it ends: then, if sessions need the layer, what is missing on the node is fetched, and taken over by the
//! engine, as far as the time allows, and the layer is taken away.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use aether_cas::RemoteStore;
use aether_cas::lazy::Places;
use aether_cas::remote::RemoteConfig;
use aether_credentials::Credentials;
use aether_lazy::server::{self, Setup};
use aether_lazy::{Exchange, Launch, Limits, Metrics};
use aether_runtime::{CancellationToken, Readiness, http, logs, signals};
use anyhow::Context as _;
use clap::{Parser, Subcommand};

/// How often to see whether the engine has taken over what was fetched at the end.
const TAKEN_OVER: Duration = Duration::from_millis(100);
/// Beyond the deadline of a fetch, how long a reader waits for any server to answer.
const PATIENCE: Duration = Duration::from_secs(15);

/// Serves contents that are not on this node yet, as the last layer of its sessions
#[derive(Parser, Clone)]
#[command(
    name = "aether-lazy",
    version,
    after_help = "\
Examples:
  aether-lazy --store https://aether-store:8980 --store-ca /var/run/aether/store/ca.crt --store-token /var/run/aether/store/token
  aether-lazy --store http://aether-store:8980 --deadline 60   # for a slow network"
)]
struct Arguments {
    /// The driver's directory
    #[arg(long, env = "AETHER_STATE_DIR", default_value = "/var/lib/aether", global = true)]
    state_dir: PathBuf,
    /// The store
    #[arg(long, env = "AETHER_STORE", default_value = "http://aether-store:8980", global = true)]
    store: String,
    #[command(flatten)]
    credentials: Credentials,
    /// How long a reader waits for a content before it gets an I/O error, in seconds
    #[arg(long, default_value_t = 30, global = true, value_parser = clap::value_parser!(u64).range(1..=3600))]
    deadline: u64,
    /// Contents fetched at one time
    #[arg(long, default_value_t = 32, global = true, value_parser = clap::value_parser!(u16).range(1..=1024))]
    concurrency: u16,
    /// How long to go on fetching what is missing when asked to end, in seconds
    #[arg(long, default_value_t = 20, global = true)]
    grace: u64,
    /// Most bytes in a second for what is fetched with nobody waiting for it; 0 for no limit
    #[arg(long, default_value_t = 0, global = true)]
    background_bandwidth: u64,
    /// Where to serve health and metrics
    #[arg(long, global = true)]
    http: Option<SocketAddr>,
    #[command(subcommand)]
    role: Option<Role>,
}

/// What the program's own children do.
#[derive(Subcommand, Clone)]
enum Role {
    /// Answers the kernel's questions, which arrive on standard input
    #[command(hide = true)]
    Serve,
    /// Fetches what is missing on the node
    #[command(hide = true)]
    FetchRest,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    logs::init()?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start")?;
    match arguments.role {
        None => hold(&arguments, &runtime),
        Some(Role::Serve) => serve(&arguments, &runtime),
        Some(Role::FetchRest) => {
            let _inside = runtime.enter();
            let setup = setup(&arguments, &aether_runtime::Metrics::new())?;
            let rest = runtime.block_on(server::fetch_rest(setup, arguments.background_bandwidth))?;
            tracing::info!(fetched = rest.fetched, failed = rest.failed, "fetched what was missing");
            let missing = rest.fetched + rest.failed;
            match rest.reason {
                None => Ok(()),
                Some(reason) => anyhow::bail!("{} of {missing} contents could not be fetched: {reason}", rest.failed),
            }
        }
    }
}

/// The parent.
fn hold(arguments: &Arguments, runtime: &tokio::runtime::Runtime) -> anyhow::Result<()> {
    let mountpoint = Places::new(&arguments.state_dir).mountpoint();
    // A bad address is told now, not by each child.
    {
        let _inside = runtime.enter();
        RemoteStore::lazy(&remote(arguments)).context("--store")?;
    }
    let shutdown = runtime.block_on(async { signals::shutdown() }).context("cannot listen for signals")?;
    let device = aether_lazy::mount(&mountpoint)
        .with_context(|| format!("cannot mount the lazy layer at {}", mountpoint.display()))?;
    let limit = Duration::from_secs(arguments.deadline) + PATIENCE;
    let exchange = Exchange::start(device, limit, Children(arguments.clone()))
        .with_context(|| format!("cannot serve the lazy layer at {}", mountpoint.display()))?;
    tracing::info!(mountpoint = %mountpoint.display(), "serving the lazy layer");
    runtime.block_on(async {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = tokio::time::sleep(Duration::from_secs(1)) => {
                    anyhow::ensure!(!exchange.has_ended(), "somebody unmounted the lazy layer at {}", mountpoint.display());
                }
            }
        }
    })?;
    let began = Instant::now();
    let needed = Places::new(&arguments.state_dir).needed();
    if needed.exists()
        && let Err(error) = runtime.block_on(fetch_rest(arguments))
    {
        tracing::warn!(%error, "contents that are missing stay away until the layer is served again");
    }
    // Sessions look for what was fetched among the engine's objects, where only the engine puts it.
    while needed.exists() && began.elapsed() < Duration::from_secs(arguments.grace) {
        std::thread::sleep(TAKEN_OVER);
    }
    aether_lazy::detach(&mountpoint).with_context(|| format!("cannot unmount {}", mountpoint.display()))?;
    Ok(())
}

/// Runs a child that fetches what is missing, as long as the grace lasts.
async fn fetch_rest(arguments: &Arguments) -> anyhow::Result<()> {
    let mut child = tokio::process::Command::from(child(arguments, "fetch-rest")?).kill_on_drop(true).spawn()?;
    match tokio::time::timeout(Duration::from_secs(arguments.grace), child.wait()).await {
        Ok(status) => anyhow::ensure!(status?.success(), "not everything could be fetched"),
        Err(_) => anyhow::bail!("there was no time to fetch everything (--grace)"),
    }
    Ok(())
}

/// This program again, in another role. In a process group of its own: the end of a child is not asked for with Ctrl-C.
fn child(arguments: &Arguments, role: &str) -> io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(role).arg("--state-dir").arg(&arguments.state_dir).args(["--store", &arguments.store]);
    for (option, file) in
        [("--store-ca", &arguments.credentials.authority), ("--store-token", &arguments.credentials.token)]
    {
        if let Some(file) = file {
            command.arg(option).arg(file);
        }
    }
    command.args(["--deadline", &arguments.deadline.to_string()]);
    command.args(["--concurrency", &arguments.concurrency.to_string()]);
    command.args(["--background-bandwidth", &arguments.background_bandwidth.to_string()]);
    if let Some(http) = arguments.http {
        command.args(["--http", &http.to_string()]);
    }
    command.stdin(Stdio::null()).process_group(0);
    Ok(command)
}

struct Children(Arguments);

impl Launch for Children {
    fn launch(&mut self, socket: OwnedFd) -> io::Result<Box<dyn FnOnce() -> String + Send>> {
        let mut child = child(&self.0, "serve")?.stdin(Stdio::from(socket)).spawn()?;
        tracing::debug!(pid = child.id(), "a server starts");
        Ok(Box::new(move || {
            // It may have closed the socket and live on.
            let _ = child.kill();
            child.wait().map_or_else(|error| error.to_string(), |status| status.to_string())
        }))
    }
}

/// The child that answers. Ends when the parent does.
fn serve(arguments: &Arguments, runtime: &tokio::runtime::Runtime) -> anyhow::Result<()> {
    let socket = io::stdin().as_fd().try_clone_to_owned().context("cannot take over the socket")?;
    let table = aether_runtime::Metrics::new();
    let setup = {
        let _inside = runtime.enter();
        setup(arguments, &table)?
    };
    if let Some(address) = arguments.http {
        let routes = http::routes(Readiness::new(), table);
        runtime.spawn(async move {
            // Contents matter more than counts.
            if let Err(error) = http::serve(address, routes, CancellationToken::new()).await {
                tracing::warn!(error = format!("{error:#}"), "no metrics of the lazy layer");
            }
        });
    }
    server::serve(socket, setup, runtime.handle().clone()).context("cannot serve the lazy layer")
}

fn remote(arguments: &Arguments) -> RemoteConfig {
    RemoteConfig { credentials: arguments.credentials.clone(), ..RemoteConfig::new(&arguments.store) }
}

fn setup(arguments: &Arguments, table: &aether_runtime::Metrics) -> anyhow::Result<Setup> {
    let deadline = Duration::from_secs(arguments.deadline);
    let concurrency = usize::from(arguments.concurrency);
    let config = RemoteConfig {
        stall: deadline,
        patience: deadline,
        // The layer itself sees to it that large contents keep nobody waiting: no bound below its own.
        concurrency: 2 * concurrency,
        ..remote(arguments)
    };
    Ok(Setup {
        places: Places::new(&arguments.state_dir),
        store: RemoteStore::lazy(&config).context("--store")?,
        limits: Limits { deadline, concurrency, ..Limits::default() },
        metrics: Metrics::new(table),
    })
}
