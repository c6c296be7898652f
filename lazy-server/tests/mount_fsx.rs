//! fsx at work in a session whose contents are still in the store, and readers beside it, while the server of the lazy
//! layer, or the engine that hydrates and copies the session, is killed fifty times at random moments: nobody sees an error
//! or a wrong byte.
//!
//! fsx works on files of the base, each of which is copied up through the layer first. It keeps to its file from then
//! on; so readers open contents all the time. Where the server is killed, they let the node forget half of what they have
//! read.

mod program;
#[path = "../../crates/lazy/tests/support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use aether_cas::lazy::Places;
use aether_cas::tree::{Attributes, Directory, Name, Node, Owner};
use aether_cas::{Blob, LocalConfig, LocalStore, MemoryStore, Store};
use aether_engine::pool::PoolConfig;
use aether_engine::testing::isolated;
use aether_engine::{Config, Engine, mount};
use program::Program;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use support::{Server, wait_for};
use tokio::runtime::Runtime;

const OWNER: Owner = Owner { uid: 0, gid: 0 };
const KILLS: u32 = 50;
/// Milliseconds that a server lives at most.
const LONGEST: u64 = 300;
/// Milliseconds that an engine lives at most, from the start of its process.
const LONGEST_ENGINE: u64 = 900;
/// Where the engine works that is to be killed, and on which tree: set for its process.
const ROOT: &str = "AETHER_TEST_FSX_ROOT";
const TREE: &str = "AETHER_TEST_FSX_TREE";
const READERS: u64 = 2;
/// Files that are read, and files that fsx works on.
const READ: usize = 150;
const WORKED_ON: usize = 40;
/// One that is served in parts while it arrives.
const LARGE: &str = "large";

/// Every operation that leaves the size as it is, on a file that is not emptied first.
const OVER: &str = r"
blockmode = true
nomsyncafterwrite = true
[weights]
close_open = 0
invalidate = 1
mapread = 10
mapwrite = 10
read = 10
write = 10
truncate = 0
fsync = 1
fdatasync = 1
posix_fallocate = 0
punch_hole = 5
sendfile = 2
posix_fadvise = 2
copy_file_range = 5
";

/// Every operation there is, on a file that is emptied first.
const ANEW: &str = r"
flen = 131072
nomsyncafterwrite = true
[weights]
close_open = 5
invalidate = 1
mapread = 10
mapwrite = 10
read = 10
write = 10
truncate = 5
fsync = 1
fdatasync = 1
posix_fallocate = 3
punch_hole = 5
sendfile = 2
posix_fadvise = 2
copy_file_range = 5
";

/// The folder of fsx; installs it on a machine that has not got it.
fn programs() -> PathBuf {
    let script = Path::new(env!("AETHER_TOP")).join("e2e/third-party/file-system-tests.sh");
    let output = Command::new(&script).output().unwrap();
    assert!(output.status.success(), "{}: {}", script.display(), String::from_utf8_lossy(&output.stderr));
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

type Files = BTreeMap<String, Vec<u8>>;

fn files(random: &mut StdRng) -> Files {
    let mut bytes = |size| {
        let mut bytes = vec![0; size];
        random.fill(&mut bytes[..]);
        bytes
    };
    let read = (0..READ).map(|n| (format!("read-{n}"), 1 + n * 700));
    let worked_on = (0..WORKED_ON).map(|n| (format!("worked-on-{n}"), 100_000 + n));
    let large = [(LARGE.to_owned(), 65 << 20)];
    read.chain(worked_on).chain(large).map(|(name, size)| (name, bytes(size))).collect()
}

/// A tree of `files`, in the store of the engine and in that of the lazy layer.
async fn tree(files: &Files, store: &dyn Store, server: &Server) -> Blob {
    let attributes = |mode| Attributes { mode, ..Attributes::default() };
    let mut top = Directory { attributes: attributes(0o755), entries: BTreeMap::new() };
    for (name, bytes) in files {
        let content = server.put(bytes);
        store.write(content, bytes.clone().into()).await.unwrap();
        let node = Node::File { content, attributes: attributes(0o644), link_group: None };
        top.entries.insert(Name::new(name.clone().into_bytes()).unwrap(), node);
    }
    store.write(top.blob(), top.encode()).await.unwrap();
    top.blob()
}

/// Runs fsx on one file of the base after the other until `stop`, and returns how often.
fn exercise(view: &Path, files: &Files, scratch: &Path, seed: u64, stop: &AtomicBool) -> u32 {
    let fsx = programs().join("fsx");
    let configurations = [("over", OVER), ("anew", ANEW)].map(|(name, text)| {
        let path = scratch.join(format!("{name}.toml"));
        fs::write(&path, text).unwrap();
        path
    });
    let mut runs = 0;
    for round in 0.. {
        let name = format!("worked-on-{}", round % WORKED_ON);
        let file = view.join(&name);
        if round < WORKED_ON {
            OpenOptions::new().append(true).open(&file).unwrap();
            assert!(fs::read(&file).unwrap() == files[&name], "{name} as it was copied up");
        }
        for configuration in &configurations {
            let output = Command::new(&fsx)
                .args(["-S", &(seed + round as u64).to_string(), "-N", "1000", "-f"])
                .arg(configuration)
                .arg("-P")
                .arg(scratch)
                .arg(&file)
                .output()
                .unwrap();
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            assert!(output.status.success() && said.contains("A-OK"), "fsx on {name} ended with {said}");
            runs += 1;
            if stop.load(Ordering::SeqCst) {
                return runs;
            }
        }
    }
    runs
}

/// Reads contents of the base until `stop`, and returns how often. Lets the node forget what is in `fetched`.
fn read(view: &Path, files: &Files, fetched: Option<&Path>, seed: u64, stop: &AtomicBool) -> u32 {
    let mut random = StdRng::seed_from_u64(seed);
    let names: Vec<&String> = files.keys().filter(|name| name.starts_with("read-")).collect();
    // The other reader may have done it, and nothing says that the server has to keep it here.
    let forget = |name: &str| {
        if let Some(fetched) = fetched {
            let _ = fs::remove_file(fetched.join(Blob::of(&files[name]).digest.object_path()));
        }
    };
    let mut reads = 0;
    while !stop.load(Ordering::SeqCst) {
        reads += 1;
        if random.random_ratio(1, 40) {
            let bytes = &files[LARGE];
            let at = random.random_range(0..bytes.len() - 100_000);
            let mut part = vec![0; 100_000];
            let file = File::open(view.join(LARGE)).unwrap();
            file.read_exact_at(&mut part, at as u64).unwrap_or_else(|error| panic!("{LARGE} at {at}: {error}"));
            assert!(part == bytes[at..at + part.len()], "{LARGE} at {at}");
            forget(LARGE);
            continue;
        }
        let name = names.choose(&mut random).unwrap();
        let bytes = fs::read(view.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(bytes == files[*name], "{name} has its bytes");
        if random.random_bool(0.5) {
            forget(name);
        }
    }
    reads
}

/// Says that it is time to stop, also when it is dropped because something failed.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Calls `kill` until it has killed [`KILLS`] times, while fsx and readers are at work; returns how often that was, how often
/// fsx ran and how often was read.
fn under_load(
    scratch: &Path,
    view: &Path,
    files: &Files,
    fetched: Option<&Path>,
    seed: u64,
    mut kill: impl FnMut() -> bool,
) -> (u32, u32, u32) {
    let stop = &AtomicBool::new(false);
    thread::scope(|scope| {
        let at_last = Stop(stop);
        let fsx = scope.spawn(move || {
            let _stop = Stop(stop);
            exercise(view, files, scratch, seed >> 1, stop)
        });
        let reader = |n: u64| {
            scope.spawn(move || {
                let _stop = Stop(stop);
                read(view, files, fetched, seed ^ n, stop)
            })
        };
        let readers: Vec<_> = (0..READERS).map(reader).collect();
        let mut kills = 0;
        while kills < KILLS && !stop.load(Ordering::SeqCst) {
            kills += u32::from(kill());
        }
        drop(at_last);
        let reads: u32 = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
        (kills, fsx.join().unwrap(), reads)
    })
}

fn seed() -> u64 {
    let seed = std::env::var("AETHER_TEST_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("AETHER_TEST_SEED={seed} tries the same times again");
    seed
}

fn config(root: &Path) -> Config {
    Config { pool: PoolConfig::Image { bytes: 500 << 20 }, lazy: true, ..Config::new(root.join("engine")) }
}

#[test]
fn fsx_and_readers_do_not_notice_that_the_server_is_killed_fifty_times() {
    isolated("fsx_and_readers_do_not_notice_that_the_server_is_killed_fifty_times", |root| {
        let seed = seed();
        let mut random = StdRng::seed_from_u64(seed);
        let files = files(&mut random);
        let runtime = Runtime::new().unwrap();
        let server = Server::default();
        // So that servers are killed in the middle of fetches.
        server.behaviour.delay.store(10, Ordering::SeqCst);
        let store = MemoryStore::new();
        let directory = root.join("engine");
        let engine = runtime.block_on(Engine::open(config(root))).unwrap();
        let mut program = Program::start(&directory, &server.start(&runtime), &["--grace", "60"]);
        let (tree, view) = runtime.block_on(async {
            let tree = tree(&files, &store, &server).await;
            let image = engine.ensure_image_lazily(tree, OWNER, None, &store, &|_| {}).await.unwrap();
            engine.create_session("s", &image).await.unwrap();
            (tree, engine.mount_session("s").await.unwrap())
        });
        assert_eq!(engine.objects().statistics().file_blobs, 0, "no content is here");
        let fetched = Places::new(&directory).fetched_now().unwrap();
        let (kills, runs, reads) = under_load(root, &view, &files, Some(&fetched), seed, || {
            wait_for("there is a server", || program.server().is_some());
            thread::sleep(Duration::from_micros(random.random_range(0..LONGEST * 1000)));
            program.kill_server()
        });
        let behaviour = &server.behaviour;
        let (whole, parts) = (behaviour.whole.load(Ordering::SeqCst), behaviour.parts.load(Ordering::SeqCst));
        println!(
            "{kills} kills, {runs} runs of fsx, {reads} reads; the store was asked for {whole} contents, {parts} parts"
        );
        assert_eq!(kills, KILLS);
        assert!(whole > u64::from(reads / 4), "contents came from the store all the time");

        // Whole at last, and nobody needs the layer.
        behaviour.delay.store(0, Ordering::SeqCst);
        runtime.block_on(engine.hydrate(tree, &store, &|_| {})).unwrap();
        program.end();
        for (name, bytes) in files.iter().filter(|(name, _)| !name.starts_with("worked-on")) {
            assert!(fs::read(view.join(name)).unwrap() == *bytes, "{name}");
        }
        assert_eq!(runtime.block_on(engine.fsck()).unwrap(), Vec::<String>::new());
        mount::unmount_below(root).unwrap();
    });
}

/// The store of the engine, which outlives it. Only one process has it open at a time.
fn store_at(root: &Path) -> LocalStore {
    let (objects, index) = (root.join("store/objects"), root.join("store/index"));
    LocalStore::open(LocalConfig { objects, index, inline_limit: 0 }).unwrap()
}

/// Hydrates the session's tree and copies the session until it is killed.
async fn work(root: &Path, tree: Blob) {
    let engine = Engine::open(config(root)).await.unwrap();
    let store = store_at(root);
    for step in 0.. {
        engine.hydrate(tree, &store, &|_| {}).await.unwrap();
        let snapshot = format!("cp-{}-{step}", std::process::id());
        engine.snapshot("s", &snapshot, &[], Some("fsx is not held still")).await.unwrap();
        engine.digest(&snapshot).await.unwrap();
        engine.fork_session(&format!("fork-of-{snapshot}"), &snapshot).await.unwrap();
        engine.delete_session(&format!("fork-of-{snapshot}")).await.unwrap();
        engine.delete_snapshot(&snapshot).await.unwrap();
    }
}

/// Starts an engine in a process of its own and kills it after a while.
fn kill_engine(root: &Path, tree: Blob, random: &mut StdRng) -> bool {
    let said = root.join("stderr");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", ENGINE_TEST, "--nocapture", "--test-threads=1"])
        .env(ROOT, root)
        .env(TREE, tree.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&said).unwrap())
        .spawn()
        .unwrap();
    thread::sleep(Duration::from_micros(random.random_range(0..LONGEST_ENGINE * 1000)));
    let ended = child.try_wait().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(ended.is_none(), "it ended by itself: {}", fs::read_to_string(said).unwrap());
    true
}

const ENGINE_TEST: &str = "fsx_and_readers_do_not_notice_that_the_engine_is_killed_fifty_times";

#[test]
fn fsx_and_readers_do_not_notice_that_the_engine_is_killed_fifty_times() {
    // A process of the test itself: the engine that is to be killed.
    if let Some(root) = std::env::var_os(ROOT) {
        let tree = std::env::var(TREE).unwrap().parse().unwrap();
        return Runtime::new().unwrap().block_on(work(Path::new(&root), tree));
    }
    isolated(ENGINE_TEST, |root| {
        let seed = seed();
        let mut random = StdRng::seed_from_u64(seed);
        let files = files(&mut random);
        let runtime = Runtime::new().unwrap();
        let server = Server::default();
        let (directory, view) = (root.join("engine"), root.join("view"));
        let engine = runtime.block_on(Engine::open(config(root))).unwrap();
        let program = Program::start(&directory, &server.start(&runtime), &["--grace", "60"]);
        let tree = runtime.block_on(async {
            let store = store_at(root);
            let tree = tree(&files, &store, &server).await;
            let image = engine.ensure_image_lazily(tree, OWNER, None, &store, &|_| {}).await.unwrap();
            engine.create_session("s", &image).await.unwrap();
            engine.publish("s", &view, false).await.unwrap();
            tree
        });
        assert_eq!(engine.objects().statistics().file_blobs, 0, "no content is here");
        drop(engine);
        let kill = || kill_engine(root, tree, &mut random);
        let (kills, runs, reads) = under_load(root, &view, &files, None, seed, kill);
        println!("{kills} kills, {runs} runs of fsx, {reads} reads");
        assert_eq!(kills, KILLS);

        let engine = runtime.block_on(Engine::open(config(root))).unwrap();
        runtime.block_on(engine.hydrate(tree, &store_at(root), &|_| {})).unwrap();
        // What a reader had open when the tree became complete stays with the layer until it is looked for anew.
        mount::rebind(&view).unwrap();
        program.end();
        for (name, bytes) in files.iter().filter(|(name, _)| !name.starts_with("worked-on")) {
            assert!(fs::read(view.join(name)).unwrap() == *bytes, "{name}");
        }
        assert_eq!(runtime.block_on(engine.fsck()).unwrap(), Vec::<String>::new());
        mount::unmount_below(root).unwrap();
    });
}
