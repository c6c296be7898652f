//! `make demo`: brings the cluster up, installs Aether and plays the story, one line of result and time for each step.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use aether_e2e::cluster::Cluster;
use aether_e2e::options::Options;
use aether_e2e::product;
use aether_e2e::story::{MORE_STEPS, STEPS, Step, Story};
use aether_e2e::testing::Test;
use anyhow::{Context, Result, bail};
use clap::Parser;
use serde_json::json;

/// Plays the story of the README on a real Kubernetes.
#[derive(Parser)]
#[command(
    after_help = "Examples:\n  make demo\n  make demo KEEP=1        leave the cluster up afterwards\n  make demo STEPS=import,session,fork"
)]
struct Arguments {
    /// Leave the cluster up, and print how to use it.
    #[arg(long, env = "KEEP", value_parser = clap::builder::BoolishValueParser::new(), default_value = "false")]
    keep: bool,
    /// Play only these steps.
    #[arg(long, env = "STEPS", value_delimiter = ',')]
    steps: Vec<String>,
    /// Where the report is written; `demo/report.json` below the build folder when absent.
    #[arg(long)]
    report: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // A person who presses Ctrl-C wants the machine back as it was.
    let played = tokio::select! {
        played = demo(&arguments) => played,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    if let Err(error) = &played {
        eprintln!("\nthe demo failed: {error:#}");
    }
    if !arguments.keep
        && let Err(error) = Cluster::down().await
    {
        eprintln!("the cluster could not be removed: {error:#}");
        return ExitCode::FAILURE;
    }
    match played {
        Ok(report) => {
            println!("{}", report.display());
            ExitCode::SUCCESS
        }
        Err(_) => ExitCode::FAILURE,
    }
}

async fn demo(arguments: &Arguments) -> Result<PathBuf> {
    let chosen = chosen(&arguments.steps)?;
    let report = report_path(arguments.report.clone())?;
    let begun = Instant::now();
    println!("Starting a two-node Kubernetes on this machine, and Aether on it");
    let cluster = Cluster::up(&Options::default(), &harness()?).await?;
    product::provide(&cluster).await?;
    println!("      ready after {:.0} s\n", begun.elapsed().as_secs_f64());

    let test = Test::begin(cluster.clone(), "demo").await?;
    let story = Story::new(&test);
    let mut rows = Vec::new();
    let mut failed = Vec::new();
    for step in chosen {
        println!("==> {}", step.title);
        let begun = Instant::now();
        let result = (step.play)(&story).await;
        let milliseconds = u64::try_from(begun.elapsed().as_millis())?;
        rows.push(json!({"name": step.name, "ok": result.is_ok(), "ms": milliseconds}));
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
    write(&report, &serde_json::to_string_pretty(&json!({"ok": ok, "steps": rows, "figures": story.figures()}))?)?;
    if !ok {
        bail!("these steps failed: {}; the report is {}", failed.join(", "), report.display());
    }
    test.end().await?;
    if arguments.keep {
        println!("\nThe cluster stays up. To use it:\n\n{}\n\nThen try:\n", cluster.environment());
        for line in [
            "kubectl get aether -A",
            "kubectl apply -f docs/samples/session.yaml -f docs/samples/pod.yaml",
            "kubectl aether get",
            "kubectl aether fork fix-flaky-test second-attempt",
            "kubectl aether diff fix-flaky-test",
        ] {
            println!("  {line}");
        }
        println!("\n`make cluster-down` ends it.");
    }
    Ok(report)
}

fn chosen(names: &[String]) -> Result<Vec<&'static Step>> {
    if names.is_empty() {
        return Ok(STEPS.iter().collect());
    }
    names
        .iter()
        .map(|name| {
            STEPS.iter().chain(MORE_STEPS).find(|step| step.name == name).with_context(|| {
                let known: Vec<_> = STEPS.iter().chain(MORE_STEPS).map(|step| step.name).collect();
                format!("there is no step {name}; there are {}", known.join(", "))
            })
        })
        .collect()
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

fn write(path: &std::path::Path, text: &str) -> Result<()> {
    std::fs::create_dir_all(path.parent().context("a report lies in a folder")?)?;
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
