//! Real kernel: how long a snapshot holds its writers still.

#[path = "support/cgroup.rs"]
mod cgroup;
#[path = "support/process.rs"]
mod process;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aether_cas::MemoryStore;
use aether_cas::tree::{Attributes, Directory, Owner};
use aether_engine::pool::PoolConfig;
use aether_engine::testing::isolated_async;
use aether_engine::{Config, Consistency, Engine, mount};
use cgroup::Cgroup;

const OWNER: Owner = Owner { uid: 0, gid: 0 };
const MEGABYTE: usize = 1 << 20;

/// An engine with one session `s` on an empty tree.
async fn engine(root: &Path, freeze_limit: Duration) -> (Engine, PathBuf) {
    let pool = PoolConfig::Image { bytes: 1 << 30 };
    let engine = Engine::open(Config { pool, freeze_limit, ..Config::new(root) }).await.unwrap();
    let store = MemoryStore::new();
    let attributes = Attributes { mode: 0o755, ..Attributes::default() };
    let empty = Directory { attributes, entries: Default::default() };
    store.put(empty.encode());
    let image = engine.ensure_image(empty.blob(), OWNER, &store, &|_| {}).await.unwrap();
    engine.create_session("s", &image).await.unwrap();
    let view = engine.mount_session("s").await.unwrap();
    (engine, view)
}

fn wait_for(what: &Path) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !what.exists() {
        assert!(Instant::now() < deadline, "{} never appeared", what.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What was written before is written back before the freeze, not in it: else the writer would be held for nearly all of
/// every snapshot, however slow the disk is just now. One in which it was not shows that it need not be.
#[test]
fn data_just_written_does_not_prolong_the_freeze() {
    isolated_async("data_just_written_does_not_prolong_the_freeze", async |root| {
        // A limit that load does not reach.
        let (engine, view) = engine(root, Duration::from_secs(60)).await;
        let cgroup = Cgroup::new("quiet");
        let _writer = cgroup.shell("while :; do sleep 0.01; done", &view);
        let mut shares = Vec::new();
        for round in 0..10_u8 {
            // Each time another file: btrfs writes one that was emptied back as soon as it is closed.
            fs::write(view.join(format!("large{round}")), vec![round; 100 * MEGABYTE]).unwrap();
            let started = Instant::now();
            let cgroups = std::slice::from_ref(&cgroup.0);
            let taken = engine.snapshot("s", &format!("cp{round}"), cgroups, None).await.unwrap();
            let took = started.elapsed();
            assert_eq!(taken.consistency, Consistency::PointInTime, "{taken:?}");
            println!("100 MB just written: {took:?}, frozen for {} us of it", taken.frozen_micros);
            let share = taken.frozen_micros as f64 / took.as_micros() as f64;
            if share < 0.5 {
                return;
            }
            shares.push(share);
            engine.delete_snapshot(&format!("cp{round}")).await.unwrap();
            fs::remove_file(view.join(format!("large{round}"))).unwrap();
        }
        panic!("the writer was held for most of each snapshot: {shares:?}");
    });
}

/// A freeze ends at its limit, and says so, whatever is being written meanwhile.
#[test]
fn a_freeze_beside_a_heavy_writer_is_within_its_limit_or_reported() {
    isolated_async("a_freeze_beside_a_heavy_writer_is_within_its_limit_or_reported", async |root| {
        let limit = Duration::from_secs(2);
        let (engine, view) = engine(root, limit).await;
        // Rewrites the same hundred megabytes, so that the pool does not fill up.
        let script = "cd \"$1\"; n=0; while :; do dd if=/dev/zero of=large bs=1M count=100 conv=notrunc status=none; \
                      n=$((n+1)); echo $n >rounds; done";
        let cgroup = Cgroup::new("heavy");
        let _writer = cgroup.shell(script, &view);
        wait_for(&view.join("rounds"));
        for round in 0..5 {
            let cgroups = std::slice::from_ref(&cgroup.0);
            let taken = engine.snapshot("s", &format!("cp{round}"), cgroups, None).await.unwrap();
            println!("beside a heavy writer: frozen for {} us, {:?}", taken.frozen_micros, taken.consistency);
            match taken.consistency {
                Consistency::PointInTime => {
                    // Whoever ends it at the limit may have to wait for a processor himself.
                    let held = Duration::from_micros(taken.frozen_micros);
                    assert!(taken.reason.is_none() && held < limit + Duration::from_secs(30), "{taken:?}");
                }
                Consistency::PerFile => assert!(taken.reason.is_some(), "{taken:?}"),
            }
            engine.delete_snapshot(&format!("cp{round}")).await.unwrap();
            let rounds = || fs::read_to_string(view.join("rounds")).unwrap();
            let before = rounds();
            let deadline = Instant::now() + Duration::from_secs(120);
            while rounds() == before {
                assert!(Instant::now() < deadline, "the writer was not thawed");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    });
}

/// A limit that cannot be kept is no reason to fail: the copy is made, and says what it is.
#[test]
fn a_freeze_that_takes_too_long_is_reported() {
    isolated_async("a_freeze_that_takes_too_long_is_reported", async |root| {
        // No freeze is as short as this.
        let (engine, view) = engine(root, Duration::from_nanos(1)).await;
        let cgroup = Cgroup::new("limit");
        let _writer = cgroup.shell("cd \"$1\"; n=0; while :; do n=$((n+1)); echo $n >rounds; done", &view);
        wait_for(&view.join("rounds"));
        let taken = engine.snapshot("s", "cp", std::slice::from_ref(&cgroup.0), None).await.unwrap();
        assert_eq!(taken.consistency, Consistency::PerFile);
        let reason = taken.reason.unwrap();
        assert!(reason.contains("time limit"), "{reason}");
        let before = fs::read_to_string(view.join("rounds")).unwrap();
        let deadline = Instant::now() + Duration::from_secs(120);
        while fs::read_to_string(view.join("rounds")).unwrap() == before {
            assert!(Instant::now() < deadline, "the writer was not thawed");
            std::thread::sleep(Duration::from_millis(5));
        }
    });
}

/// What a pool may hold back from disk is bounded, whatever other disks do.
#[test]
fn a_pool_holds_little_back_from_disk() {
    isolated_async("a_pool_holds_little_back_from_disk", async |root| {
        let (_engine, _view) = engine(root, Duration::from_secs(2)).await;
        let pool = mount::find_mount(&root.join("pool")).unwrap().unwrap();
        let device = pool.source.file_name().unwrap();
        let mut entries = fs::read_dir("/sys/fs/btrfs").unwrap().map(|entry| entry.unwrap().path());
        let own = entries.find(|path| path.join("devices").join(device).exists()).expect("the pool's file system");
        let number =
            |file: &str| fs::read_to_string(own.join("bdi").join(file)).unwrap().trim().parse::<u64>().unwrap();
        assert_eq!(number("strict_limit"), 1);
        // The kernel keeps it as millionths of what all disks together may hold back.
        let bytes = number("max_bytes");
        assert!((400 << 20..600 << 20).contains(&bytes), "{bytes}");
    });
}
