//! `aether-bench`: measures the session engine beside what a user would pick instead, on the same tree, in one run.
//!
//! [`stage`] makes the place, [`subject`] are what is compared, [`workload`] is what is done and [`cases`] in which
//! order, [`lazy`] a source that is far away, [`report`] what came out. [`density`] fills one node with sessions, and
//! [`store`] measures the store.

mod cases;
mod density;
mod lazy;
mod report;
mod stage;
mod store;
mod subject;
mod workload;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;

use crate::cases::{CASES, Plan, one_line, say};
use crate::report::{Machine, Measurements, Report};
use crate::stage::Storage;
use crate::subject::{Aether, Bare, Copies, FuseOverlay, JuiceFs, Overlay, Snapshots, Subject, Worktree};

/// Measures Aether's session engine beside what a user would pick instead. Needs root; leaves nothing behind.
#[derive(Debug, Parser)]
#[command(name = "aether-bench", version, after_help = EXAMPLES)]
struct Cli {
    /// Only these cases, separated by commas; `fork` means all that begin with it.
    #[arg(long = "case", env = "BENCH", value_delimiter = ',', value_name = "CASE")]
    cases: Vec<String>,
    /// Only these subjects, separated by commas.
    #[arg(long = "subject", env = "SUBJECTS", value_delimiter = ',', value_name = "SUBJECT")]
    subjects: Vec<String>,
    /// Counted rounds; one more warms up.
    #[arg(long, env = "ROUNDS", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Seconds of measured time after which a subject takes part in no further round of a case.
    #[arg(long, env = "PATIENCE", default_value_t = 10, value_name = "SECONDS")]
    patience: u64,
    /// The git repository that is the source.
    #[arg(long, env = "AETHER_BENCH_REPOSITORY", value_name = "FOLDER")]
    repository: Option<PathBuf>,
    /// What `e2e/third-party/bench-peers.sh` printed.
    #[arg(long, env = "AETHER_BENCH_PEERS", value_name = "FOLDER")]
    peers: Option<PathBuf>,
    /// The directory under which the run keeps its file systems until it ends.
    #[arg(long, env = "AETHER_CACHE", value_name = "FOLDER")]
    cache: Option<PathBuf>,
    /// Where the reports are written.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Fill one node with sessions instead, and measure what each costs.
    #[arg(long)]
    density: bool,
    /// Sessions of a density run.
    #[arg(long, default_value_t = 10_000, value_name = "COUNT", requires = "density")]
    sessions: usize,
    /// Measure the store and its imports instead.
    #[arg(long, conflicts_with = "density")]
    store: bool,
    /// Measure nothing: write the tables of the last reports into this document, between its markers.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "docs/benchmarks.md")]
    markdown: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  make bench                                everything, with the peers installed
  make bench BENCH=create,fork              some cases
  make bench SUBJECTS=aether,overlay-by-hand BENCH=untar ROUNDS=15
  make bench-density                        10,000 sessions on one node
  make bench-store                          the store and its imports
  aether-bench --markdown                   the tables of the last runs into docs/benchmarks.md";

const SUBJECTS: &[&str] = &[
    "aether",
    "bare-calls",
    "copy",
    "git-worktree",
    "overlay-by-hand",
    "overlay-by-hand-btrfs",
    "xfs-reflink",
    "btrfs-snapshot",
    "fuse-overlayfs",
    "juicefs",
];

/// GiB of the file systems, and the subjects that lie on each. The first also holds the store.
const STORAGES: [(&str, u64, &[&str]); 3] = [
    ("ext4", 8, &["copy", "git-worktree", "overlay-by-hand", "fuse-overlayfs", "juicefs"]),
    ("xfs", 3, &["xfs-reflink"]),
    ("btrfs", 4, &["overlay-by-hand-btrfs", "btrfs-snapshot"]),
];
const POOL: u64 = 4;
const NO_PEERS: &str = "AETHER_BENCH_PEERS is not set; `make bench` sets it";

/// Which file systems a run needs.
fn storages(subjects: &[&str]) -> Vec<(&'static str, u64)> {
    let needed =
        STORAGES.iter().filter(|(kind, _, on)| *kind == "ext4" || on.iter().any(|name| subjects.contains(name)));
    needed.map(|(kind, gib, _)| (*kind, *gib)).collect()
}

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let out = match &cli.out {
        Some(out) => out.clone(),
        None => std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from).join("bench"),
    };
    if let Some(document) = &cli.markdown {
        return markdown(document, &out).map(|()| ExitCode::SUCCESS);
    }
    let cache = match &cli.cache {
        Some(cache) => cache.clone(),
        None => PathBuf::from(std::env::var_os("HOME").context("set AETHER_CACHE or HOME")?).join(".cache/aether"),
    };
    if cli.density {
        let repository = repository(&cli, &cache)?;
        return stage::on_stage(&cache, density::GIB << 30, |work| density::run(work, &repository, cli.sessions, &out));
    }
    if cli.store {
        let repository = repository(&cli, &cache)?;
        return stage::on_stage(&cache, store::GIB << 30, |work| store::run(work, &repository, &out));
    }
    let (wanted, subjects) = (choose_cases(&cli.cases)?, choose_subjects(&cli.subjects)?);
    let repository = repository(&cli, &cache)?;
    let lazy = if wanted.iter().any(|case| case.starts_with("lazy-")) { lazy::POOL_GIB } else { 0 };
    let gib = storages(&subjects).iter().map(|(_, gib)| gib).sum::<u64>() + POOL + lazy;
    stage::on_stage(&cache, gib << 30, |work| {
        let (report, result) = compare(work, &cli, &repository, wanted, &subjects)?;
        // What broke off does not take the place of a whole run.
        let path = out.join(if result.is_ok() { "report.json" } else { "report-broken-off.json" });
        report.write(&path)?;
        println!("{}\n{}\n{}", report.table(), report.aims(), report.reasons());
        say(&format!("the report is {}", path.display()));
        result
    })
}

fn repository(cli: &Cli, cache: &Path) -> Result<PathBuf> {
    let path = cli.repository.clone().unwrap_or_else(|| cache.join("kubernetes-1.20.2/kubernetes.git"));
    ensure!(path.is_dir(), "{} is not there; e2e/third-party/kubernetes-repository.sh makes it", path.display());
    fs::canonicalize(&path).with_context(|| format!("resolve {}", path.display()))
}

fn choose_cases(asked: &[String]) -> Result<Vec<&'static str>> {
    let mut wanted = Vec::new();
    for name in asked.iter().filter(|name| !name.is_empty()) {
        let exact: Vec<_> = CASES.iter().filter(|case| *case == name).collect();
        let found = if exact.is_empty() {
            CASES.iter().filter(|case| case.starts_with(name.as_str())).collect()
        } else {
            exact
        };
        ensure!(!found.is_empty(), "no case is called {name}; there are {}", CASES.join(", "));
        wanted.extend(found);
    }
    Ok(if wanted.is_empty() { CASES.to_vec() } else { wanted })
}

fn choose_subjects(asked: &[String]) -> Result<Vec<&'static str>> {
    let mut wanted = Vec::new();
    for name in asked.iter().filter(|name| !name.is_empty()) {
        let Some(subject) = SUBJECTS.iter().find(|subject| *subject == name) else {
            bail!("no subject is called {name}; there are {}", SUBJECTS.join(", "));
        };
        wanted.push(*subject);
    }
    Ok(if wanted.is_empty() { SUBJECTS.to_vec() } else { wanted })
}

/// What was measured, and whether all of it could be.
fn compare(
    work: &Path,
    cli: &Cli,
    repository: &Path,
    wanted: Vec<&'static str>,
    names: &[&'static str],
) -> Result<(Report, Result<()>)> {
    let load_before = load()?;
    workload::check_drop_caches(work)?;
    let runtime = Arc::new(tokio::runtime::Builder::new_multi_thread().enable_all().build()?);
    say("making the file systems");
    let mut made = BTreeMap::new();
    for (kind, gib) in storages(names) {
        made.insert(kind, Storage::make(work, kind, gib)?);
    }
    let storage = |kind: &str| made.get(kind).with_context(|| format!("no {kind} was made"));
    let ext4 = storage("ext4")?;
    say("importing the tree");
    let source = subject::Source::start(&runtime, &ext4.path.join("store"), repository)?;
    let mut measured = Measurements::new(CASES, SUBJECTS);
    let mut subjects: Vec<Box<dyn Subject>> = Vec::new();
    let aether = Aether::new(runtime.clone(), work, POOL, &source)?;
    let (pool, lower) = (aether.pool(), aether.lower());
    let peers = cli.peers.as_deref();
    for name in names {
        say(&format!("preparing {name}"));
        let made: Result<Box<dyn Subject>> = match *name {
            "aether" => continue,
            "bare-calls" => Bare::new(work.join("bare"), pool.clone(), lower.clone()).map(|made| Box::new(made) as _),
            "copy" => Copies::new("copy", ext4, "never", repository).map(|made| Box::new(made) as _),
            "xfs-reflink" => {
                Copies::new("xfs-reflink", storage("xfs")?, "always", repository).map(|made| Box::new(made) as _)
            }
            "git-worktree" => Worktree::new(ext4, repository).map(|made| Box::new(made) as _),
            "overlay-by-hand" => Overlay::new("overlay-by-hand", ext4, repository).map(|made| Box::new(made) as _),
            "overlay-by-hand-btrfs" => {
                Overlay::new("overlay-by-hand-btrfs", storage("btrfs")?, repository).map(|made| Box::new(made) as _)
            }
            "btrfs-snapshot" => Snapshots::new(storage("btrfs")?, repository).map(|made| Box::new(made) as _),
            "fuse-overlayfs" => FuseOverlay::new(ext4, repository).map(|made| Box::new(made) as _),
            "juicefs" => juicefs(peers, ext4, repository).map(|made| Box::new(made) as _),
            other => bail!("nothing makes {other}"),
        };
        match made {
            Ok(subject) => subjects.push(subject),
            Err(error) if *name == "bare-calls" => return Err(error),
            Err(error) => {
                say(&format!("{name} cannot be had here: {error:#}"));
                for case in &wanted {
                    measured.missing(case, name, format!("it cannot be had here: {}", one_line(&error)));
                }
            }
        }
    }
    if names.contains(&"aether") {
        subjects.insert(0, Box::new(aether));
    }
    if peers.is_none() && wanted.contains(&"npm-install") {
        for name in names.iter().filter(|name| **name != "bare-calls") {
            measured.missing("npm-install", name, NO_PEERS);
        }
    }
    let npm = match peers {
        Some(peers) => Some((manifest()?, peers.join("npm-cache"))),
        None => None,
    };
    let plan = Plan {
        archive: archive(repository, work)?,
        npm,
        files: regular_files(repository)?,
        wanted,
        rounds: cli.rounds.into(),
        patience: Duration::from_secs(cli.patience),
    };
    let far = lazy::Far {
        runtime,
        work,
        source: &source,
        repository,
        rounds: plan.rounds,
        wanted: &plan.wanted,
        subjects: names,
    };
    let result = plan.run(&mut subjects, &mut measured).and_then(|()| far.run(&mut measured));
    let broken_off = result.as_ref().err().map(one_line);
    let (rows, missing) = measured.finish();
    Ok((Report { rows, machine: machine(load_before, &source, missing, peers)?, broken_off }, result))
}

fn juicefs(peers: Option<&Path>, storage: &Storage, repository: &Path) -> Result<JuiceFs> {
    let peers = peers.context(NO_PEERS)?;
    JuiceFs::new(&peers.join("juicefs"), storage, repository)
}

/// Where the packages of the install case are listed.
fn manifest() -> Result<PathBuf> {
    let path = Path::new(env!("AETHER_TOP")).join("e2e/third-party/npm-tree");
    fs::canonicalize(&path).with_context(|| format!("find {}", path.display()))
}

/// The tree as an archive, on no subject's file system.
fn archive(repository: &Path, work: &Path) -> Result<PathBuf> {
    let path = work.join("tree.tar");
    stage::run(
        Command::new("git")
            .arg("-C")
            .arg(repository)
            .args(["archive", "--format=tar", "--output"])
            .arg(&path)
            .arg("HEAD"),
    )?;
    Ok(path)
}

/// Regular files of the tree in git's order.
fn regular_files(repository: &Path) -> Result<Vec<PathBuf>> {
    let out = stage::run(Command::new("git").arg("-C").arg(repository).args(["ls-tree", "-r", "HEAD"]))?;
    // "100644 blob <id>\t<path>"; 120000 would be a symbolic link, and a quoted path is left alone.
    let lines = std::str::from_utf8(&out)?.lines();
    Ok(lines
        .filter_map(|line| line.strip_prefix("100644 blob ")?.split_once('\t'))
        .map(|(_, path)| path)
        .filter(|path| !path.starts_with('"'))
        .map(PathBuf::from)
        .collect())
}

fn load() -> Result<f64> {
    let text = fs::read_to_string("/proc/loadavg")?;
    Ok(text.split(' ').next().context("a load")?.parse()?)
}

fn machine(
    load_before: f64,
    source: &subject::Source,
    missing: Vec<report::Missing>,
    peers: Option<&Path>,
) -> Result<Machine> {
    let mut versions = BTreeMap::new();
    let mut ask = |name: &str, command: &mut Command| {
        let said = stage::run(command).unwrap_or_default();
        let text = String::from_utf8_lossy(&said).into_owned();
        // Some name the versions of their libraries first.
        let after = text.find(name).map_or(text.as_str(), |at| &text[at..]);
        let version = after
            .split_whitespace()
            .find(|word| word.trim_start_matches('v').starts_with(|c: char| c.is_ascii_digit()) && word.contains('.'));
        versions.insert(name.to_owned(), version.unwrap_or("unknown").to_owned());
    };
    ask("git", Command::new("git").arg("--version"));
    ask("fuse-overlayfs", Command::new("fuse-overlayfs").arg("--version"));
    ask("npm", Command::new("npm").arg("--version"));
    if let Some(peers) = peers {
        ask("juicefs", Command::new(peers.join("juicefs")).arg("--version"));
    }
    Ok(Machine {
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        processors: std::thread::available_parallelism()?.get(),
        memory_bytes: workload::meminfo("MemTotal")?,
        profile: stage::profile(),
        date: jiff::Zoned::now().strftime("%Y-%m-%d").to_string(),
        load_before,
        tree_files: source.files,
        tree_bytes: source.bytes,
        versions,
        missing,
    })
}

fn markdown(document: &Path, out: &Path) -> Result<()> {
    let mut text = fs::read_to_string(document).with_context(|| format!("read {}", document.display()))?;
    let (report, density, store) = (out.join("report.json"), out.join("density.json"), out.join("store.json"));
    ensure!(
        report.exists() || density.exists() || store.exists(),
        "{} holds no report; run `make bench` first",
        out.display()
    );
    if report.exists() {
        text = report::replace_between(&text, "bench", &Report::read(&report)?.markdown())?;
    }
    if density.exists() {
        text = report::replace_between(&text, "density", &density::read(&density)?.markdown())?;
    }
    if store.exists() {
        text = report::replace_between(&text, "store", &store::read(&store)?.markdown())?;
    }
    fs::write(document, text).with_context(|| format!("write {}", document.display()))
}
