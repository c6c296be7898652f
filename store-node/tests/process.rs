//! The program: what it says, how it ends, and what a kill leaves.

#[path = "common/program.rs"]
mod program;

use std::{
    path::Path,
    process::{Command, ExitStatus},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use aether_cas::{
    Blob, ContentName, Store,
    remote::resource::{Form, ReadName, UploadName},
    testing::{blob, bytes, directory, file},
};
use bazel_remote_apis::google::bytestream::{ReadRequest, WriteRequest, byte_stream_client::ByteStreamClient};
use program::{PROGRAM, Process};
use rustix::process::Signal;
use tokio_stream::StreamExt;
use tonic::transport::Channel;

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

/// Ten times as many readers and writers as there are places begin, and stand still.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_stand_still_cost_bounded_memory() {
    use aether_store_node::limits::{DECOMPRESSORS, READ_BYTES, READS, WINDOW_LOG, WRITE_BYTES, WRITES};
    let folder = tempfile::tempdir().unwrap();
    let process = Process::start(folder.path());
    let remote = process.remote();
    let (large, data) = blob(1, 64 << 20);
    remote.write(large, data).await.unwrap();
    let (small, data) = blob(2, 100);
    remote.write(small, data).await.unwrap();
    let before = process.peak();

    let plain = bytes(3, 3 << 20).to_vec();
    let compressed = zstd::encode_all(&plain[..], 1).unwrap();
    let served = Arc::new(AtomicUsize::new(0));
    let mut clients = tokio::task::JoinSet::new();
    for connection in 0..16usize {
        let endpoint = Channel::from_shared(format!("http://{}", process.address)).unwrap();
        // One that stands still must not stop the others of its connection.
        let channel = endpoint.initial_connection_window_size(64 << 20).connect().await.unwrap();
        for n in 0..10 * READS / 16 {
            let (mut client, served) = (ByteStreamClient::new(channel.clone()), served.clone());
            let form = if n % 2 == 0 { Form::Plain } else { Form::Zstd };
            let name = ReadName { instance: String::new(), form, content: ContentName::Blake3(large) }.to_string();
            clients.spawn(async move {
                let request = ReadRequest { resource_name: name, ..Default::default() };
                // Those that find no place hear so, after a while.
                let Ok(answer) = client.read(request).await else { return };
                let mut stream = answer.into_inner();
                served.fetch_add(1, Ordering::Relaxed);
                stream.message().await.unwrap().unwrap();
                std::future::pending::<()>().await;
            });
        }
        for n in 0..10 * WRITES / 16 {
            let mut client = ByteStreamClient::new(channel.clone());
            let (wanted, _) = blob((1000 + connection * 100 + n) as u64, 1);
            let sent = [plain.clone(), compressed.clone()][n % 2].clone();
            let form = if n % 2 == 0 { Form::Plain } else { Form::Zstd };
            let content = ContentName::Blake3(Blob { size: 9 << 20, ..wanted });
            let name = UploadName { instance: String::new(), id: "id".to_owned(), form, content }.to_string();
            clients.spawn(async move {
                let first = WriteRequest { resource_name: name, data: sent, ..Default::default() };
                let _ = client.write(tokio_stream::iter([first]).chain(tokio_stream::pending())).await;
            });
        }
    }
    // Others are answered meanwhile.
    let mut since = std::time::Instant::now();
    let mut most = 0;
    while since.elapsed() < Duration::from_secs(3) {
        remote.read(small).await.unwrap();
        let now = served.load(Ordering::Relaxed);
        if now > most {
            (most, since) = (now, std::time::Instant::now());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(most, READS, "as many as there are places");
    let bound = READS * READ_BYTES + WRITES * WRITE_BYTES + DECOMPRESSORS * ((1 << WINDOW_LOG) + (1 << 20));
    let grown = process.peak() - before;
    println!(
        "{} MiB before, {} MiB more with clients that stand still, {} MiB allowed",
        before >> 20,
        grown >> 20,
        bound >> 20
    );
    assert!(grown < bound, "{grown} of {bound}");

    // When they are gone, there is room again.
    clients.shutdown().await;
    let path = folder.path().join("copy");
    remote.fetch_to(large, &path).await.unwrap();
}
