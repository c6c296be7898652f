//! The power goes: what a disk had not been told to keep is lost. What the engine acknowledged must be there afterwards.
//!
//! The disk is an ext4 whose shutdown (`EXT4_IOC_SHUTDOWN`, as file system tests use it) drops every write that was not
//! brought to its log: dirty pages, sizes, names. The engine's directory lies on it, with its pool of either kind.

#[path = "support/process.rs"]
mod process;
mod support;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use aether_engine::mount;
use aether_engine::pool::PoolConfig;
use aether_engine::testing::isolated_async;
use process::Running;
use rand::{Rng, SeedableRng, rngs::StdRng};
use support::{OWNER, Source, engine, read_tree};

const TEST: &str = "what_was_acknowledged_survives_a_power_cut";
const ROOT: &str = "AETHER_TEST_POWER_ROOT";
const KIND: &str = "AETHER_TEST_POWER_POOL";
const CUTS: u64 = 5;

/// `include/uapi/linux/ext4.h`: `_IOR('X', 125, __u32)`, and to drop what is not in the log.
const EXT4_IOC_SHUTDOWN: libc::Ioctl = 0x8004_587d_u32 as libc::Ioctl;
const EXT4_GOING_FLAGS_NOLOGFLUSH: u32 = 2;

fn pool(kind: &str) -> PoolConfig {
    match kind {
        "image" => PoolConfig::Image { bytes: 256 << 20 },
        _ => PoolConfig::Directory,
    }
}

/// A disk that can lose its power.
struct Disk {
    image: PathBuf,
    mountpoint: PathBuf,
}

impl Disk {
    fn new(directory: &Path) -> Self {
        let disk = Self { image: directory.join("disk"), mountpoint: directory.join("mounted") };
        File::create(&disk.image).unwrap().set_len(1 << 30).unwrap();
        fs::create_dir(&disk.mountpoint).unwrap();
        // Times to the nanosecond.
        call("mkfs.ext4", &["-q", "-I", "256", disk.image.to_str().unwrap()]);
        disk.on();
        disk
    }

    fn on(&self) {
        let (image, mountpoint) = (self.image.to_str().unwrap(), self.mountpoint.to_str().unwrap());
        // Its log is committed by those who ask for it rather than by the clock.
        call("mount", &["-t", "ext4", "-o", "loop,commit=300", image, mountpoint]);
    }

    /// Drops what was not synced.
    fn cut(&self) {
        let directory = File::open(&self.mountpoint).unwrap();
        // SAFETY: the call reads one u32 through the pointer, which outlives it.
        let result = unsafe { libc::ioctl(directory.as_raw_fd(), EXT4_IOC_SHUTDOWN, &EXT4_GOING_FLAGS_NOLOGFLUSH) };
        assert_eq!(result, 0, "shut the disk down: {}", std::io::Error::last_os_error());
    }

    /// Everything on the disk and the disk itself.
    fn off(&self) {
        mount::unmount_below(&self.mountpoint).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        // The pool's own device lets go of its file a moment after its mount is gone.
        while loops_of(&self.image) > 0 {
            assert!(Instant::now() < deadline, "something still uses the disk");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn loops_of(image: &Path) -> usize {
    let output = Command::new("losetup").arg("-j").arg(image).output().unwrap();
    String::from_utf8_lossy(&output.stdout).lines().count()
}

fn call(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Works until it is ended; says in the journal, which is on another disk, what was acknowledged.
async fn script(disk: &Path, kind: &str) {
    let mut journal = OpenOptions::new().append(true).open(disk.parent().unwrap().join("journal")).unwrap();
    let mut acknowledged = move |line: String| writeln!(journal, "{line}").unwrap();
    let source = Source::new().await;
    let engine = engine(&disk.join("engine"), pool(kind)).await;
    let image = engine.ensure_image(source.root, OWNER, &source.store, &|_| {}).await.unwrap();
    if engine.session("s").await.is_err() {
        engine.create_session("s", &image).await.unwrap();
    }
    let view = engine.mount_session("s").await.unwrap();
    acknowledged("session s".into());
    let first = engine.snapshots().await.unwrap().len();
    for n in first.. {
        let name = format!("new-{n}");
        let mut file = File::create(view.join(&name)).unwrap();
        file.write_all(&contents(&name)).unwrap();
        file.sync_all().unwrap();
        acknowledged(format!("synced {name}"));
        // Not synced by the writer: the snapshot has to.
        fs::write(view.join("docs").join(&name), contents(&name)).unwrap();
        let snapshot = format!("cp-{n}");
        engine.snapshot("s", &snapshot, &[], None).await.unwrap();
        acknowledged(format!("snapshot {snapshot}"));
        if n % 2 == 0 {
            let root = engine.digest(&snapshot).await.unwrap().root;
            acknowledged(format!("digest {snapshot} {root}"));
        }
        if n % 3 == 0 {
            let fork = format!("fork-{n}");
            engine.fork_session(&fork, &snapshot).await.unwrap();
            acknowledged(format!("fork {fork} {n}"));
        }
    }
}

/// What a file of this name holds; more than a page.
fn contents(name: &str) -> Vec<u8> {
    name.bytes().cycle().take(9_000).collect()
}

/// Starts the script; what it says goes to a file beside the disk.
fn start(disk: &Disk, kind: &str) -> Running {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", TEST, "--nocapture", "--test-threads=1"]).env(ROOT, &disk.mountpoint).env(KIND, kind);
    let said = File::create(disk.image.with_file_name("stderr")).unwrap();
    Running(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said).spawn().unwrap())
}

/// Lets the script work for a while, takes its disk's power and ends it.
fn work_until_cut(disk: &Disk, kind: &str, journal: &Path, random: &mut StdRng) {
    let before = lines(journal).len();
    let wanted = before + random.random_range(2..12);
    let mut child = start(disk, kind);
    let deadline = Instant::now() + Duration::from_secs(60);
    let said = || fs::read_to_string(disk.image.with_file_name("stderr")).unwrap();
    while lines(journal).len() < wanted {
        if let Some(status) = child.0.try_wait().unwrap() {
            panic!("the script ended by itself ({status}): {}", said());
        }
        assert!(Instant::now() < deadline, "the script does not get on: {}", said());
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_micros(random.random_range(0..20_000)));
    disk.cut();
    drop(child);
    disk.off();
    disk.on();
}

fn lines(journal: &Path) -> Vec<String> {
    let text = fs::read_to_string(journal).unwrap();
    // A line that is cut short was not acknowledged.
    text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')).map(str::to_owned).collect()
}

async fn check(disk: &Disk, kind: &str, acknowledged: &[String], context: &str) {
    let engine = engine(&disk.mountpoint.join("engine"), pool(kind)).await;
    assert_eq!(engine.fsck().await.unwrap(), Vec::<String>::new(), "{context}");
    let source = Source::new().await;
    let snapshots: BTreeSet<String> = engine.snapshots().await.unwrap().into_iter().map(|s| s.id).collect();
    for line in acknowledged {
        let words: Vec<&str> = line.split(' ').collect();
        let context = format!("{context}: {line}");
        match words[..] {
            ["session", id] => {
                let tree = read_tree(&engine.mount_session(id).await.unwrap());
                for (path, expected) in source.expected().iter().filter(|(path, _)| *path != "docs") {
                    assert_eq!(tree.get(path), Some(expected), "{context}: {path}");
                }
            }
            ["synced", name] => {
                let view = engine.mount_session("s").await.unwrap();
                assert_eq!(fs::read(view.join(name)).unwrap(), contents(name), "{context}");
            }
            ["snapshot", id] => {
                assert!(snapshots.contains(id), "{context}");
                let upper = disk.mountpoint.join("engine/pool/snapshots").join(id).join("upper");
                let name = id.replace("cp", "new");
                assert_eq!(fs::read(upper.join("docs").join(&name)).unwrap(), contents(&name), "{context}");
            }
            ["digest", id, root] => {
                assert_eq!(engine.digest(id).await.unwrap().root.to_string(), root, "{context}");
            }
            ["fork", id, n] => {
                let view = engine.mount_session(id).await.unwrap();
                let name = format!("new-{n}");
                assert_eq!(fs::read(view.join("docs").join(&name)).unwrap(), contents(&name), "{context}");
                engine.unmount_session(id).await.unwrap();
            }
            _ => unreachable!("{line}"),
        }
    }
}

#[test]
fn what_was_acknowledged_survives_a_power_cut() {
    if let Some(disk) = std::env::var_os(ROOT) {
        let kind = std::env::var(KIND).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        return runtime.block_on(script(Path::new(&disk), &kind));
    }
    isolated_async(TEST, async |directory| {
        let seed = std::env::var("AETHER_TEST_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
        println!("AETHER_TEST_SEED={seed} tries the same times again");
        let mut random = StdRng::seed_from_u64(seed);
        for kind in ["image", "directory"] {
            let directory = directory.join(kind);
            fs::create_dir(&directory).unwrap();
            let journal = directory.join("journal");
            File::create(&journal).unwrap();
            let disk = Disk::new(&directory);
            for cut in 1..=CUTS {
                work_until_cut(&disk, kind, &journal, &mut random);
                let acknowledged = lines(&journal);
                let context = format!("{kind} pool, seed {seed}, cut {cut}");
                check(&disk, kind, &acknowledged, &context).await;
                println!("{context}: {} acknowledged, all there", acknowledged.len());
            }
            disk.off();
        }
    });
}
