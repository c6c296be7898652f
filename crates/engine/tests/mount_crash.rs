//! The engine is killed at each of its crash points; the next start must understand what is left.

mod support;

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

use aether_engine::pool::PoolConfig;
use aether_engine::testing::isolated_async;
use aether_engine::{Error, crash, mount};
use support::{OWNER, Source, engine, read_tree};

const TEST: &str = "what_was_acknowledged_survives_a_kill_at_every_crash_point";
const ROOT: &str = "AETHER_TEST_CRASH_ROOT";
const KIND: &str = "AETHER_TEST_CRASH_POOL";
/// What a session was before its first restore.
const SAFETY: &str = "safety";

fn pool(kind: &str) -> PoolConfig {
    match kind {
        "image" => PoolConfig::Image { bytes: 256 << 20 },
        _ => PoolConfig::Directory,
    }
}

/// Everything that an engine does. After each acknowledged step a line goes to the journal. Every step may be repeated.
async fn script(root: &Path, kind: &str) {
    let mut journal = OpenOptions::new().create(true).append(true).open(root.join("journal")).unwrap();
    let mut acknowledged = move |line: &str| writeln!(journal, "{line}").unwrap();
    let source = Source::new().await;
    let engine = engine(&root.join("engine"), pool(kind)).await;
    let image = async |tree| engine.ensure_image(tree, OWNER, &source.store, &|_| {}).await.unwrap();
    let base = image(source.root).await;
    acknowledged("image");

    engine.create_session("doomed", &base).await.unwrap();
    engine.delete_session("doomed").await.unwrap();
    acknowledged("deleted doomed");

    let target = root.join("target");
    if engine.session("s").await.is_err() {
        engine.create_session("s", &base).await.unwrap();
    }
    acknowledged("session s");
    engine.publish("s", &target, false).await.unwrap();
    fs::write(target.join("written"), "by the pod").unwrap();
    acknowledged("written");
    engine.snapshot("s", "cp", &[], None).await.unwrap();
    acknowledged("snapshot cp");
    engine.fork_session("fork", "cp").await.unwrap();
    engine.mount_session("fork").await.unwrap();
    acknowledged("session fork");
    let digested = engine.digest("cp").await.unwrap();
    acknowledged(&format!("tree {}", digested.root));
    engine.unpublish(&target).await.unwrap();
    engine.unmount_session("s").await.unwrap();
    engine.digest_session("s").await.unwrap();

    if engine.session("swapped").await.is_err() {
        engine.create_session("swapped", &base).await.unwrap();
    }
    let other = image(digested.root).await;
    engine.reset_session("swapped", &other).await.unwrap();
    acknowledged("session swapped");

    if engine.session("restored").await.is_err() {
        engine.create_session("restored", &base).await.unwrap();
    }
    let view = engine.mount_session("restored").await.unwrap();
    // Of an attempt that was killed there may be a moment already: another one has another name.
    let mut safety = SAFETY.to_owned();
    while engine.snapshot_record(&safety).await.is_ok() {
        safety.push_str("-again");
    }
    if safety == SAFETY {
        fs::write(view.join("junk"), "of a pod").unwrap();
        fs::write(view.join("src/main.c"), "junk too").unwrap();
        acknowledged("junk");
    }
    engine.restore_in_place("restored", &safety, source.root, &[], &source.store).await.unwrap();
    acknowledged("session restored");
    acknowledged("end");
}

/// Runs the script in a process of its own, which dies at `point`. Returns whether it got there.
fn run(root: &Path, kind: &str, point: Option<&str>) -> bool {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", TEST, "--nocapture", "--test-threads=1"]).env(ROOT, root).env(KIND, kind);
    command.env_remove("RUST_BACKTRACE").stdin(Stdio::null());
    if let Some(point) = point {
        command.env("AETHER_CRASH_AT", point);
    }
    let output = command.output().unwrap();
    if output.status.signal() == Some(6) && point.is_some() {
        return true;
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{kind} pool, crash point {point:?}: {}\n{said}", output.status);
    false
}

async fn check(root: &Path, kind: &str, point: &str) {
    let context = format!("{kind} pool, killed at {point}");
    let journal = fs::read_to_string(root.join("journal")).unwrap_or_default();
    let acknowledged: BTreeSet<&str> = journal.lines().collect();
    let engine = engine(&root.join("engine"), pool(kind)).await;
    assert_eq!(engine.fsck().await.unwrap(), Vec::<String>::new(), "{context}");
    let source = Source::new().await;
    let mut expected = source.expected();
    expected.insert("written".into(), String::new());
    let names = |tree: std::collections::BTreeMap<String, String>| tree.into_keys().collect::<Vec<_>>();
    let expected = names(expected);
    if acknowledged.contains("session s") {
        let view = engine.mount_session("s").await.unwrap();
        if acknowledged.contains("written") {
            assert_eq!(names(read_tree(&view)), expected, "{context}");
            assert_eq!(fs::read_to_string(view.join("written")).unwrap(), "by the pod");
        }
    }
    for id in ["fork", "swapped"] {
        if acknowledged.contains(format!("session {id}").as_str()) {
            assert_eq!(names(read_tree(&engine.mount_session(id).await.unwrap())), expected, "{context}: {id}");
            engine.unmount_session(id).await.unwrap();
        }
    }
    if acknowledged.contains("junk") {
        let view = engine.mount_session("restored").await.unwrap();
        // Whatever a restore has touched, what was there before is to be had.
        let kept = engine.snapshot_record(SAFETY).await.is_ok();
        let junk = |view: &Path| {
            let read = |name| fs::read_to_string(view.join(name)).unwrap_or_default();
            (read("junk"), read("src/main.c"))
        };
        let before = ("of a pod".to_owned(), "junk too".to_owned());
        assert!(kept || junk(&view) == before, "{context}: {:?}", junk(&view));
        if kept {
            engine.fork_session("before", SAFETY).await.unwrap();
            assert_eq!(junk(&engine.mount_session("before").await.unwrap()), before, "{context}");
            engine.delete_session("before").await.unwrap();
        }
        if acknowledged.contains("session restored") {
            assert_eq!(names(read_tree(&view)), names(source.expected()), "{context}");
        }
        engine.unmount_session("restored").await.unwrap();
    }
    if acknowledged.contains("deleted doomed") {
        assert!(matches!(engine.session("doomed").await, Err(Error::NotFound { .. })), "{context}");
    }
    if acknowledged.contains("snapshot cp") {
        let tree = engine.digest("cp").await.unwrap().root;
        let known = acknowledged.iter().find_map(|line| line.strip_prefix("tree "));
        assert!(known.is_none_or(|known| known == tree.to_string()), "{context}: another digest");
    }
    // Nothing but what has a record, and nothing temporary.
    for snapshot in engine.snapshots().await.unwrap() {
        assert!(
            (snapshot.id == "cp" || snapshot.id.starts_with(SAFETY)) && !snapshot.temporary,
            "{context}: {snapshot:?}"
        );
    }
}

/// Ends everything and looks whether anything is left.
async fn finish(root: &Path, kind: &str) {
    let engine = engine(&root.join("engine"), pool(kind)).await;
    assert_eq!(engine.fsck().await.unwrap(), Vec::<String>::new());
    for session in engine.sessions().await.unwrap() {
        for target in session.targets {
            engine.unpublish(&target).await.unwrap();
        }
        engine.delete_session(&session.session.id).await.unwrap();
    }
    for snapshot in engine.snapshots().await.unwrap() {
        engine.delete_snapshot(&snapshot.id).await.unwrap();
    }
    engine.gc().await.unwrap();
    for directory in ["sessions", "snapshots", "images"] {
        let left: Vec<_> = fs::read_dir(root.join("engine/pool").join(directory))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .filter(|name| name != ".template")
            .collect();
        assert!(left.is_empty(), "{directory}: {left:?}");
    }
}

/// Returns whether the script got to the point.
async fn kill_and_check(directory: &Path, kind: &str, point: &str) -> bool {
    let root = directory.join(format!("{kind}-{point}"));
    fs::create_dir(&root).unwrap();
    let crashed = run(&root, kind, Some(point));
    if crashed {
        check(&root, kind, point).await;
        // The same steps again go through, and nothing is left at the end.
        assert!(!run(&root, kind, None));
        finish(&root, kind).await;
    }
    mount::unmount_below(&root).unwrap();
    fs::remove_dir_all(&root).unwrap();
    crashed
}

#[test]
fn what_was_acknowledged_survives_a_kill_at_every_crash_point() {
    // A process of the test itself: the script that is to die.
    if let Some(root) = std::env::var_os(ROOT) {
        let kind = std::env::var(KIND).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        return runtime.block_on(script(Path::new(&root), &kind));
    }
    isolated_async(TEST, async |directory| {
        for point in crash::POINTS {
            let mut reached = false;
            // The second time is often another operation: a temporary snapshot, another session.
            for time in ["1", "2"] {
                for kind in ["image", "directory"] {
                    reached |= kill_and_check(directory, kind, &format!("{point}@{time}")).await;
                }
            }
            assert!(reached, "the script never gets to {point}");
        }
    });
}
