//! How many sessions a node carries: what each publish costs from the first to the last, what an idle session takes,
//! and how long the engine needs to start on a full node.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use aether_engine::pool::PoolConfig;
use aether_engine::{Config, Engine};
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

use crate::cases::say;
use crate::report::{self, show};
use crate::stage::{Storage, go_on, profile};
use crate::subject::{OWNER, Source, connect};
use crate::workload;

/// Size of the node's pool.
const POOL_GIB: u64 = 5;
/// Size of what the store lies on.
const STORE_GIB: u64 = 3;
/// Both.
pub(crate) const GIB: u64 = POOL_GIB + STORE_GIB;
/// One session in so many is edited.
const EDITED: usize = 10;
/// How many publishes around a mark its median is taken of.
const WINDOW: usize = 100;

/// As in `density.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Density {
    sessions: usize,
    edited: usize,
    /// Median of the publishes up to each mark.
    publish: Vec<Mark>,
    /// Resident memory that the engine's process gained, per session.
    driver_bytes_per_session: f64,
    /// Slab that cannot be reclaimed, per session with its two mounts.
    slab_unreclaimable_bytes_per_session: f64,
    /// Slab that can: inodes and directory entries.
    slab_reclaimable_bytes_per_session: f64,
    /// All of the kernel's own memory, per session.
    kernel_bytes_per_session: f64,
    mountinfo_bytes: u64,
    mountinfo_read_ms: f64,
    /// A new mount namespace with all sessions in it: what the kubelet's helpers and containers with host propagation pay.
    namespace_ms: f64,
    /// What such a namespace keeps.
    namespace_bytes: f64,
    /// Opening the engine again with every session there.
    restart_ms: f64,
    /// Publishing all sessions again after that, each (they are there: it is recognised).
    republish_ms: f64,
    /// Listing all records.
    list_ms: f64,
    unpublish_ms: f64,
    profile: String,
    kernel: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mark {
    sessions: usize,
    create_ms: f64,
    publish_ms: f64,
    publish_max_ms: f64,
}

/// Runs it on the stage `work`.
pub(crate) fn run(work: &Path, repository: &Path, sessions: usize, out: &Path) -> Result<()> {
    let runtime = Arc::new(tokio::runtime::Builder::new_multi_thread().enable_all().build()?);
    let ext4 = Storage::make(work, "ext4", STORE_GIB)?;
    say("importing the tree");
    let source = Source::start(&runtime, &ext4.path.join("store"), repository)?;
    let density = measure(&runtime, work, &source, sessions)?;
    report::write_json(&out.join("density.json"), &density)?;
    println!("{}", density.markdown());
    say(&format!("the report is {}", out.join("density.json").display()));
    Ok(())
}

fn measure(runtime: &Runtime, work: &Path, source: &Source, sessions: usize) -> Result<Density> {
    let config = Config { pool: PoolConfig::Image { bytes: POOL_GIB << 30 }, ..Config::new(work.join("node")) };
    let engine = runtime.block_on(Engine::open(config.clone()))?;
    let store = runtime.block_on(connect(&source.address))?;
    let image = runtime.block_on(engine.ensure_image(source.root, OWNER, &store, &|_| ()))?;
    let targets = work.join("targets");
    fs::create_dir(&targets)?;
    let target = |n: usize| targets.join(format!("session-{n}"));

    let own = std::process::id();
    workload::drop_caches()?;
    let (driver, slab, reclaimable, kernel) = (
        workload::resident(own)?,
        workload::meminfo("SUnreclaim")?,
        workload::meminfo("SReclaimable")?,
        workload::kernel_memory()?,
    );
    let (mut creates, mut publishes, mut edited) = (Vec::new(), Vec::new(), 0);
    let mut said = Instant::now();
    for n in 0..sessions {
        go_on()?;
        let name = format!("session-{n}");
        let (create, _) = workload::timed(|| Ok(runtime.block_on(engine.create_session(&name, &image))?))?;
        let (publish, ()) = workload::timed(|| Ok(runtime.block_on(engine.publish(&name, &target(n), false))?))?;
        creates.push(create);
        publishes.push(publish);
        if n % EDITED == 0 {
            fs::write(target(n).join("bench-edit"), format!("session {n}\n"))?;
            edited += 1;
        }
        if said.elapsed().as_secs() >= 10 {
            said = Instant::now();
            say(&format!("{} of {sessions} sessions, the last published in {publish:.2} ms", n + 1));
        }
    }
    let marks = [1, 1_000, 5_000, 10_000, sessions];
    let mut marks: Vec<usize> = marks.into_iter().filter(|mark| *mark <= sessions).collect();
    marks.dedup();
    let publish = marks
        .into_iter()
        .map(|mark| {
            let window = mark.saturating_sub(WINDOW)..mark;
            let publishes = sorted(&publishes[window.clone()]);
            Mark {
                sessions: mark,
                create_ms: report::median(&sorted(&creates[window])),
                publish_ms: report::median(&publishes),
                publish_max_ms: publishes[publishes.len() - 1],
            }
        })
        .collect();

    say("memory");
    workload::drop_caches()?;
    let per = |after: u64, before: u64| (after as f64 - before as f64) / sessions as f64;
    let (driver, slab, reclaimable, kernel) = (
        per(workload::resident(own)?, driver),
        per(workload::meminfo("SUnreclaim")?, slab),
        per(workload::meminfo("SReclaimable")?, reclaimable),
        per(workload::kernel_memory()?, kernel),
    );

    say("mount tables and namespaces");
    let (mountinfo_read_ms, table) = median_of(5, || Ok(fs::read("/proc/self/mountinfo")?))?;
    let (namespace_ms, namespace_bytes) = namespace()?;
    let (list_ms, listed) = median_of(3, || Ok(runtime.block_on(engine.session_records())?))?;
    ensure!(listed.len() == sessions, "{} of {sessions} sessions are listed", listed.len());

    say("restart");
    drop(engine);
    let (restart_ms, engine) = workload::timed(|| Ok(runtime.block_on(Engine::open(config))?))?;
    let (republish, ()) = workload::timed(|| {
        for n in 0..sessions {
            runtime.block_on(engine.publish(&format!("session-{n}"), &target(n), false))?;
        }
        Ok(())
    })?;
    for n in (0..sessions).step_by(EDITED) {
        let kept = fs::read_to_string(target(n).join("bench-edit"))?;
        ensure!(kept == format!("session {n}\n"), "session {n} lost its edit");
    }

    say("taking everything down");
    let some = sessions.min(500);
    let (unpublish, ()) = workload::timed(|| {
        for n in sessions - some..sessions {
            runtime.block_on(engine.unpublish(&target(n)))?;
        }
        Ok(())
    })?;
    Ok(Density {
        sessions,
        edited,
        publish,
        driver_bytes_per_session: driver,
        slab_unreclaimable_bytes_per_session: slab,
        slab_reclaimable_bytes_per_session: reclaimable,
        kernel_bytes_per_session: kernel,
        mountinfo_bytes: table.len() as u64,
        mountinfo_read_ms,
        namespace_ms,
        namespace_bytes,
        restart_ms,
        republish_ms: republish / sessions as f64,
        list_ms,
        unpublish_ms: unpublish / some as f64,
        profile: profile(),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
    })
}

/// Time and memory of a namespace that copies every mount, made by `unshare` and held by a sleeping process.
fn namespace() -> Result<(f64, f64)> {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};
    let spawn = |mounts: bool| {
        let mut command = Command::new("unshare");
        if mounts {
            command.args(["--mount", "--propagation", "slave"]);
        }
        let began = Instant::now();
        let mut child = command
            .args(["--", "sh", "-c", "echo up; read -r line"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start unshare")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("its output")?).read_line(&mut line)?;
        Ok::<_, anyhow::Error>((began.elapsed().as_secs_f64() * 1e3, child))
    };
    let mut end = |mut child: std::process::Child| -> Result<()> {
        // It may have seen the end of its input first.
        let _ = child.stdin.take().context("its input")?.write_all(b"\n");
        child.wait()?;
        Ok(())
    };
    let mut times = Vec::new();
    for _ in 0..5 {
        let (without, child) = spawn(false)?;
        end(child)?;
        let (with, child) = spawn(true)?;
        end(child)?;
        times.push(with - without);
    }
    let before = workload::kernel_memory()?;
    let mut children = Vec::new();
    for _ in 0..5 {
        children.push(spawn(true)?.1);
    }
    let after = workload::kernel_memory()?;
    let count = children.len() as f64;
    children.into_iter().try_for_each(&mut end)?;
    Ok((report::median(&sorted(&times)), (after as f64 - before as f64) / count))
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values
}

/// Median time of some runs, and what the last gave.
fn median_of<T>(times: usize, mut work: impl FnMut() -> Result<T>) -> Result<(f64, T)> {
    let (took, mut value) = workload::timed(&mut work)?;
    let mut all = vec![took];
    for _ in 1..times {
        let (took, next) = workload::timed(&mut work)?;
        all.push(took);
        value = next;
    }
    Ok((report::median(&sorted(&all)), value))
}

/// Reads `density.json`.
pub(crate) fn read(path: &Path) -> Result<Density> {
    let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("understand {}", path.display()))
}

impl Density {
    /// For a person, and for `docs/benchmarks.md`.
    pub(crate) fn markdown(&self) -> String {
        let mut out = format!(
            "{} sessions, {} of them edited; Linux {}, profile `{}`.\n\n",
            self.sessions, self.edited, self.kernel, self.profile
        );
        out += "| sessions | create | publish | slowest publish |\n|--:|--:|--:|--:|\n";
        for mark in &self.publish {
            let [create, publish, max] =
                [mark.create_ms, mark.publish_ms, mark.publish_max_ms].map(|value| show(value, "ms"));
            out += &format!("| {} | {create} | {publish} | {max} |\n", mark.sessions);
        }
        out += "\n| with all of them | |\n|---|--:|\n";
        for (what, value, unit) in [
            ("memory of the engine's process, each", self.driver_bytes_per_session, "bytes"),
            ("kernel memory, each", self.kernel_bytes_per_session, "bytes"),
            ("of that slab that cannot be reclaimed", self.slab_unreclaimable_bytes_per_session, "bytes"),
            ("of that slab that can be reclaimed", self.slab_reclaimable_bytes_per_session, "bytes"),
            ("/proc/self/mountinfo", self.mountinfo_bytes as f64, "bytes"),
            ("reading it", self.mountinfo_read_ms, "ms"),
            ("a new mount namespace that sees them all", self.namespace_ms, "ms"),
            ("memory that it keeps", self.namespace_bytes, "bytes"),
            ("starting the engine again", self.restart_ms, "ms"),
            ("publishing again what is there, each", self.republish_ms, "ms"),
            ("listing all records", self.list_ms, "ms"),
            ("unpublish, each", self.unpublish_ms, "ms"),
        ] {
            out += &format!("| {what} | {} |\n", show(value, unit));
        }
        out
    }
}
