//! The remote store against a store node: the same promises as any other store, and whole trees.

mod common;

use std::{
    collections::HashSet,
    os::unix::fs::PermissionsExt,
    sync::{Arc, Mutex},
    time::Duration,
};

use aether_cas::{
    Blob, LocalConfig, LocalStore, MemoryStore, RemoteStore, Store, StoreError,
    remote::RemoteConfig,
    testing::{blob, bytes, conformance, directory, file},
    transfer::{self, Progress},
    tree::{Node as Entry, summary},
};
use common::Node;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

#[tokio::test(flavor = "multi_thread")]
async fn remote_conforms() {
    let node = Node::start().await;
    conformance(&node.remote().await).await;
    let report = node.store.fsck(false).unwrap();
    assert!(report.is_healthy() && report.stray_files.is_empty(), "{report:?}");
    let left = std::fs::read_dir(node.folder.path().join("objects/.tmp")).unwrap().count();
    assert_eq!(left, 0, "refused and finished uploads leave nothing");
    let metrics = node.metrics.render();
    for words in [
        r#"aether_store_calls_total{call="batch_update",outcome="ok"}"#,
        r#"aether_store_calls_total{call="write",outcome="failed"}"#,
    ] {
        let line = metrics.lines().find(|line| line.starts_with(words)).unwrap();
        assert!(!line.ends_with(" 0"), "{line}");
    }
    node.stop().await;
}

/// 60 directories in three levels, with 1,500 files, some too large for the index and one for a batch.
fn tree(store: &MemoryStore) -> Blob {
    let mut top = Vec::new();
    let names: Vec<String> = (0..60).map(|n| format!("n{n}")).collect();
    for d in 0..6 {
        let leaves = (0..9).map(|e| {
            let files = (0..28).map(|f| {
                let length = 300 + (f * f * 40) as usize;
                (names[f as usize].as_str(), file(store.put(bytes(d * 10_000 + e * 100 + f, length))))
            });
            (names[e as usize].as_str(), Entry::Directory(store.put_directory(&directory(files))))
        });
        top.push((names[d as usize].as_str(), Entry::Directory(store.put_directory(&directory(leaves)))));
    }
    top.push(("large", file(store.put(bytes(1, 12 << 20)))));
    store.put_directory(&directory(top))
}

fn local() -> (tempfile::TempDir, LocalStore) {
    let folder = tempfile::tempdir().unwrap();
    let store = LocalStore::open(LocalConfig {
        objects: folder.path().join("objects"),
        index: folder.path().join("index"),
        inline_limit: 0,
    })
    .unwrap();
    (folder, store)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_goes_to_the_node_and_comes_back() {
    let node = Node::start().await;
    let remote = node.remote().await;
    let source = MemoryStore::new();
    let root = tree(&source);
    let moved = transfer::upload_tree(root, Arc::new(source.clone()), &remote, &|_| {}).await.unwrap();
    assert_eq!((moved.files, moved.directories), (6 * 9 * 28 + 1, 61));

    let (_folder, cache) = local();
    let fetched = transfer::fetch_directories(root, &remote, &cache).await.unwrap();
    assert_eq!(fetched.directories, 61);
    let last = Mutex::new(Progress::default());
    let on_progress = |now: Progress| *last.lock().unwrap() = now;
    let objects = transfer::fetch_objects(root, &remote, &cache, &on_progress).await.unwrap();
    assert_eq!((objects.files, objects.bytes), (moved.files, moved.bytes));
    assert_eq!(last.into_inner().unwrap().files, moved.files);
    assert_eq!(summary(&root, &cache).unwrap(), summary(&root, &source).unwrap());
    assert!(cache.fsck(false).unwrap().is_healthy());

    node.store.pin("uid", "SessionHead", "", root).unwrap();
    assert!(node.store.fsck(false).unwrap().is_healthy(), "the pinned tree is complete");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_directories_come_in_one_answer() {
    let node = Node::start().await;
    let remote = node.remote().await;
    let source = MemoryStore::new();
    let root = tree(&source);
    transfer::upload_tree(root, Arc::new(source.clone()), &remote, &|_| {}).await.unwrap();
    let messages = remote.read_tree(root).await.unwrap();
    let names: HashSet<Blob> = messages.iter().map(|(blob, _)| *blob).collect();
    assert_eq!((messages.len(), names.len()), (61, 61));
    assert_eq!(messages[0].0, root, "the root comes first");
    for (blob, message) in messages {
        assert_eq!(source.read(blob).await.unwrap(), message);
    }
    let absent = Blob::of(b"absent");
    assert!(matches!(remote.read_tree(absent).await, Err(StoreError::NotFound { blob, .. }) if blob == absent));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_blob_is_reported_and_can_be_written_again() {
    let node = Node::start().await;
    let remote = node.remote().await;
    for length in [100 << 10, 8 << 20] {
        let (blob, data) = blob(length as u64, length);
        remote.write(blob, data.clone()).await.unwrap();
        let path = node.store.object_path(&blob.digest);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let mut bad = data.to_vec();
        bad[length - 1] ^= 1;
        std::fs::write(&path, bad).unwrap();
        let error = remote.read(blob).await.unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { blob: b, .. } if b == blob), "{error}");
        assert_eq!(remote.find_missing(&[blob]).await.unwrap(), [blob]);
        remote.write(blob, data.clone()).await.unwrap();
        assert_eq!(remote.read(blob).await.unwrap(), data);
    }
    node.stop().await;
}

#[tokio::test]
async fn addresses_are_checked() {
    for bad in ["", "store", "store:8980", "ftp://store:1", "http://"] {
        let error = RemoteStore::connect(bad).await.err().expect(bad);
        assert!(matches!(error, StoreError::Invalid(_)), "{bad}: {error}");
        assert!(error.to_string().contains("http://aether-store:8980"), "{error}");
    }
}

#[tokio::test]
async fn a_store_that_is_not_there_is_named_and_may_be_tried_again() {
    // A port that was free a moment ago.
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mut config = RemoteConfig::new(format!("http://{address}"));
    config.patience = Duration::from_millis(100);
    let error = RemoteStore::lazy(&config).unwrap().check().await.unwrap_err();
    assert!(error.to_string().contains(&address.to_string()), "{error}");
    assert!(error.is_transient(), "{error}");
}

#[tokio::test]
async fn a_store_that_says_nothing_does_not_hold_us() {
    // Accepts, and never answers.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mute = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((socket, _)) = listener.accept().await {
            held.push(socket);
        }
    });
    let mut config = RemoteConfig::new(format!("http://{address}"));
    config.stall = Duration::from_millis(200);
    let store = RemoteStore::lazy(&config).unwrap();
    let (small, data) = blob(1, 100);
    let (large, large_data) = blob(2, 8 << 20);
    for error in [
        store.read(small).await.unwrap_err(),
        store.read(large).await.unwrap_err(),
        store.write(small, data).await.unwrap_err(),
        store.write(large, large_data).await.unwrap_err(),
        store.read_tree(small).await.unwrap_err(),
    ] {
        assert!(matches!(error, StoreError::Remote { code: tonic::Code::DeadlineExceeded, .. }), "{error}");
        assert!(error.is_transient());
    }
    mute.abort();
}

/// Forwards connections to a store, and breaks the first few after some bytes.
async fn breaking_proxy(target: std::net::SocketAddr, breaks: usize, after: u64) -> (String, Arc<Mutex<usize>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let broken = Arc::new(Mutex::new(0));
    let count = broken.clone();
    tokio::spawn(async move {
        let mut left = breaks;
        while let Ok((client, _)) = listener.accept().await {
            let server = tokio::net::TcpStream::connect(target).await.unwrap();
            let limit = if left > 0 { after } else { u64::MAX };
            left = left.saturating_sub(1);
            let count = count.clone();
            tokio::spawn(async move {
                let (client_read, mut client_write) = client.into_split();
                let (server_read, mut server_write) = server.into_split();
                // Both directions share the limit, whichever has the blob.
                let up = async {
                    let mut limited = client_read.take(limit);
                    let _ = tokio::io::copy(&mut limited, &mut server_write).await;
                };
                let down = async {
                    let mut limited = server_read.take(limit);
                    let _ = tokio::io::copy(&mut limited, &mut client_write).await;
                    let _ = client_write.shutdown().await;
                };
                tokio::select! { () = up => {}, () = down => {} }
                *count.lock().unwrap() += 1;
            });
        }
    });
    (format!("http://{address}"), broken)
}

#[tokio::test(flavor = "multi_thread")]
async fn large_blobs_go_on_where_the_connection_broke() {
    let node = Node::start().await;
    let (blob, data) = blob(1, 24 << 20);
    let (uri, broken) = breaking_proxy(node.address, 3, 7 << 20).await;
    let store = RemoteStore::lazy(&RemoteConfig::new(uri)).unwrap();
    store.write(blob, data.clone()).await.unwrap();
    assert_eq!(node.store.read_blob(&blob).unwrap(), data);
    assert!(*broken.lock().unwrap() >= 2, "the connection did break");
    // Without resuming, three breaks of 7 MiB each would have cost more than twice the blob.
    let metrics = node.metrics.render();
    let line = metrics.lines().find(|l| l.starts_with("aether_store_received_bytes_total ")).unwrap();
    let received: u64 = line.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(received <= 28 << 20, "{received} bytes were sent");

    let (uri, broken) = breaking_proxy(node.address, 3, 7 << 20).await;
    let store = RemoteStore::lazy(&RemoteConfig::new(uri)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out");
    store.fetch_to(blob, &path).await.unwrap();
    assert_eq!(Blob::of_file(&path).unwrap(), blob);
    assert!(*broken.lock().unwrap() >= 2, "the connection did break");
    node.stop().await;
}
