//! Real kernel: an engine that is killed at random times under a process that goes on writing. Whatever it was doing, what
//! it had acknowledged is there afterwards, nothing is left that it had not, and the writer notices nothing.

#[path = "support/process.rs"]
mod process;
mod support;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use aether_engine::pool::PoolConfig;
use aether_engine::testing::isolated_async;
use aether_engine::{Engine, Error};
use process::Running;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::{OWNER, Source, engine, read_tree};

const TEST: &str = "an_engine_that_is_killed_under_a_writer_keeps_its_word";
const ROOT: &str = "AETHER_TEST_KILL_ROOT";
const KIND: &str = "AETHER_TEST_KILL_POOL";
const ROUND: &str = "AETHER_TEST_KILL_ROUND";
/// For both pools together.
const KILLS: u64 = 50;
/// Milliseconds that an engine has at most for more than what is waited for.
const LONGEST: u64 = 60;
/// Bytes of a record in the writer's log.
const RECORD: u64 = 16;
/// Files that the writer replaces in turn.
const FILES: u64 = 64;

fn pool(kind: &str) -> PoolConfig {
    match kind {
        "image" => PoolConfig::Image { bytes: 256 << 20 },
        _ => PoolConfig::Directory,
    }
}

/// What engines said that they had done. Each line is one write to a file that outlives them.
#[derive(Default)]
struct Acknowledged {
    /// By snapshot, how many records the writer had written before it was asked for; and its tree, once it was digested.
    snapshots: BTreeMap<String, (u64, Option<String>)>,
    /// By fork, its snapshot.
    forks: BTreeMap<String, String>,
    /// Where session `s` is published.
    targets: Vec<String>,
    /// Deletions that had begun, and whether they had ended.
    gone: BTreeMap<String, bool>,
}

fn journal(root: &Path) -> String {
    fs::read_to_string(root.join("journal")).unwrap_or_default()
}

impl Acknowledged {
    fn read(root: &Path) -> Self {
        let mut all = Self::default();
        let journal = journal(root);
        // A line that a kill cut short was not acknowledged.
        for line in journal.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["snapshot", id, written] => _ = all.snapshots.insert(id.into(), (written.parse().unwrap(), None)),
                ["tree", id, tree] => all.snapshots.get_mut(id).unwrap().1 = Some(tree.into()),
                ["fork", id, snapshot] => _ = all.forks.insert(id.into(), snapshot.into()),
                ["published", target] => all.targets.push(target.into()),
                ["deleting", id] => _ = all.gone.insert(id.into(), false),
                ["deleted", id] => _ = all.gone.insert(id.into(), true),
                _ => panic!("journal line {line:?}"),
            }
        }
        all
    }
}

/// Works until it is killed.
async fn work(root: &Path, kind: &str, round: &str) {
    let mut journal = OpenOptions::new().create(true).append(true).open(root.join("journal")).unwrap();
    let mut acknowledged = move |line: String| journal.write_all(format!("{line}\n").as_bytes()).unwrap();
    let engine = engine(&root.join("engine"), pool(kind)).await;
    fs::write(root.join("ready"), round).unwrap();
    let source = Source::new().await;
    let mut random = StdRng::seed_from_u64(round.parse().unwrap());
    for step in 0.. {
        let snapshot = format!("cp-{round}-{step}");
        let written = written(root);
        engine.snapshot("s", &snapshot, &[], Some("the writer is not held still")).await.unwrap();
        acknowledged(format!("snapshot {snapshot} {written}"));
        let fork = format!("fork-{round}-{step}");
        if random.random_bool(0.5) {
            engine.fork_session(&fork, &snapshot).await.unwrap();
            let target = root.join("targets").join(&fork);
            engine.publish(&fork, &target, false).await.unwrap();
            fs::write(target.join("own"), &fork).unwrap();
            acknowledged(format!("fork {fork} {snapshot}"));
            engine.unpublish(&target).await.unwrap();
        }
        if random.random_bool(0.5) {
            let digested = engine.digest(&snapshot).await.unwrap();
            acknowledged(format!("tree {snapshot} {}", digested.root));
            engine.ensure_image(digested.root, OWNER, &source.store, &|_| {}).await.unwrap();
        }
        if random.random_bool(0.3) {
            let target = root.join("targets").join(&snapshot);
            engine.publish("s", &target, random.random_bool(0.5)).await.unwrap();
            acknowledged(format!("published {snapshot}"));
            acknowledged(format!("deleting {snapshot}-target"));
            engine.unpublish(&target).await.unwrap();
            acknowledged(format!("deleted {snapshot}-target"));
        }
        if random.random_bool(0.7) {
            for id in [&fork, &snapshot] {
                acknowledged(format!("deleting {id}"));
            }
            engine.unmount_session(&fork).await.or_else(absent).unwrap();
            engine.delete_session(&fork).await.unwrap();
            acknowledged(format!("deleted {fork}"));
            engine.delete_snapshot(&snapshot).await.unwrap();
            acknowledged(format!("deleted {snapshot}"));
        }
    }
}

fn absent(error: Error) -> Result<(), Error> {
    if error.is_not_found() { Ok(()) } else { Err(error) }
}

/// A process that writes through a mount, as one in a pod does: records at the end of a log, and files replaced by rename.
struct Writer {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    fn start(root: &Path, target: PathBuf) -> Self {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let progress = File::create(root.join("progress")).unwrap();
        progress.write_all_at(&0_u64.to_le_bytes(), 0).unwrap();
        let thread = thread::spawn({
            let (stop, count) = (stop.clone(), count.clone());
            move || {
                let mut log = File::create(target.join("log")).unwrap();
                for number in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    fs::write(target.join("new"), number.to_string()).unwrap();
                    fs::rename(target.join("new"), target.join(format!("file-{}", number % FILES))).unwrap();
                    writeln!(log, "{number:015}").unwrap();
                    count.store(number + 1, Ordering::Release);
                    progress.write_all_at(&(number + 1).to_le_bytes(), 0).unwrap();
                    // As busy as a build; busier ones only slow the test down.
                    thread::sleep(Duration::from_micros(300));
                }
            }
        });
        Self { stop, count, thread: Some(thread) }
    }

    /// Waits until it has gone on.
    fn goes_on(&self) {
        let (before, deadline) = (self.count.load(Ordering::Acquire), Instant::now() + Duration::from_secs(30));
        while self.count.load(Ordering::Acquire) == before {
            let alive = self.thread.as_ref().is_some_and(|thread| !thread.is_finished());
            assert!(alive && Instant::now() < deadline, "the writer saw an error or hangs");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().expect("the writer saw no error");
    }
}

/// Ends the writer also when the test fails, so that its files can be unmounted.
impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How many records are certainly in the log.
fn written(root: &Path) -> u64 {
    let mut bytes = [0; 8];
    File::open(root.join("progress")).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    u64::from_le_bytes(bytes)
}

/// A copy that was taken after so many records has them all.
fn has_all(view: &Path, written: u64, context: &str) {
    let log = fs::read(view.join("log")).unwrap();
    assert!(log.len() as u64 >= written * RECORD, "{context}: {} bytes of {written} records", log.len());
    for (number, record) in
        log.chunks(usize::try_from(RECORD).unwrap()).take(usize::try_from(written).unwrap()).enumerate()
    {
        assert_eq!(record, format!("{number:015}\n").as_bytes(), "{context}");
    }
    for number in written.saturating_sub(FILES)..written {
        let name = format!("file-{}", number % FILES);
        let found: u64 = fs::read_to_string(view.join(&name)).unwrap().parse().unwrap();
        assert!(found >= number && found % FILES == number % FILES, "{context}: {name} has {found} after {number}");
    }
}

/// Starts an engine in a process of its own and kills it after a while.
fn kill(root: &Path, kind: &str, round: u64, random: &mut StdRng) {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", TEST, "--nocapture", "--test-threads=1"])
        .envs([(ROOT, root.as_os_str()), (KIND, kind.as_ref()), (ROUND, round.to_string().as_ref())])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(root.join("stderr")).unwrap())
        .spawn()
        .unwrap();
    let mut child = Running(child);
    let said = || fs::read_to_string(root.join("stderr")).unwrap();
    // Every fifth is killed while it starts, repairs what the one before left included.
    let starting = random.random_ratio(1, 5);
    let deadline = Instant::now() + Duration::from_secs(60);
    // The others when they have done some of their work, however busy the machine is.
    let wanted = random.random_range(0..6);
    let begun = || fs::read_to_string(root.join("ready")).is_ok_and(|ready| ready == round.to_string());
    let enough = || starting || (begun() && journal(root).lines().count() >= wanted);
    while !enough() {
        assert!(child.0.try_wait().unwrap().is_none(), "{kind} pool, round {round}: it ended by itself\n{}", said());
        assert!(Instant::now() < deadline, "{kind} pool, round {round}: it does not get on\n{}", said());
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(Duration::from_micros(random.random_range(0..LONGEST * 1000)));
    let ended = child.0.try_wait().unwrap();
    drop(child);
    assert!(ended.is_none(), "{kind} pool, round {round}: it ended by itself\n{}", said());
}

/// The next engine finds all that was acknowledged, and nothing else.
async fn check(root: &Path, kind: &str, round: u64) {
    let context = format!("{kind} pool, kill {round}");
    let engine = engine(&root.join("engine"), pool(kind)).await;
    assert_eq!(engine.fsck().await.unwrap(), Vec::<String>::new(), "{context}");
    let acknowledged = Acknowledged::read(root);
    let begun = |id: &str| acknowledged.gone.contains_key(id);
    let ended = |id: &str| acknowledged.gone.get(id) == Some(&true);

    let sessions: Vec<String> = engine.session_records().await.unwrap().into_iter().map(|session| session.id).collect();
    let snapshots: Vec<String> = engine.snapshots().await.unwrap().into_iter().map(|snapshot| snapshot.id).collect();
    for id in snapshots.iter().chain(&sessions) {
        assert!(!ended(id), "{context}: {id} was deleted");
        assert!(!id.starts_with("now-") && !id.starts_with("passing-"), "{context}: {id} is of use to nobody");
    }
    for (id, (written, tree)) in acknowledged.snapshots.iter().filter(|(id, _)| !begun(id)) {
        assert!(snapshots.contains(id), "{context}: snapshot {id} is lost");
        let copy = format!("copy-{id}");
        engine.fork_session(&copy, id).await.unwrap();
        has_all(&engine.mount_session(&copy).await.unwrap(), *written, &format!("{context}: {id}"));
        engine.unmount_session(&copy).await.unwrap();
        engine.delete_session(&copy).await.unwrap();
        let digested = engine.digest(id).await.unwrap().root.to_string();
        assert!(tree.as_ref().is_none_or(|tree| *tree == digested), "{context}: {id} has another tree");
    }
    for (id, snapshot) in acknowledged.forks.iter().filter(|(id, _)| !begun(id)) {
        let view = engine.mount_session(id).await.unwrap_or_else(|error| panic!("{context}: {id}: {error}"));
        assert_eq!(fs::read_to_string(view.join("own")).unwrap(), *id, "{context}");
        has_all(&view, acknowledged.snapshots[snapshot].0, &format!("{context}: {id}"));
    }
    has_all(&root.join("target"), written(root), &context);
    for id in acknowledged.targets.iter().filter(|id| !begun(&format!("{id}-target"))) {
        has_all(&root.join("targets").join(id), written(root), &format!("{context}: target {id}"));
    }

    // Some stay for the next ones, so that more than one kill is survived.
    tidy(&engine, root, round.is_multiple_of(4)).await;
}

/// Takes away what engines have left published, and everything but session `s` if `all`.
async fn tidy(engine: &Engine, root: &Path, all: bool) {
    for status in engine.sessions().await.unwrap() {
        for target in status.targets.iter().filter(|target| target.starts_with(root.join("targets"))) {
            engine.unpublish(target).await.unwrap();
        }
        if all && status.session.id != "s" {
            engine.delete_session(&status.session.id).await.unwrap();
        }
    }
    if all {
        for snapshot in engine.snapshots().await.unwrap() {
            engine.delete_snapshot(&snapshot.id).await.unwrap();
        }
        engine.gc().await.unwrap();
        fs::write(root.join("journal"), "").unwrap();
    }
}

async fn kill_again_and_again(root: &Path, kind: &str, random: &mut StdRng) {
    fs::create_dir_all(root.join("targets")).unwrap();
    fs::write(root.join("ready"), "").unwrap();
    let target = root.join("target");
    let source = Source::new().await;
    {
        let engine = engine(&root.join("engine"), pool(kind)).await;
        let image = engine.ensure_image(source.root, OWNER, &source.store, &|_| {}).await.unwrap();
        engine.create_session("s", &image).await.unwrap();
        engine.publish("s", &target, false).await.unwrap();
    }
    let writer = Writer::start(root, target.clone());
    writer.goes_on();
    for round in 1..=KILLS / 2 {
        let began = Instant::now();
        kill(root, kind, round, random);
        let killed = began.elapsed();
        let journal = journal(root);
        check(root, kind, round).await;
        writer.goes_on();
        println!(
            "{kind} pool: kill {round} after {killed:?}, in the middle of {:?}; checked in {:?}",
            journal.lines().last().unwrap_or("its start"),
            began.elapsed() - killed
        );
    }
    writer.end();

    let engine = engine(&root.join("engine"), pool(kind)).await;
    let shown = read_tree(&target);
    for (path, wanted) in source.expected() {
        assert_eq!(shown.get(&path), Some(&wanted), "{kind} pool: {path} of the base");
    }
    tidy(&engine, root, true).await;
    engine.unpublish(&target).await.unwrap();
    engine.delete_session("s").await.unwrap();
    engine.gc().await.unwrap();
    assert_eq!(engine.fsck().await.unwrap(), Vec::<String>::new());
    let statistics = engine.statistics().await.unwrap();
    assert_eq!((statistics.sessions, statistics.snapshots, statistics.images), (0, 0, 0), "{kind} pool");
}

#[test]
fn an_engine_that_is_killed_under_a_writer_keeps_its_word() {
    // A process of the test itself: the engine that is to be killed.
    if let Some(root) = std::env::var_os(ROOT) {
        let (kind, round) = (std::env::var(KIND).unwrap(), std::env::var(ROUND).unwrap());
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        return runtime.block_on(work(Path::new(&root), &kind, &round));
    }
    isolated_async(TEST, async |directory| {
        let seed = std::env::var("AETHER_TEST_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
        println!("AETHER_TEST_SEED={seed} tries the same times again");
        let mut random = StdRng::seed_from_u64(seed);
        for kind in ["image", "directory"] {
            let root = directory.join(kind);
            fs::create_dir(&root).unwrap();
            kill_again_and_again(&root, kind, &mut random).await;
        }
    });
}
