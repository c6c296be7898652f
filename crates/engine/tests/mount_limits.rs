//! Real kernel: what a session may take up, sessions in memory, and pools that are full or fail.

mod support;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use aether_engine::pool::{Limits, Medium, PoolConfig, Reached};
use aether_engine::testing::isolated_async;
use aether_engine::{Config, Engine, Error};
use support::{OWNER, Source, engine, read_tree};

const MIB: u64 = 1 << 20;

fn quiet() -> impl Fn(aether_cas::transfer::Progress) + Send + Sync {
    |_| {}
}

fn bytes(limit: u64) -> Limits {
    Limits { bytes: Some(limit), inodes: None }
}

async fn session(engine: &Engine, source: &Source, id: &str, limits: Limits) -> PathBuf {
    session_on(Medium::Disk, engine, source, id, limits).await
}

async fn session_on(medium: Medium, engine: &Engine, source: &Source, id: &str, limits: Limits) -> PathBuf {
    let image = engine.ensure_image(source.root, OWNER, &source.store, &quiet()).await.unwrap();
    engine.create_session_on(medium, id, &image).await.unwrap();
    engine.set_limits(id, limits).await.unwrap();
    engine.mount_session(id).await.unwrap()
}

/// Bytes that nothing compresses or shares, different for each seed.
fn noise(seed: u64, length: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap());
    while bytes.len() < usize::try_from(length).unwrap() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(usize::try_from(length).unwrap());
    bytes
}

/// Writes up to `length` bytes and brings them to disk. Returns how many were, and what stopped the writer.
fn fill(path: &Path, length: u64) -> (u64, Option<io::Error>) {
    let mut done = 0;
    let mut run = || {
        let mut file = File::create(path)?;
        let written = (|| {
            while done < length {
                let chunk = noise(done + 1, MIB.min(length - done));
                file.write_all(&chunk)?;
                done += chunk.len() as u64;
            }
            Ok(())
        })();
        written.and(file.sync_all())
    };
    let result: io::Result<()> = run();
    (done, result.err())
}

/// Removes a file that may not even have been made.
fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => panic!("{}: {error}", path.display()),
        _ => {}
    }
}

/// Writes files beneath `directory`, large ones first, until not even a small one goes in. Returns them.
fn fill_up(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for size in [1 << 30, MIB, 64 << 10, 4096] {
        for _ in 0..64 {
            let path = directory.join(format!("filler-{}", files.len()));
            let (_, error) = fill(&path, size);
            files.push(path);
            if let Some(error) = error {
                assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");
                break;
            }
        }
    }
    files
}

fn is_quota(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::QuotaExceeded
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A file with a file system on it, mounted over a loop device in this test's own namespace.
fn disk(path: &Path, size: u64, mkfs: &[&str], options: &str) -> PathBuf {
    let image = path.with_extension("img");
    File::create(&image).unwrap().set_len(size).unwrap();
    run(Command::new(mkfs[0]).args(&mkfs[1..]).arg(&image));
    fs::create_dir_all(path).unwrap();
    run(Command::new("mount").args(["-o", &format!("loop,{options}")]).arg(&image).arg(path));
    path.to_owned()
}

fn small_pool() -> PoolConfig {
    PoolConfig::Image { bytes: 400 * MIB }
}

#[test]
fn a_writer_is_stopped_at_its_limit_and_its_neighbour_is_not() {
    isolated_async("a_writer_is_stopped_at_its_limit_and_its_neighbour_is_not", async |root| {
        let source = Source::new().await;
        let engine = engine(&root.join("e"), small_pool()).await;
        assert!(engine.kernel().works("limits of sessions"), "{}", engine.kernel());
        let view = session(&engine, &source, "s", bytes(50 * MIB)).await;
        let neighbour = session(&engine, &source, "n", Limits::default()).await;

        let (written, error) = fill(&view.join("big"), 100 * MIB);
        assert!(is_quota(&error.unwrap()));
        assert!((45 * MIB..=50 * MIB).contains(&written), "{written}");
        let usage = engine.usage("s").await.unwrap();
        assert!(usage.usage.bytes > 45 * MIB && usage.usage.bytes <= 50 * MIB, "{usage:?}");
        assert_eq!((usage.reached, usage.counted_only), (Some(Reached::Bytes), None));
        assert_eq!(engine.keep_limits().await.unwrap(), [("s".to_owned(), Reached::Bytes)]);
        assert_eq!(fill(&neighbour.join("big"), 60 * MIB).0, 60 * MIB);

        // Raised while it is written: the same open file goes on.
        let mut file = File::options().append(true).open(view.join("big")).unwrap();
        engine.set_limits("s", bytes(80 * MIB)).await.unwrap();
        file.write_all(&noise(9, 20 * MIB)).unwrap();
        file.sync_all().unwrap();
        drop(file);
        assert_eq!(engine.keep_limits().await.unwrap(), []);

        // Lowered under what it holds: it writes nothing more until it has removed enough.
        engine.set_limits("s", bytes(30 * MIB)).await.unwrap();
        assert!(is_quota(&fill(&view.join("more"), MIB).1.unwrap()));
        fs::remove_file(view.join("big")).unwrap();
        assert_eq!(fill(&view.join("more"), 20 * MIB).0, 20 * MIB);

        // It outlives the engine; base files count once they are written.
        drop(engine);
        let engine = support::engine(&root.join("e"), small_pool()).await;
        assert_eq!(engine.session("s").await.unwrap().limits, bytes(30 * MIB));
        assert!(is_quota(&fill(&view.join("src/part-39"), 20 * MIB).1.unwrap()));
        engine.set_limits("s", Limits::default()).await.unwrap();
        assert_eq!(fill(&view.join("src/part-39"), 60 * MIB).0, 60 * MIB);
        assert!(matches!(engine.set_limits("s", bytes(0)).await, Err(Error::Invalid { .. })));
        assert!(matches!(engine.set_limits("x", bytes(1)).await, Err(Error::NotFound { .. })));
        assert_eq!(engine.fsck().await.unwrap(), Vec::<String>::new());
    });
}

#[test]
fn what_checkpoints_and_forks_keep_is_not_held_against_a_session() {
    isolated_async("what_checkpoints_and_forks_keep_is_not_held_against_a_session", async |root| {
        let source = Source::new().await;
        let engine = engine(root, PoolConfig::Image { bytes: 900 * MIB }).await;
        let view = session(&engine, &source, "s", bytes(50 * MIB)).await;
        // 20 MB rewritten ten times with a checkpoint of each: 200 MB are kept by the objects and charged to the session.
        for round in 0..10 {
            fs::write(view.join("file"), noise(round, 20 * MIB)).unwrap();
            let name = format!("cp{round}");
            engine.snapshot("s", &name, &[], None).await.unwrap();
            engine.digest(&name).await.unwrap();
            engine.delete_snapshot(&name).await.unwrap();
        }
        assert_eq!(engine.keep_limits().await.unwrap(), []);
        let used = engine.usage("s").await.unwrap().usage.bytes;
        assert!((20 * MIB..25 * MIB).contains(&used), "{used}");

        // All of what is left to it can be written at once, although a snapshot holds what was there.
        engine.snapshot("s", "held", &[], None).await.unwrap();
        fs::write(view.join("file"), noise(77, 45 * MIB)).unwrap();
        assert_eq!(engine.keep_limits().await.unwrap(), []);

        // And no more than that: at the latest when the limits were looked after.
        assert!(is_quota(&fill(&view.join("more"), 200 * MIB).1.unwrap()));
        assert_eq!(engine.keep_limits().await.unwrap(), [("s".to_owned(), Reached::Bytes)]);
        assert!(is_quota(&fill(&view.join("yet-more"), 4 * MIB).1.unwrap()));
        fs::remove_file(view.join("more")).unwrap();
        fs::write(view.join("file"), noise(78, 20 * MIB)).unwrap();

        // A fork begins with nothing charged to it, whatever it shares, and has its own limit.
        engine.snapshot("s", "moment", &[], None).await.unwrap();
        engine.fork_session("f", "moment").await.unwrap();
        engine.set_limits("f", bytes(15 * MIB)).await.unwrap();
        let fork = engine.mount_session("f").await.unwrap();
        assert_eq!(fs::metadata(fork.join("file")).unwrap().len(), 20 * MIB);
        assert!(engine.usage("f").await.unwrap().usage.bytes < 2 * MIB);
        assert_eq!(fill(&fork.join("own"), 10 * MIB).0, 10 * MIB);
        assert!(is_quota(&fill(&fork.join("too-much"), 10 * MIB).1.unwrap()));
        // What the fork keeps of its parent leaves the parent its whole limit.
        fs::remove_file(view.join("file")).unwrap();
        assert_eq!(fill(&view.join("again"), 45 * MIB).0, 45 * MIB);
        assert_eq!(fs::read(fork.join("file")).unwrap(), noise(78, 20 * MIB));
        assert_eq!(engine.fsck().await.unwrap(), Vec::<String>::new());
    });
}

#[test]
fn a_restore_that_would_pass_the_limit_touches_nothing() {
    isolated_async("a_restore_that_would_pass_the_limit_touches_nothing", async |root| {
        let source = Source::new().await;
        let engine = engine(root, PoolConfig::Image { bytes: 512 * MIB }).await;
        let view = session(&engine, &source, "s", bytes(64 * MIB)).await;
        fs::write(view.join("large"), noise(1, 20 * MIB)).unwrap();
        engine.snapshot("s", "large", &[], None).await.unwrap();
        let large = engine.digest("large").await.unwrap().root;
        engine.delete_snapshot("large").await.unwrap();
        fs::remove_file(view.join("large")).unwrap();
        fs::write(view.join("small"), noise(2, 5 * MIB)).unwrap();
        let before = read_tree(&view);
        engine.set_limits("s", bytes(15 * MIB)).await.unwrap();
        let error = engine.restore_in_place("s", "safety", large, &[], &source.store).await.unwrap_err();
        assert!(error.to_string().contains("raise the session's limit"), "{error}");
        assert_eq!(read_tree(&view), before);
        assert!(
            engine.snapshot_record("safety").await.unwrap_err().is_not_found(),
            "so there is nothing to go back to"
        );
        engine.set_limits("s", bytes(64 * MIB)).await.unwrap();
        engine.restore_in_place("s", "safety", large, &[], &source.store).await.unwrap();
        assert!(fs::read(view.join("large")).unwrap() == noise(1, 20 * MIB));
    });
}

#[test]
fn inodes_are_limited() {
    isolated_async("inodes_are_limited", async |root| {
        let source = Source::new().await;
        let engine = engine(root, small_pool()).await;
        let limits = Limits { bytes: Some(100 * MIB), inodes: Some(500) };
        let view = session(&engine, &source, "s", limits).await;
        let create = |number: u32| File::create(view.join(format!("f{number}"))).map(drop);
        for number in 0..600 {
            // btrfs has no such limit itself, so these pass until somebody counts.
            create(number).unwrap();
        }
        assert_eq!(engine.keep_limits().await.unwrap(), [("s".to_owned(), Reached::Inodes)]);
        let used = engine.usage("s").await.unwrap();
        assert!((600..620).contains(&used.usage.inodes.unwrap()), "{used:?}");
        assert!(is_quota(&create(600).unwrap_err()));
        for number in 0..300 {
            fs::remove_file(view.join(format!("f{number}"))).unwrap();
        }
        assert_eq!(engine.keep_limits().await.unwrap(), []);
        create(600).unwrap();
        engine.set_limits("s", Limits { inodes: Some(5), ..limits }).await.unwrap();
        assert!(is_quota(&create(601).unwrap_err()));
        engine.set_limits("s", Limits { inodes: Some(5000), ..limits }).await.unwrap();
        create(601).unwrap();
    });
}

#[test]
fn a_directory_pool_counts_and_says_that_it_only_counts() {
    isolated_async("a_directory_pool_counts_and_says_that_it_only_counts", async |root| {
        let source = Source::new().await;
        let engine = engine(root, PoolConfig::Directory).await;
        assert!(!engine.kernel().works("limits of sessions"));
        let view = session(&engine, &source, "s", Limits { bytes: Some(MIB), inodes: Some(50) }).await;
        assert_eq!(engine.keep_limits().await.unwrap(), []);
        fs::write(view.join("big"), noise(1, 2 * MIB)).unwrap();
        let usage = engine.usage("s").await.unwrap();
        assert_eq!((usage.reached, usage.usage.inodes), (Some(Reached::Bytes), Some(1)));
        assert!(usage.counted_only.unwrap().contains("btrfs"));
        assert_eq!(engine.keep_limits().await.unwrap(), [("s".to_owned(), Reached::Bytes)]);
        engine.set_limits("s", bytes(4 * MIB)).await.unwrap();
        assert_eq!(engine.keep_limits().await.unwrap(), []);
    });
}

#[test]
fn sessions_in_memory_fork_are_limited_and_go_with_it() {
    isolated_async("sessions_in_memory_fork_are_limited_and_go_with_it", async |root| {
        let source = Source::new().await;
        let root = root.join("e");
        let config = || Config { pool: small_pool(), memory: Some(300 * MIB), ..Config::new(&root) };
        let engine = Engine::open(config()).await.unwrap();
        let view = session_on(Medium::Memory, &engine, &source, "m", bytes(50 * MIB)).await;
        let on_disk = session(&engine, &source, "d", Limits::default()).await;
        assert_eq!(read_tree(&view), source.expected());
        assert!(engine.create_session("m", &engine.session("d").await.unwrap().image).await.is_err());
        let before = engine.statistics().await.unwrap();
        fs::write(view.join("file"), noise(1, 40 * MIB)).unwrap();
        File::open(view.join("file")).unwrap().sync_all().unwrap();
        fs::write(view.join("docs/readme"), "changed").unwrap();
        let after = engine.statistics().await.unwrap();
        let left = |statistics: &aether_engine::NodeStatistics| statistics.memory.unwrap().available_bytes;
        assert!(left(&before).saturating_sub(left(&after)) >= 39 * MIB, "{before:?} {after:?}");
        assert!(before.space.available_bytes.saturating_sub(after.space.available_bytes) < 10 * MIB);
        assert!(is_quota(&fill(&view.join("more"), 20 * MIB).1.unwrap()));
        fs::remove_file(view.join("more")).unwrap();

        // Snapshot, fork and digest as on disk; the fork keeps the medium and shares the space.
        let expected = read_tree(&view);
        engine.snapshot("m", "cp", &[], None).await.unwrap();
        engine.fork_session("f", "cp").await.unwrap();
        assert_eq!(engine.session("f").await.unwrap().medium, Medium::Memory);
        let fork = engine.mount_session("f").await.unwrap();
        assert_eq!(read_tree(&fork), expected);
        let shared = engine.statistics().await.unwrap();
        assert!(left(&after).saturating_sub(left(&shared)) < 20 * MIB);
        let digested = engine.digest("cp").await.unwrap();
        fs::write(view.join("later"), "unsaved").unwrap();
        fs::write(on_disk.join("kept"), "on disk").unwrap();
        File::open(on_disk.join("kept")).unwrap().sync_all().unwrap();

        // The driver's end changes nothing: the memory stays mounted, also when the next driver is to have none.
        drop(engine);
        let engine = Engine::open(Config { memory: None, ..config() }).await.unwrap();
        assert_eq!(engine.session("m").await.unwrap().medium, Medium::Memory);
        drop(engine);
        let engine = Engine::open(config()).await.unwrap();
        assert_eq!(fs::read_to_string(engine.mount_session("m").await.unwrap().join("later")).unwrap(), "unsaved");
        for id in ["m", "f", "d"] {
            engine.unmount_session(id).await.unwrap();
        }

        // The machine's end does: what was on disk is there, what was in memory begins again from its durable tree.
        drop(engine);
        aether_engine::mount::unmount_below(&root.join("mnt")).unwrap();
        aether_engine::mount::unmount_below(&root.join("memory")).unwrap();
        let engine = Engine::open(config()).await.unwrap();
        assert!(matches!(engine.session("m").await, Err(Error::NotFound { .. })));
        assert!(engine.snapshots().await.unwrap().is_empty());
        let disk_view = engine.mount_session("d").await.unwrap();
        assert_eq!(fs::read_to_string(disk_view.join("kept")).unwrap(), "on disk");
        let image = engine.ensure_image(digested.root, OWNER, &source.store, &quiet()).await.unwrap();
        engine.create_session_on(Medium::Memory, "m", &image).await.unwrap();
        assert_eq!(read_tree(&engine.mount_session("m").await.unwrap()), expected);
        assert_eq!(engine.fsck().await.unwrap(), Vec::<String>::new());

        let without = support::engine(&root.with_extension("without"), small_pool()).await;
        let image = without.ensure_image(source.root, OWNER, &source.store, &quiet()).await.unwrap();
        let refused = without.create_session_on(Medium::Memory, "m", &image).await.unwrap_err();
        assert!(refused.to_string().contains("memorySize"), "{refused}");
    });
}

#[test]
fn a_full_pool_loses_nothing_and_goes_on_when_there_is_room() {
    isolated_async("a_full_pool_loses_nothing_and_goes_on_when_there_is_room", async |root| {
        let source = Source::new().await;
        let engine = engine(root, PoolConfig::Image { bytes: 256 * MIB }).await;
        let view = session(&engine, &source, "s", Limits::default()).await;
        fs::write(view.join("kept"), noise(5, 4 * MIB)).unwrap();
        File::open(view.join("kept")).unwrap().sync_all().unwrap();
        engine.snapshot("s", "before", &[], None).await.unwrap();
        engine.digest("before").await.unwrap();
        let expected = read_tree(&view);

        let fillers = fill_up(&view);
        let usage = engine.usage("s").await.unwrap();
        assert!(usage.space.available_bytes < MIB && !usage.space.read_only, "{usage:?}");
        // What a checkpoint needs beyond a snapshot is room for contents; it says which pool lacks it.
        if let Err(error) = engine.snapshot("s", "full", &[], None).await {
            assert!(matches!(&error, Error::Full { what, .. } if what.contains("pool")), "{error}");
        }
        let image = engine.ensure_image(source.root, OWNER, &source.store, &quiet()).await.unwrap();
        for number in 0..50 {
            if let Err(error) = engine.create_session(&format!("new{number}"), &image).await {
                assert!(error.to_string().contains(&format!("new{number}")), "{error}");
            }
        }
        assert!(!engine.pool_state().await.unwrap().read_only);

        for path in fillers {
            remove(&path);
        }
        engine.delete_snapshot("full").await.unwrap();
        assert_eq!(read_tree(&view), expected);
        engine.snapshot("s", "after", &[], None).await.unwrap();
        engine.digest("after").await.unwrap();
        for number in 0..50 {
            engine.delete_session(&format!("new{number}")).await.unwrap();
        }
        assert_eq!(engine.fsck().await.unwrap(), Vec::<String>::new());
    });
}

#[test]
fn a_pool_that_became_read_only_is_noticed_and_brought_back() {
    isolated_async("a_pool_that_became_read_only_is_noticed_and_brought_back", async |root| {
        let source = Source::new().await;
        // A pool on a device whose storage is promised and not there: a sparse file on a disk that fills up.
        let host = disk(&root.join("host"), 400 * MIB, &["mkfs.ext4", "-q", "-m", "0"], "rw");
        let sparse = host.join("sparse.img");
        File::create(&sparse).unwrap().set_len(1 << 30).unwrap();
        run(Command::new("mkfs.btrfs").args(["-q", "-m", "single", "-d", "single"]).arg(&sparse));
        let output = Command::new("losetup").args(["--find", "--show"]).arg(&sparse).output().unwrap();
        let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
        let _loop = Detach(device.clone());
        let pool = PoolConfig::Device(device);
        let engine = engine(&root.join("e"), pool.clone()).await;
        let view = session(&engine, &source, "s", Limits::default()).await;
        fs::write(view.join("kept"), noise(5, 4 * MIB)).unwrap();
        File::open(view.join("kept")).unwrap().sync_all().unwrap();
        engine.snapshot("s", "before", &[], None).await.unwrap();
        let durable = engine.digest("before").await.unwrap();
        let target = root.join("pod");
        engine.publish("s", &target, false).await.unwrap();

        // The host's disk fills, then the session goes on writing.
        fs::create_dir(host.join("neighbour")).unwrap();
        fill_up(&host.join("neighbour"));
        let mut attempts = 0;
        while !engine.pool_state().await.unwrap().read_only {
            attempts += 1;
            assert!(attempts < 200, "the pool goes on as if nothing were the matter");
            // Small files lie in the metadata, which the kernel cannot do without; some of it goes where the image
            // had blocks already.
            let made = (0..500).try_for_each(|n| fs::write(target.join(format!("lost-{attempts}-{n}")), [1; 1900]));
            let synced = File::open(&target).and_then(|directory| Ok(rustix::fs::syncfs(directory)?));
            if let Err(error) = made.and(synced) {
                println!("attempt {attempts}: {error}");
            }
        }
        let state = engine.pool_state().await.unwrap();
        assert!(state.message.contains("read-only") && state.message.contains("dmesg"), "{}", state.message);
        assert!(fs::write(target.join("x"), "x").is_err());
        let refused = engine.snapshot("s", "stuck", &[], None).await.unwrap_err();
        assert_eq!(refused.io_kind(), Some(io::ErrorKind::ReadOnlyFilesystem), "{refused}");
        assert!(refused.to_string().contains("snapshots/stuck"), "{refused}");

        // With room on the host again it comes back, once no pod is in the way; which one is, is said.
        fs::remove_dir_all(host.join("neighbour")).unwrap();
        let busy = engine.recover_pool().await.unwrap_err();
        assert!(matches!(&busy, Error::Busy { by, .. } if by.contains(target.to_str().unwrap())), "{busy}");
        engine.unpublish(&target).await.unwrap();
        let state = engine.recover_pool().await.unwrap();
        assert!(state.read_only && state.reopen, "{state:?}");
        drop(engine);
        let engine = support::engine(&root.join("e"), pool).await;
        assert!(!engine.pool_state().await.unwrap().read_only);
        let view = engine.mount_session("s").await.unwrap();
        assert_eq!(fs::read(view.join("kept")).unwrap(), noise(5, 4 * MIB));
        fs::write(view.join("new"), "goes on").unwrap();
        engine.snapshot("s", "after", &[], None).await.unwrap();
        engine.digest("after").await.unwrap();
        assert_eq!(engine.digest("before").await.unwrap(), durable);
        assert_eq!(engine.fsck().await.unwrap(), Vec::<String>::new());
        // Nothing to do is no error.
        assert!(!engine.recover_pool().await.unwrap().read_only);
        engine.unmount_session("s").await.unwrap();
    });
}

/// Frees a loop device, also when the test fails; the kernel does it when the last mount of it is gone.
struct Detach(PathBuf);

impl Drop for Detach {
    fn drop(&mut self) {
        run(Command::new("losetup").arg("--detach").arg(&self.0));
    }
}

#[test]
fn a_full_index_disk_is_named_and_loses_no_record() {
    isolated_async("a_full_index_disk_is_named_and_loses_no_record", async |root| {
        let source = Source::new().await;
        let root = root.join("e");
        fs::create_dir_all(root.join("index")).unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=16m", "index"]).arg(root.join("index")));
        let engine = engine(&root, small_pool()).await;
        let view = session(&engine, &source, "s", Limits::default()).await;
        fs::write(view.join("kept"), "kept").unwrap();
        engine.snapshot("s", "before", &[], None).await.unwrap();
        let filler = root.join("index/filler");
        let file = File::create(&filler).unwrap();
        let mut at = 0;
        while file.write_all_at(&[1; 4096], at).is_ok() {
            at += 4096;
        }
        // Until the log of the records needs a page more.
        let mut acknowledged = vec!["before".to_owned()];
        let refused = loop {
            let name = format!("cp{}", acknowledged.len());
            match engine.snapshot("s", &name, &[], None).await {
                Ok(_) => acknowledged.push(name),
                Err(error) => break error,
            }
            assert!(acknowledged.len() < 200, "the full disk is not noticed");
        };
        let said = refused.to_string();
        assert!(said.contains("index/state") && said.contains("No space left") && said.contains("restart"), "{said}");
        // A pod that writes does not notice.
        fs::write(view.join("kept"), "kept on").unwrap();

        drop(file);
        fs::remove_file(&filler).unwrap();
        let named = |engine: &Engine| {
            let engine = engine.clone();
            async move {
                let mut names: Vec<_> = engine.snapshots().await.unwrap().into_iter().map(|found| found.id).collect();
                names.sort();
                names
            }
        };
        acknowledged.sort();
        assert_eq!(named(&engine).await, acknowledged, "what was refused is not half there");
        drop(engine);
        let engine = support::engine(&root, small_pool()).await;
        engine.snapshot("s", "z-after", &[], None).await.unwrap();
        acknowledged.push("z-after".into());
        assert_eq!(named(&engine).await, acknowledged);
        assert_eq!(fs::read_to_string(engine.mount_session("s").await.unwrap().join("kept")).unwrap(), "kept on");
        assert_eq!(engine.fsck().await.unwrap(), Vec::<String>::new());
    });
}
