//! `make demo`: brings the cluster up, installs Aether and plays the story, one line of result and time for each step; or plays
//! what it can of it on the cluster of the current kubeconfig, and says what it left out and why.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use aether_e2e::cluster::Cluster;
use aether_e2e::options::Options;
use aether_e2e::product;
use aether_e2e::site::Site;
use aether_e2e::site::current::{Current, Install};
use aether_e2e::story::{MORE_STEPS, STEPS, Step, Story};
use aether_e2e::testing::Test;
use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

/// Plays the story of the README on a real Kubernetes.
#[derive(Parser)]
#[command(
    after_help = "Examples:\n  make demo\n  make demo KEEP=1        leave the cluster up afterwards\n  make demo STEPS=import,session,fork\n  make demo CLUSTER=current\n  make demo CLUSTER=current REGISTRY=registry.example.org TAG=0.1.0 VALUES=my-values.yaml"
)]
struct Arguments {
    /// Leave everything as it is afterwards, and print how to use it.
    #[arg(long, env = "KEEP", value_parser = clap::builder::BoolishValueParser::new(), default_value = "false")]
    keep: bool,
    /// Play only these steps.
    #[arg(long, env = "STEPS", value_delimiter = ',')]
    steps: Vec<String>,
    /// Where the report is written; `demo/report.json` below the build folder when absent.
    #[arg(long)]
    report: Option<PathBuf>,
    /// Which cluster to play on.
    #[arg(long, env = "CLUSTER", value_enum, default_value = "own")]
    cluster: Which,
    /// On the current cluster: where to install Aether's images from when it is not installed.
    #[arg(long, env = "REGISTRY", requires = "tag")]
    registry: Option<String>,
    /// The tag of those images.
    #[arg(long, env = "TAG", requires = "registry")]
    tag: Option<String>,
    /// A file of further values of the chart for that.
    #[arg(long, env = "VALUES")]
    values: Option<PathBuf>,
    /// On the current cluster: kill parts of Aether, as the story does, also when others use it.
    #[arg(long, env = "DISRUPT", value_parser = clap::builder::BoolishValueParser::new(), default_value = "false")]
    disrupt: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Which {
    /// A two-node Kubernetes that the demo starts and ends.
    Own,
    /// The one of the current context of KUBECONFIG.
    Current,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments).await {
        Ok(report) => {
            println!("{}", report.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("\nthe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns when the process is asked to end.
async fn ended() -> Result<()> {
    let mut terminated = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => Ok(interrupted?),
        _ = terminated.recv() => Ok(()),
    }
}

/// Plays, and leaves the machine or the cluster as it was: also after a failure, and when a person presses Ctrl-C.
async fn run(arguments: &Arguments) -> Result<PathBuf> {
    let steps = chosen(&arguments.steps)?;
    let report = report_path(arguments.report.clone())?;
    let current = match arguments.cluster {
        Which::Own => None,
        Which::Current => Some(Current::connect().await?),
    };
    let played = tokio::select! {
        played = demo(arguments, current.as_ref(), &steps, &report) => played,
        signal = ended() => Err(signal.err().unwrap_or_else(|| anyhow::anyhow!("interrupted"))),
    };
    if !arguments.keep {
        let cleaned = match &current {
            Some(current) => current.clean().await.context("the demo's namespaces could not be removed"),
            None => Cluster::down().await.context("the cluster could not be removed"),
        };
        if let Err(error) = cleaned {
            if let Err(error) = &played {
                eprintln!("\nthe demo failed: {error:#}");
            }
            return Err(error);
        }
    }
    played.map(|()| report)
}

async fn demo(arguments: &Arguments, current: Option<&Current>, steps: &[&Step], report: &Path) -> Result<()> {
    let begun = Instant::now();
    let site = match current {
        Some(current) => {
            let Arguments { registry, tag, values, disrupt, .. } = arguments;
            let install = Install { registry: registry.clone(), tag: tag.clone(), values: values.clone() };
            current.prepare(&install, *disrupt).await?
        }
        None => {
            println!("Starting a two-node Kubernetes on this machine, and Aether on it");
            let cluster = Cluster::up(&Options::default(), &harness()?).await?;
            product::provide(&cluster).await?;
            Site::harness(cluster)?
        }
    };
    println!("      ready after {:.0} s\n", begun.elapsed().as_secs_f64());

    let test = Test::begin(site, "demo").await?;
    let story = Story::new(&test);
    let mut rows = Vec::new();
    let (mut failed, mut skipped) = (Vec::new(), 0);
    for step in steps {
        println!("==> {}", step.title);
        if let Some(why) = story.skips(step).await? {
            println!("    SKIPPED: {why}");
            rows.push(json!({"name": step.name, "skipped": why}));
            skipped += 1;
            continue;
        }
        let begun = Instant::now();
        let result = (step.play)(&story).await;
        let milliseconds = u64::try_from(begun.elapsed().as_millis())?;
        let mut row = json!({"name": step.name, "ok": result.is_ok(), "ms": milliseconds});
        let left_out = story.take_left_out();
        if !left_out.is_empty() {
            row["left_out"] = json!(left_out);
        }
        rows.push(row);
        match result {
            Ok(line) => println!("    {line}  [{:.1} s]", milliseconds as f64 / 1000.0),
            Err(error) => {
                println!("    FAILED: {error:#}");
                failed.push(step.name);
                let dump = report.with_file_name(format!("failed-{}.txt", step.name));
                write(&dump, &test.dump().await)?;
                println!("    objects, events and logs: {}", dump.display());
            }
        }
    }
    let ok = failed.is_empty();
    write(report, &serde_json::to_string_pretty(&json!({"ok": ok, "steps": rows, "figures": story.figures()}))?)?;
    if skipped > 0 {
        println!("\n{skipped} of {} steps were skipped; why is said above and in the report", steps.len());
    }
    if !ok {
        bail!("these steps failed: {}; the report is {}", failed.join(", "), report.display());
    }
    if arguments.keep {
        keep(&test);
    } else {
        test.end().await?;
    }
    Ok(())
}

/// Says how to go on with what stays.
fn keep(test: &Test) {
    match test.cluster() {
        Ok(cluster) => println!("\nThe cluster stays up. To use it:\n\n{}\n\nThen try:\n", cluster.environment()),
        Err(_) => println!("\nThe namespaces of the demo stay. Try:\n"),
    }
    for line in [
        "kubectl get aether -A".to_owned(),
        // Not in the namespace of the story, whose end is its last step.
        format!("kubectl aether create mine --source {}/kubernetes", test.site.platform_namespace),
        "kubectl aether fork mine second-attempt".to_owned(),
        "kubectl aether run mine -- git log --oneline".to_owned(),
        "kubectl aether get".to_owned(),
    ] {
        println!("  {line}");
    }
    match test.cluster() {
        Ok(_) => println!("\n`make cluster-down` ends it."),
        Err(_) => println!("\n`kubectl delete namespace {} {}` ends it.", test.namespace, test.site.platform_namespace),
    }
}

fn chosen(names: &[String]) -> Result<Vec<&'static Step>> {
    if names.is_empty() {
        return Ok(STEPS.iter().collect());
    }
    let mut steps = names
        .iter()
        .map(|name| {
            STEPS.iter().chain(MORE_STEPS).find(|step| step.name == name).with_context(|| {
                let known: Vec<_> = STEPS.iter().chain(MORE_STEPS).map(|step| step.name).collect();
                format!("there is no step {name}; there are {}", known.join(", "))
            })
        })
        .collect::<Result<Vec<_>>>()?;
    // Its end is that of the namespace.
    steps.sort_by_key(|step| step.name == "deletion");
    Ok(steps)
}

/// `aether-cluster` lies beside this program.
fn harness() -> Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name("aether-cluster"))
}

fn report_path(chosen: Option<PathBuf>) -> Result<PathBuf> {
    if let Some(path) = chosen {
        return Ok(path);
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    Ok(std::path::absolute(target.join("demo/report.json"))?)
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::create_dir_all(path.parent().context("a report lies in a folder")?)?;
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
