//! The program: what it says, how it ends, and what a kill leaves.

#[path = "common/program.rs"]
mod program;

use std::{
    path::Path,
    process::{Command, ExitStatus},
    sync::{Arc, Mutex},
};

use aether_cas::{
    Blob, Store,
    testing::{blob, bytes, directory, file},
};
use program::{PROGRAM, Process};
use rustix::process::Signal;

fn run(args: &[&str]) -> (ExitStatus, String) {
    let output = Command::new(PROGRAM).args(args).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status, String::from_utf8(text).unwrap())
}

fn fsck(folder: &Path, more: &[&str]) -> (ExitStatus, String) {
    run(&[&["fsck", "--data-dir", folder.to_str().unwrap()], more].concat())
}

#[test]
fn help_has_examples_and_bad_values_have_reasons() {
    let (status, text) = run(&["--help"]);
    assert!(status.success());
    for words in ["Examples:", "--data-dir", "--listen", "--http", "fsck", "AETHER_DATA_DIR"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let folder = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let data = folder.path().to_str().unwrap();
    let not_a_folder = folder.path().join("file");
    std::fs::write(&not_a_folder, "").unwrap();
    for (args, words) in [
        (&["--listen", "everywhere"][..], "--listen"),
        (&["--inline-limit=-1"], "--inline-limit"),
        (&["--data-dir", not_a_folder.to_str().unwrap(), "--http", "127.0.0.1:0"], "--data-dir"),
        (&["--data-dir", data, "--http", "127.0.0.1:0", "--listen", &taken], &taken),
        (&["fsck", "--data-dir", "/nowhere"], "no store in /nowhere"),
    ] {
        let (status, text) = run(args);
        assert!(!status.success() && text.contains(words), "{args:?}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_healthy_and_ends_gracefully() {
    let folder = tempfile::tempdir().unwrap();
    let process = Process::start(folder.path());
    let remote = process.remote();
    remote.check().await.unwrap();
    let (small, small_data) = blob(1, 100);
    let (large, large_data) = blob(2, 5 << 20);
    remote.write_batch(vec![(small, small_data), (large, large_data)]).await.unwrap();
    assert!(process.get("/healthz").starts_with("HTTP/1.1 200"));
    assert!(process.get("/readyz").starts_with("HTTP/1.1 200"));
    let metrics = process.get("/metrics");
    assert!(metrics.contains("aether_store_blobs{place=\"file\"} 1\n"), "{metrics}");

    // The folder is in use: a second program, and fsck, say so and leave it alone.
    let data = folder.path().to_str().unwrap();
    let (status, text) = run(&["--data-dir", data, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
    assert!(!status.success() && text.contains(data), "{text}");
    let (status, text) = fsck(folder.path(), &[]);
    assert!(!status.success() && text.contains("StoreAdmin.Fsck"), "{text}");

    // A client that is connected does not hold it.
    assert!(process.end(Signal::TERM).success());
    drop(remote);
    let (status, text) = fsck(folder.path(), &[]);
    assert!(status.success() && text.contains("2 blobs"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn fsck_finds_damage_and_repairs() {
    let folder = tempfile::tempdir().unwrap();
    let process = Process::start(folder.path());
    let (large, data) = blob(1, 100_000);
    process.remote().write(large, data).await.unwrap();
    process.end(Signal::TERM);
    let path = folder.path().join("objects").join(large.digest.object_path());
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, bytes(9, 100_000)).unwrap();
    for (args, words) in [(&[][..], "not repaired"), (&["--repair"], "set aside")] {
        let (status, text) = fsck(folder.path(), args);
        assert!(!status.success(), "{text}");
        assert!(text.contains(&large.to_string()) && text.contains(words), "{text}");
    }
    let (status, text) = fsck(folder.path(), &[]);
    assert!(status.success() && text.contains("0 blobs"), "{text}");
}

/// Uploads of all kinds run until the program is killed in the midst of them; every blob that was
/// acknowledged is there afterwards, whole, and nothing half-made is.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_survives_kill_9() {
    let folder = tempfile::tempdir().unwrap();
    let acknowledged: Arc<Mutex<Vec<(Blob, u64, usize)>>> = Arc::default();
    for round in 0..4u64 {
        let process = Process::start(folder.path());
        let remote = process.remote();
        let before = acknowledged.lock().unwrap().len();
        let writers: Vec<_> = (0..6u64)
            .map(|writer| {
                let (remote, acknowledged) = (remote.clone(), acknowledged.clone());
                tokio::spawn(async move {
                    for n in 0.. {
                        let seed = (round * 10 + writer) * 1_000_000 + n * 100;
                        // Blobs in the index, files, and one sent as a stream.
                        let sizes: &[usize] = if writer == 0 { &[6 << 20] } else { &[10, 9_000, 20_000, 300_000] };
                        let named: Vec<_> =
                            sizes.iter().enumerate().map(|(k, size)| (seed + k as u64, *size)).collect();
                        let batch: Vec<_> = named.iter().map(|(seed, size)| blob(*seed, *size)).collect();
                        let names: Vec<Blob> = batch.iter().map(|(blob, _)| *blob).collect();
                        if remote.write_batch(batch).await.is_err() {
                            return;
                        }
                        let done = names.into_iter().zip(named).map(|(blob, (seed, size))| (blob, seed, size));
                        acknowledged.lock().unwrap().extend(done);
                    }
                })
            })
            .collect();
        // In the midst, at another moment in each round.
        let enough = before + 60 + 37 * round as usize;
        while acknowledged.lock().unwrap().len() < enough {
            tokio::task::yield_now().await;
        }
        let status = process.end(Signal::KILL);
        assert!(!status.success());
        for writer in writers {
            writer.await.unwrap();
        }
        let process = Process::start(folder.path());
        let remote = process.remote();
        let done = acknowledged.lock().unwrap().clone();
        for &(blob, seed, size) in &done {
            assert_eq!(remote.read(blob).await.unwrap(), bytes(seed, size), "{blob} in round {round}");
        }
        // And a tree on top, so that the next kill meets a store with a root.
        let contents: Vec<Blob> = done.iter().map(|(blob, ..)| *blob).collect();
        let names: Vec<String> = (0..contents.len()).map(|n| format!("f{n}")).collect();
        let tree = directory(names.iter().zip(&contents).map(|(name, blob)| (name.as_str(), file(*blob))));
        remote.write(tree.blob(), tree.encode()).await.unwrap();
        process.end(Signal::KILL);
        let (status, text) = fsck(folder.path(), &["--repair"]);
        assert!(status.success(), "{text}");
        let left = std::fs::read_dir(folder.path().join("objects/.tmp")).unwrap().count();
        assert_eq!(left, 0, "what was half-made is gone");
    }
}
