//! Real kernel: the engine's facade from a tree in a store to a session, its copies and back.

#[path = "support/cgroup.rs"]
mod cgroup;
#[path = "support/process.rs"]
mod process;
mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use aether_cas::MemoryStore;
use aether_cas::tree::Owner;
use aether_engine::pool::PoolConfig;
use aether_engine::testing::isolated_async;
use aether_engine::{Config, Consistency, Engine, Error, mount};
use cgroup::Cgroup;
use support::{OWNER, Source, engine, read_tree};

fn quiet() -> impl Fn(aether_cas::transfer::Progress) + Send + Sync {
    |_| {}
}

/// Both kinds of pool keep the same promises.
const POOLS: [fn() -> PoolConfig; 2] = [|| PoolConfig::Image { bytes: 300 << 20 }, || PoolConfig::Directory];

async fn session(engine: &Engine, source: &Source, id: &str) -> std::path::PathBuf {
    let image = engine.ensure_image(source.root, OWNER, &source.store, &quiet()).await.unwrap();
    engine.create_session(id, &image).await.unwrap();
    engine.mount_session(id).await.unwrap()
}

#[test]
fn a_session_lives_from_store_to_store() {
    isolated_async("a_session_lives_from_store_to_store", async |root| {
        for (index, pool) in POOLS.into_iter().enumerate() {
            let root = root.join(index.to_string());
            let source = Source::new().await;
            let engine = engine(&root, pool()).await;
            println!("{}", engine.kernel());
            let view = session(&engine, &source, "s1").await;
            assert_eq!(fs::metadata(&view).unwrap().uid(), OWNER.uid);
            assert_eq!(fs::metadata(&view).unwrap().permissions().mode() & 0o7777, 0o755);
            assert_eq!(read_tree(&view), source.expected());

            // Publishing twice is one mount; another mode is refused; read-only is read-only.
            let target = root.join("pod/volume");
            engine.publish("s1", &target, false).await.unwrap();
            engine.publish("s1", &target, false).await.unwrap();
            assert!(matches!(engine.publish("s1", &target, true).await, Err(Error::AlreadyExists { .. })));
            let reader = root.join("pod/reader");
            engine.publish("s1", &reader, true).await.unwrap();
            assert!(fs::write(reader.join("x"), "x").is_err());
            assert_eq!(engine.published("s1").await.unwrap(), [target.clone(), reader.clone()]);

            fs::write(target.join("new"), "new contents").unwrap();
            fs::write(target.join("docs/readme"), "changed").unwrap();
            fs::remove_file(target.join("src/main.c")).unwrap();
            fs::rename(target.join("src"), target.join("source")).unwrap();
            let changed = read_tree(&target);

            let taken = engine.snapshot("s1", "cp1", &[], None).await.unwrap();
            assert_eq!(taken.consistency, Consistency::PointInTime);
            fs::write(target.join("new"), "later").unwrap();
            let digested = engine.digest("cp1").await.unwrap();
            assert_eq!((digested.own_bytes, digested.read_files), (19, 2));
            assert_eq!(engine.digest("cp1").await.unwrap(), digested);

            // A fork sees the moment of the snapshot, and neither sees the other's changes.
            engine.fork_session("s2", "cp1").await.unwrap();
            let fork = engine.mount_session("s2").await.unwrap();
            assert_eq!(read_tree(&fork), changed);
            fs::write(fork.join("only-here"), "x").unwrap();
            assert!(!target.join("only-here").exists());
            assert_eq!(fs::read_to_string(target.join("new")).unwrap(), "later");

            // Another node gets the tree from the store.
            let remote = MemoryStore::new();
            engine.upload(digested.root, &remote, &quiet()).await.unwrap();
            let other = root.join("other");
            let second = support::engine(&other, pool()).await;
            let image = second.ensure_image(digested.root, OWNER, &remote, &quiet()).await.unwrap();
            second.create_session("s1", &image).await.unwrap();
            assert_eq!(read_tree(&second.mount_session("s1").await.unwrap()), changed);
            second.publish_image(&image, &other.join("view")).await.unwrap();
            second.publish_image(&image, &other.join("view")).await.unwrap();
            assert_eq!(read_tree(&other.join("view")), changed);
            assert!(fs::write(other.join("view/x"), "x").is_err());
            assert!(second.gc().await.unwrap().is_empty());

            // Restored in place: a process keeps its working directory, an open file its old contents.
            let held = fs::File::open(target.join("docs/readme")).unwrap();
            let before = read_tree(&target);
            let report = engine.restore_in_place("s1", "safety", source.root, &[], &source.store).await.unwrap();
            assert_eq!(report.root, source.root);
            assert_eq!(read_tree(&target), source.expected());
            // What was there before is the snapshot, which no second restore takes for its own.
            engine.fork_session("before", "safety").await.unwrap();
            assert_eq!(read_tree(&engine.mount_session("before").await.unwrap()), before);
            engine.delete_session("before").await.unwrap();
            let again = engine.restore_in_place("s1", "safety", source.root, &[], &source.store).await;
            assert!(matches!(again, Err(Error::AlreadyExists { .. })), "{again:?}");
            engine.delete_snapshot("safety").await.unwrap();
            assert_eq!(std::io::read_to_string(held).unwrap(), "changed");

            for path in [&target, &reader] {
                assert!(matches!(engine.unmount_session("s1").await, Err(Error::Busy { .. })));
                engine.unpublish(path).await.unwrap();
                engine.unpublish(path).await.unwrap();
                assert!(!path.exists());
            }
            assert_eq!(engine.fsck().await.unwrap(), Vec::<String>::new());
            engine.delete_session("s1").await.unwrap();
            engine.delete_session("s1").await.unwrap();
            engine.delete_snapshot("cp1").await.unwrap();
            assert_eq!(engine.sessions().await.unwrap().len(), 1);
            engine.delete_session("s2").await.unwrap();
            assert_eq!(engine.gc().await.unwrap().len(), 1);
            assert!(mount::table().unwrap().iter().all(|entry| !entry.target.starts_with(root.join("mnt/session"))));
            let statistics = engine.statistics().await.unwrap();
            assert_eq!((statistics.sessions, statistics.snapshots, statistics.images), (0, 0, 0));
            assert_eq!(engine.fsck().await.unwrap(), Vec::<String>::new());
        }
    });
}

#[test]
fn an_upper_is_used_again_only_for_its_own_head() {
    isolated_async("an_upper_is_used_again_only_for_its_own_head", async |root| {
        let source = Source::new().await;
        let engine = engine(root, PoolConfig::Image { bytes: 300 << 20 }).await;
        let view = session(&engine, &source, "s").await;
        fs::write(view.join("new"), "x").unwrap();
        assert!(matches!(engine.digest_session("s").await, Err(Error::Busy { .. })));
        engine.unmount_session("s").await.unwrap();
        let head = engine.digest_session("s").await.unwrap().root;
        assert_eq!(engine.session("s").await.unwrap().head, Some(head));
        assert!(engine.snapshots().await.unwrap().is_empty());

        let at = async |root| engine.ensure_image(root, OWNER, &source.store, &quiet()).await.unwrap();
        let kept = engine.reset_session("s", &at(head).await).await.unwrap();
        assert_eq!(kept.image.root, source.root, "the upper stays on its image");
        assert!(engine.mount_session("s").await.unwrap().join("new").exists());
        // Mounted since: whatever it holds now is not known to be the head.
        engine.unmount_session("s").await.unwrap();
        let swapped = engine.reset_session("s", &at(head).await).await.unwrap();
        assert_eq!((swapped.image.root, swapped.head), (head, Some(head)));
        let view = engine.mount_session("s").await.unwrap();
        assert!(view.join("new").exists());
        assert!(matches!(engine.reset_session("s", &at(source.root).await).await, Err(Error::Busy { .. })));
        engine.unmount_session("s").await.unwrap();
        engine.reset_session("s", &at(source.root).await).await.unwrap();
        assert_eq!(read_tree(&engine.mount_session("s").await.unwrap()), source.expected());
        assert_eq!(engine.fsck().await.unwrap(), Vec::<String>::new());
    });
}

#[test]
fn an_owner_sees_its_files_as_its_own() {
    isolated_async("an_owner_sees_its_files_as_its_own", async |root| {
        let source = Source::new().await;
        let engine = engine(root, PoolConfig::Directory).await;
        for (id, uid) in [("a", 1000), ("b", 70_000)] {
            let owner = Owner { uid, gid: uid + 1 };
            let image = engine.ensure_image(source.root, owner, &source.store, &quiet()).await.unwrap();
            engine.create_session(id, &image).await.unwrap();
            let view = engine.mount_session(id).await.unwrap();
            for path in ["", "docs", "docs/readme", "src/link"] {
                let stat = fs::symlink_metadata(view.join(path)).unwrap();
                assert_eq!((stat.uid(), stat.gid()), (uid, uid + 1), "{path}");
            }
        }
        let other = engine.ensure_image(source.root, Owner { uid: 5, gid: 5 }, &source.store, &quiet()).await.unwrap();
        assert!(matches!(engine.create_session("a", &other).await, Err(Error::AlreadyExists { .. })));
    });
}

#[test]
fn a_new_process_takes_over_what_an_old_one_mounted() {
    isolated_async("a_new_process_takes_over_what_an_old_one_mounted", async |root| {
        let source = Source::new().await;
        let pool = || PoolConfig::Image { bytes: 300 << 20 };
        let first = engine(root, pool()).await;
        session(&first, &source, "s").await;
        let target = root.join("target");
        first.publish("s", &target, false).await.unwrap();
        fs::write(target.join("unsaved"), "x").unwrap();
        assert!(matches!(
            Engine::open(Config { pool: pool(), ..Config::new(root) }).await.err(),
            Some(Error::Busy { .. })
        ));
        drop(first);
        // A container that restarts loses the mounts of its own namespace; what it published lives on.
        for below in ["mnt", "pool"] {
            mount::unmount_below(&root.join(below)).unwrap();
        }
        let second = engine(root, pool()).await;
        fs::write(target.join("meanwhile"), "x").unwrap();
        let view = second.mount_session("s").await.unwrap();
        fs::write(view.join("after"), "x").unwrap();
        for name in ["unsaved", "meanwhile", "after"] {
            assert!(target.join(name).exists() && view.join(name).exists(), "{name}");
        }
        assert_eq!(second.published("s").await.unwrap(), std::slice::from_ref(&target));
        second.unpublish(&target).await.unwrap();
        second.unmount_session("s").await.unwrap();
        assert_eq!(second.digest_session("s").await.unwrap().changed_files, 3);
    });
}

#[test]
fn an_upper_that_a_process_still_holds_is_not_touched() {
    isolated_async("an_upper_that_a_process_still_holds_is_not_touched", async |root| {
        let source = Source::new().await;
        let engine = engine(root, PoolConfig::Image { bytes: 300 << 20 }).await;
        session(&engine, &source, "s").await;
        let target = root.join("target");
        engine.publish("s", &target, false).await.unwrap();
        let open = fs::File::open(target.join("docs")).unwrap();
        engine.unpublish(&target).await.unwrap();
        for result in [engine.unmount_session("s").await, engine.delete_session("s").await] {
            assert!(matches!(result, Err(Error::Busy { .. })), "{result:?}");
        }
        drop(open);
        engine.delete_session("s").await.unwrap();
    });
}

#[test]
fn many_sessions_at_once() {
    isolated_async("many_sessions_at_once", async |root| {
        let source = Source::new().await;
        let engine = engine(root, PoolConfig::Image { bytes: 300 << 20 }).await;
        session(&engine, &source, "parent").await;
        engine.snapshot("parent", "moment", &[], None).await.unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..20 {
            // Twice each: the calls of one session wait for each other and agree.
            for _ in 0..2 {
                let engine = engine.clone();
                tasks.spawn(async move {
                    let id = format!("fork-{n}");
                    engine.fork_session(&id, "moment").await.unwrap();
                    let view = engine.mount_session(&id).await.unwrap();
                    fs::write(view.join("who"), &id).unwrap();
                });
            }
        }
        while let Some(task) = tasks.join_next().await {
            task.unwrap();
        }
        for session in engine.sessions().await.unwrap() {
            if session.session.id != "parent" {
                let who = fs::read_to_string(session.mountpoint.unwrap().join("who")).unwrap();
                assert_eq!(who, session.session.id);
                assert!(session.own_inodes == 1 && session.shared_bytes > 0);
            }
        }
        assert_eq!(engine.statistics().await.unwrap().mounted, 21);
    });
}

/// Creates and closes a file, then makes a directory that says so. Whoever sees the directory must see the file.
const ORDERED_WRITER: &str =
    "cd \"$1\" && n=0 && while :; do printf 'contents of %s' $n > file-$n; mkdir marker-$n; n=$((n+1)); done";

fn is_torn(view: &Path) -> Option<String> {
    for entry in fs::read_dir(view).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if let Some(n) = name.strip_prefix("marker-") {
            let read = fs::read_to_string(view.join(format!("file-{n}"))).unwrap_or_default();
            if read != format!("contents of {n}") {
                return Some(format!("{name} without its file ({read:?})"));
            }
        }
    }
    None
}

#[test]
fn a_copy_of_a_busy_session_is_one_moment() {
    isolated_async("a_copy_of_a_busy_session_is_one_moment", async |root| {
        let source = Source::new().await;
        let engine = engine(root, PoolConfig::Image { bytes: 400 << 20 }).await;
        let view = session(&engine, &source, "s").await;
        let cgroup = Cgroup::new("ordered");
        let _writer = cgroup.shell(ORDERED_WRITER, &view);
        while !view.join("marker-5").exists() {
            tokio::task::yield_now().await;
        }
        let mut frozen = Vec::new();
        for n in 0..100 {
            let (snapshot, fork) = (format!("cp-{n}"), format!("fork-{n}"));
            let taken = engine.snapshot("s", &snapshot, std::slice::from_ref(&cgroup.0), None).await.unwrap();
            assert_eq!(taken.consistency, Consistency::PointInTime, "{taken:?}");
            frozen.push(taken.frozen_micros);
            engine.fork_session(&fork, &snapshot).await.unwrap();
            let copy = engine.mount_session(&fork).await.unwrap();
            assert_eq!(is_torn(&copy), None, "copy {n}");
            engine.delete_session(&fork).await.unwrap();
            engine.delete_snapshot(&snapshot).await.unwrap();
        }
        let before = fs::read_dir(&view).unwrap().count();
        while fs::read_dir(&view).unwrap().count() <= before {
            tokio::task::yield_now().await;
        }
        // Restored under the writer's feet: it is held meanwhile and goes on.
        let restored =
            engine.restore_in_place("s", "safety", source.root, std::slice::from_ref(&cgroup.0), &source.store).await;
        assert_eq!(restored.unwrap().root, source.root);
        frozen.sort_unstable();
        println!("frozen: median {} us, longest {} us", frozen[frozen.len() / 2], frozen[frozen.len() - 1]);
    });
}

/// Every mounted hierarchy that can freeze: usually one, both where v1 and v2 are mounted side by side.
fn freezers() -> Vec<std::path::PathBuf> {
    let freezes = |entry: &mount::MountEntry| {
        entry.fs_type == "cgroup2"
            || entry.fs_type == "cgroup" && String::from_utf8_lossy(&entry.super_options).contains("freezer")
    };
    mount::table().unwrap().into_iter().filter(freezes).map(|entry| entry.target).collect()
}

#[test]
fn whoever_was_frozen_runs_again_after_the_limit_and_after_a_crash() {
    isolated_async("whoever_was_frozen_runs_again_after_the_limit_and_after_a_crash", async |root| {
        assert!(!freezers().is_empty());
        for hierarchy in freezers() {
            println!("{}", hierarchy.display());
            let cgroup = Cgroup::below(&hierarchy, "limit");
            let counter = root.join("counter");
            let _writer = cgroup.shell("while :; do echo >> \"$1\"; done", &counter);
            let size = || fs::metadata(&counter).map_or(0, |metadata| metadata.len());
            let grows = || {
                let before = size();
                while size() <= before {
                    std::thread::yield_now();
                }
            };
            grows();
            let ledger = root.join("ledger");
            let freezer = aether_engine::freeze::Freezer::open(&ledger).unwrap();
            let frozen = freezer.freeze(std::slice::from_ref(&cgroup.0), Duration::from_secs(2)).unwrap();
            let before = size();
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(size(), before, "a frozen process wrote");
            grows();
            assert!(!frozen.thaw().1, "the limit has passed");

            // Two sessions of one pod: it runs again when the second is done with it.
            let first = freezer.freeze(std::slice::from_ref(&cgroup.0), Duration::from_secs(60)).unwrap();
            let second = freezer.freeze(std::slice::from_ref(&cgroup.0), Duration::from_secs(60)).unwrap();
            assert!(first.thaw().1);
            let before = size();
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(size(), before, "thawed while another snapshot needs it still");
            assert!(second.thaw().1);
            grows();

            // The record of a freeze whose engine was killed.
            std::mem::forget(freezer.freeze(std::slice::from_ref(&cgroup.0), Duration::from_secs(60)).unwrap());
            aether_engine::freeze::Freezer::open(&ledger).unwrap();
            grows();
        }
    });
}

#[test]
fn one_fetch_serves_all_and_what_is_here_needs_no_store() {
    isolated_async("one_fetch_serves_all_and_what_is_here_needs_no_store", async |root| {
        let source = std::sync::Arc::new(Source::new().await);
        let engine = engine(root, PoolConfig::Directory).await;
        let fetched = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let (engine, source, fetched) = (engine.clone(), source.clone(), fetched.clone());
            tasks.spawn(async move {
                let most = std::sync::atomic::AtomicU64::new(0);
                let progress = |now: aether_cas::transfer::Progress| {
                    most.fetch_max(now.files, std::sync::atomic::Ordering::Relaxed);
                };
                engine.ensure_image(source.root, OWNER, &source.store, &progress).await.unwrap();
                fetched.fetch_add(most.into_inner(), std::sync::atomic::Ordering::Relaxed);
            });
        }
        while let Some(task) = tasks.join_next().await {
            task.unwrap();
        }
        // 42 files, of which one is empty.
        assert_eq!(fetched.load(std::sync::atomic::Ordering::Relaxed), 41);
        let nothing = MemoryStore::new();
        let other = engine.ensure_image(source.root, Owner { uid: 5, gid: 5 }, &nothing, &quiet()).await.unwrap();
        assert_eq!(other.files, 42);
        // An image that was collected is built anew from its directories, by who asks for it: its contents may be gone.
        assert_eq!(engine.gc().await.unwrap().len(), 2);
        assert!(matches!(engine.create_session("s", &other).await, Err(Error::NotFound { kind: "image", .. })));
        engine.ensure_image(source.root, other.id().owner(), &nothing, &quiet()).await.unwrap();
        engine.create_session("s", &other).await.unwrap();
        assert_eq!(read_tree(&engine.mount_session("s").await.unwrap()), source.expected());
        let absent = aether_cas::Blob { size: 1, ..source.root };
        let error = engine.ensure_image(absent, OWNER, &nothing, &quiet()).await.unwrap_err();
        assert!(matches!(&error, Error::Store { .. }) && error.to_string().contains(&absent.to_string()), "{error}");
    });
}

/// Mounts at one place stack: without a lock, each session that finds no image mounts one of its own.
#[test]
fn sessions_of_one_image_that_mount_together_share_one_mount_of_it() {
    isolated_async("sessions_of_one_image_that_mount_together_share_one_mount_of_it", async |root| {
        let source = Source::new().await;
        let engine = engine(root, PoolConfig::Directory).await;
        let image = engine.ensure_image(source.root, OWNER, &source.store, &quiet()).await.unwrap();
        let images = || {
            let ours = |entry: &mount::MountEntry| entry.fs_type == "erofs" && entry.target.starts_with(root);
            mount::table().unwrap().into_iter().filter(ours).map(|entry| entry.target).collect::<Vec<_>>()
        };
        let sessions: Vec<String> = (0..32).map(|number| format!("s{number}")).collect();
        for id in &sessions {
            engine.create_session(id, &image).await.unwrap();
        }
        for round in 0..8 {
            // As after a reboot: sessions are there, nothing is mounted.
            for place in images() {
                mount::unmount(&place).unwrap();
            }
            assert!(images().is_empty());
            let views = futures::future::join_all(sessions.iter().map(|id| engine.mount_session(id))).await;
            assert_eq!(images().len(), 1, "round {round}");
            for (id, view) in sessions.iter().zip(views) {
                assert_eq!(fs::read_to_string(view.unwrap().join("docs/readme")).unwrap(), "read me\n", "{id}");
                engine.unmount_session(id).await.unwrap();
            }
        }
    });
}

#[test]
fn lost_records_refuse_the_start_and_cost_nothing() {
    isolated_async("lost_records_refuse_the_start_and_cost_nothing", async |root| {
        for (index, pool) in POOLS.into_iter().enumerate() {
            let root = root.join(index.to_string());
            let source = Source::new().await;
            let first = engine(&root, pool()).await;
            let view = session(&first, &source, "s").await;
            fs::write(view.join("work"), "unsaved").unwrap();
            first.unmount_session("s").await.unwrap();
            drop(first);

            let (records, elsewhere) = (root.join("index/state"), root.join("elsewhere"));
            fs::rename(&records, &elsewhere).unwrap();
            for _ in 0..2 {
                let config = Config { pool: pool(), ..Config::new(&root) };
                let Err(refused) = Engine::open(config).await else { panic!("it began without records") };
                assert!(matches!(refused, Error::Damaged { .. }), "{refused}");
                assert!(refused.to_string().contains("bring the index back"), "{refused}");
            }
            fs::remove_dir_all(&records).unwrap();
            fs::rename(&elsewhere, &records).unwrap();
            let again = engine(&root, pool()).await;
            let view = again.mount_session("s").await.unwrap();
            assert_eq!(fs::read_to_string(view.join("work")).unwrap(), "unsaved");
        }
    });
}
