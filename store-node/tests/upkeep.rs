//! Collection and scrub of a node: by itself, on request, and of a folder that no node runs on.

#[path = "common/program.rs"]
mod program;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use aether_cas::{
    Blob, RemoteStore, Store, crash,
    testing::{blob, directory, file},
    tree::Node,
};
use aether_proto::store::v1::{PinRootRequest, Root, store_admin_client::StoreAdminClient};
use program::{PROGRAM, Process};
use rustix::process::Signal;

/// Leases end within the test, and nothing happens by itself.
const QUIET: &[&str] = &["--gc-lease", "1s", "--gc-interval", "off", "--scrub-interval", "off"];

fn run(args: &[&str]) -> (bool, String) {
    let output = Command::new(PROGRAM).args(args).env("AETHER_LOG", "warn").output().unwrap();
    (output.status.success(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}

/// Stores a tree with a large content below `src`; returns its root and that.
async fn put_tree(remote: &RemoteStore, seed: u64) -> (Blob, Blob) {
    let (content, data) = blob(seed, 100_000);
    let below = directory([("main.rs", file(content))]);
    let root = directory([("src", Node::Directory(below.blob()))]);
    for (blob, data) in [(content, data), (below.blob(), below.encode()), (root.blob(), root.encode())] {
        remote.write(blob, data).await.unwrap();
    }
    (root.blob(), content)
}

async fn pin(process: &Process, owner: &str, kind: &str, tree: Blob) {
    let root = Root { owner_uid: owner.into(), kind: kind.into(), tree: tree.to_string(), ..Default::default() };
    let mut admin = StoreAdminClient::connect(process.uri()).await.unwrap();
    admin.pin_root(PinRootRequest { root: Some(root) }).await.unwrap();
}

fn flip(folder: &Path, blob: &Blob) {
    let path = folder.join("objects").join(blob.digest.object_path());
    let mut data = fs::read(&path).unwrap();
    data[4711] ^= 1;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&path, data).unwrap();
}

async fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < Duration::from_secs(60), "{what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gc_says_why_blobs_stay_and_deletes_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().to_str().unwrap();
    let process = Process::start_with(folder.path(), QUIET, None);
    let (kept, content) = put_tree(&process.remote(), 1).await;
    let (loose, _) = put_tree(&process.remote(), 2).await;
    pin(&process, "uid-of-session", "SessionHead", kept).await;

    let uri = process.uri();
    let (success, text) = run(&["gc", "--dry-run", "--blobs", "--address", &uri]);
    assert!(success && text.contains(&format!("{loose} kept: lease until 2")), "{text}");
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let check = |store: &[&str]| {
        let (success, text) = run(&[&["gc", "--dry-run", "--blobs"], store].concat());
        assert!(success, "{text}");
        assert!(text.contains(&format!("{content} kept: SessionHead of uid-of-session\n")), "{text}");
        assert!(text.contains(&format!("{loose} deleted: nothing keeps it\n")), "{text}");
        assert!(text.contains("\n3 blobs, ") && text.contains("are kept by nothing"), "{text}");
    };
    check(&["--address", &uri]);
    let (success, text) = run(&["gc", "--dry-run", "--data-dir", data]);
    assert!(!success && text.contains("--address"), "the folder is in use: {text}");
    assert!(process.end(Signal::TERM).success());
    check(&["--data-dir", data]);
    let (success, text) = run(&["gc", "--dry-run", "--data-dir", "/nowhere"]);
    assert!(!success && text.contains("no store in /nowhere"), "{text}");

    let process = Process::start_with(folder.path(), QUIET, None);
    let (success, text) = run(&["gc", "--rate", "1000", "--address", &process.uri()]);
    assert!(success && text.contains("\n3 blobs, ") && text.contains("bytes deleted"), "{text}");
    assert_eq!(process.remote().find_missing(&[kept, content, loose]).await.unwrap(), [loose]);
    let metrics = process.get("/metrics");
    assert!(metrics.contains("aether_store_deleted_blobs_total 3\n"), "{metrics}");
    assert!(metrics.contains("aether_store_collections_total{outcome=\"ok\"} 1\n"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_collects_and_scrubs_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let options = ["--gc-lease", "1s", "--gc-interval", "1s", "--scrub-interval", "1s", "--scrub-rate", "1000000"];
    let process = Process::start_with(folder.path(), &options, None);
    let (kept, content) = put_tree(&process.remote(), 1).await;
    pin(&process, "uid-of-session", "SessionHead", kept).await;
    let (loose, _) = put_tree(&process.remote(), 2).await;
    let counts = |row: &str| {
        let metrics = process.get("/metrics");
        let value = metrics.lines().find_map(|line| line.strip_prefix(row)?.trim().parse::<u64>().ok());
        value.unwrap_or_else(|| panic!("no {row} in {metrics}"))
    };
    eventually("the loose tree is deleted", || counts("aether_store_deleted_blobs_total") == 3).await;
    assert_eq!(process.remote().find_missing(&[kept, content, loose]).await.unwrap(), [loose]);
    eventually("all is read", || counts("aether_store_scrubbed_bytes_total") > 100_000).await;

    flip(folder.path(), &content);
    eventually("the damage is found", || counts("aether_store_lost_blobs") == 1).await;
    assert_eq!(counts("aether_store_damaged_blobs_total"), 1);
    let (success, text) = run(&["integrity", "--address", &process.uri()]);
    assert!(!success, "{text}");
    assert!(text.contains(&format!("lost blob {content} (since 2")), "{text}");
    let expected = format!("affected SessionHead of uid-of-session: \"src/main.rs\" is {content}\n");
    assert!(text.contains(&expected), "{text}");
    assert!(process.end(Signal::TERM).success());
    let data = folder.path().to_str().unwrap();
    let (success, text) = run(&["integrity", "--data-dir", data]);
    assert!(!success && text.contains(&expected), "{text}");

    let process = Process::start_with(folder.path(), &options, None);
    let (_, data) = blob(1, 100_000);
    process.remote().write(content, data).await.unwrap();
    let (success, text) = run(&["integrity", "--address", &process.uri()]);
    assert!(success && text.contains("nothing is lost"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_that_misses_a_directory_stops_collection_and_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let process = Process::start_with(folder.path(), QUIET, None);
    let (loose, _) = put_tree(&process.remote(), 2).await;
    let gap = directory([("gone", Node::Directory(blob(9, 50).0))]);
    process.remote().write(gap.blob(), gap.encode()).await.unwrap();
    pin(&process, "uid-of-checkpoint", "Checkpoint", gap.blob()).await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let (success, text) = run(&["gc", "--address", &process.uri()]);
    assert!(!success && text.contains("incomplete root Checkpoint of uid-of-checkpoint"), "{text}");
    assert!(process.get("/metrics").contains("aether_store_incomplete_roots 1\n"));
    assert_eq!(process.remote().find_missing(&[loose]).await.unwrap(), []);
}

/// What a collection leaves when it is killed, the next one understands: at every point.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_point_a_collection_is_finished_by_the_next() {
    for point in crash::POINTS {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().to_str().unwrap();
        let process = Process::start_with(folder.path(), QUIET, None);
        let (kept, _) = put_tree(&process.remote(), 1).await;
        let (loose, content) = put_tree(&process.remote(), 2).await;
        pin(&process, "uid-of-session", "SessionHead", kept).await;
        assert!(process.end(Signal::TERM).success());
        tokio::time::sleep(Duration::from_millis(1100)).await;

        let process = Process::start_with(folder.path(), QUIET, Some(point));
        let (success, text) = run(&["gc", "--address", &process.uri()]);
        assert!(!success && !process.end(Signal::KILL).success(), "{point}: {text}");
        let process = Process::start_with(folder.path(), QUIET, None);
        let (success, text) = run(&["gc", "--address", &process.uri()]);
        assert!(success, "{point}: {text}");
        assert_eq!(process.remote().find_missing(&[kept, content, loose]).await.unwrap(), [content, loose], "{point}");
        assert!(process.end(Signal::TERM).success());
        let (success, text) = run(&["fsck", "--data-dir", data]);
        assert!(success && text.starts_with("3 blobs, ") && !text.contains("stray"), "{point}: {text}");
    }
}

#[test]
fn help_has_examples() {
    for (command, words) in [("gc", "--dry-run --blobs --address"), ("integrity", "--address http://")] {
        let (success, text) = run(&[command, "--help"]);
        assert!(success && text.contains("Examples:") && text.contains(words), "{text}");
    }
}
