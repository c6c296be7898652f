//! A store node whose disk is a cache over a bucket.

mod common;
#[path = "common/program.rs"]
mod program;

use std::{
    collections::HashSet, ops::ControlFlow, os::unix::fs::PermissionsExt, path::Path, sync::Arc, time::Duration,
};

use aether_cas::{
    Blob, LocalConfig, LocalStore, MemoryStore, RemoteStore, Store, StoreError,
    collect::{Pace, Phase},
    durable::{Durable, Terms},
    remote::RemoteConfig,
    testing::{blob, bucket::TestBucket, bytes, conformance, directory, file},
    transfer::{fetch_directories, upload_tree},
    tree::Node,
};
use aether_runtime::{CancellationToken, Metrics};
use aether_store_node::{
    Guard,
    metrics::StoreMetrics,
    tiered::{Durability, DurableStatistics, TierConfig, TieredStore},
};
use bytes::Bytes;
use tokio::{net::TcpListener, task::JoinHandle};

const TERMS: Terms = Terms { lease: Duration::from_secs(3), view: Duration::from_secs(1), skew: Duration::ZERO };

/// A node over a bucket, in this process.
struct TieredNode {
    store: TieredStore,
    uri: String,
    remote: RemoteStore,
    token: CancellationToken,
    tasks: Vec<JoinHandle<anyhow::Result<()>>>,
}

async fn tiered(bucket: &Arc<TestBucket>, folder: &Path, durability: Durability, limit: Option<u64>) -> TieredStore {
    let durable =
        Durable::open(bucket.clone(), "s3://test".to_owned(), "aether", &folder.join("packs"), TERMS).await.unwrap();
    let config = TierConfig { durability, cache_limit: limit, waste: 0 };
    let store = TieredStore::over(durable, common::open(folder), config);
    store.learn().await.unwrap();
    store
}

impl TieredNode {
    async fn start(bucket: &Arc<TestBucket>, folder: &Path, durability: Durability, limit: Option<u64>) -> Self {
        let store = tiered(bucket, folder, durability, limit).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("http://{}", listener.local_addr().unwrap());
        let mut config = RemoteConfig::new(&uri);
        config.patience = Duration::ZERO;
        let token = CancellationToken::new();
        let metrics = StoreMetrics::new(&Metrics::new());
        let serving = aether_store_node::serve(listener, store.clone(), metrics, Guard::default(), token.clone());
        let tasks = vec![tokio::spawn(serving), tokio::spawn(store.clone().work(token.clone()))];
        Self { store, uri, remote: RemoteStore::lazy(&config).unwrap(), token, tasks }
    }

    fn durable(&self) -> DurableStatistics {
        self.store.statistics().durable.unwrap()
    }

    async fn until(&self, what: &str, good: impl Fn(&DurableStatistics) -> bool) {
        for _ in 0..600 {
            if good(&self.durable()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("it never became {what}: {:?}", self.durable());
    }

    async fn stop(self) {
        self.token.cancel();
        for task in self.tasks {
            task.await.unwrap().unwrap();
        }
    }
}

fn names(blobs: &[(Blob, Bytes)]) -> Vec<Blob> {
    blobs.iter().map(|(blob, _)| *blob).collect()
}

async fn assert_reads(store: &dyn Store, blobs: &[(Blob, Bytes)]) {
    for (chunk, blobs) in store.read_batch(&names(blobs)).await.unwrap().into_iter().zip(blobs) {
        assert_eq!(chunk, blobs.1, "{}", blobs.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_keeps_the_promises_of_a_store_in_both_ways() {
    for durability in [Durability::Through, Durability::Behind] {
        let bucket = Arc::new(TestBucket::default());
        let folder = tempfile::tempdir().unwrap();
        let node = TieredNode::start(&bucket, folder.path(), durability, None).await;
        conformance(&node.remote).await;
        node.until("durable", |held| held.compared && held.pending_blobs == 0).await;
        node.stop().await;

        // A node that has nothing but the bucket has it all.
        let folder = tempfile::tempdir().unwrap();
        let node = TieredNode::start(&bucket, folder.path(), durability, None).await;
        let sizes = [(1000, 1), (1005, 3670016 - 128), (1009, 9 << 20), (2005, 10 + 97 * 5), (2400, 5 << 20)];
        let blobs: Vec<_> = sizes.into_iter().map(|(seed, length)| blob(seed, length)).collect();
        assert_eq!(node.remote.find_missing(&names(&blobs)).await.unwrap(), []);
        assert_reads(&node.remote, &blobs).await;
        assert_eq!(node.store.disk().missing(&names(&blobs)).unwrap(), [], "they are kept on the disk");
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_tree_is_read_from_the_bucket_with_few_requests() {
    let bucket = Arc::new(TestBucket::default());
    let folder = tempfile::tempdir().unwrap();
    let node = TieredNode::start(&bucket, folder.path(), Durability::Through, None).await;
    let source = MemoryStore::new();
    let mut files = Vec::new();
    let folders: Vec<(String, Node)> = (0..100)
        .map(|n| {
            let inner: Vec<(String, Node)> = (0..20)
                .map(|k| {
                    let (blob, data) = blob(n * 100 + k, 500);
                    source.put(data);
                    files.push(blob);
                    (format!("f{k}"), file(blob))
                })
                .collect();
            let inner = directory(inner.iter().map(|(name, node)| (name.as_str(), node.clone())));
            (format!("d{n}"), Node::Directory(source.put_directory(&inner)))
        })
        .collect();
    let root = source.put_directory(&directory(folders.iter().map(|(name, node)| (name.as_str(), node.clone()))));
    let before = node.durable().bucket.requests;
    upload_tree(root, Arc::new(source), &node.remote, &|_| {}).await.unwrap();
    let requests = node.durable().bucket.requests - before;
    assert!(requests <= 10, "{requests} requests to upload 2,000 files and 101 directories");
    node.stop().await;

    let fresh = tempfile::tempdir().unwrap();
    let node = TieredNode::start(&bucket, fresh.path(), Durability::Through, None).await;
    let before = node.durable().bucket.requests;
    let target = LocalStore::open(LocalConfig {
        objects: fresh.path().join("target"),
        index: fresh.path().join("target-index"),
        inline_limit: 0,
    })
    .unwrap();
    fetch_directories(root, &node.remote, &target).await.unwrap();
    let read = node.remote.read_batch(&files).await.unwrap();
    assert!(files.iter().zip(read).all(|(blob, data)| blob.matches(&data)));
    let requests = node.durable().bucket.requests - before;
    assert!(requests <= 20, "{requests} requests to read them");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_or_lost_copy_is_healed_from_the_bucket() {
    let bucket = Arc::new(TestBucket::default());
    let folder = tempfile::tempdir().unwrap();
    let node = TieredNode::start(&bucket, folder.path(), Durability::Through, None).await;
    let blobs = vec![blob(1, 100_000), blob(2, 6 << 20), blob(3, 200_000)];
    node.remote.write_batch(blobs.clone()).await.unwrap();
    let damage = |blob: &Blob| {
        let path = node.store.disk().object_path(&blob.digest);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        std::fs::write(&path, bytes(9, blob.size as usize)).unwrap();
    };
    damage(&blobs[0].0);
    std::fs::remove_file(node.store.disk().object_path(&blobs[2].0.digest)).unwrap();
    assert_reads(&node.remote, &[blobs[0].clone(), blobs[2].clone()]).await;
    // A large blob is on its way to the client before its damage is seen: that one call fails, and says why.
    damage(&blobs[1].0);
    let error = node.remote.read(blobs[1].0).await.unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
    assert_reads(&node.remote, &blobs).await;
    assert!(node.store.disk().fsck(false).unwrap().is_healthy());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn through_acknowledges_nothing_that_is_not_in_the_bucket() {
    let bucket = Arc::new(TestBucket::default());
    let folder = tempfile::tempdir().unwrap();
    let node = TieredNode::start(&bucket, folder.path(), Durability::Through, None).await;
    bucket.refuse(true);
    let blobs = vec![blob(1, 100), blob(2, 100_000), blob(3, 6 << 20)];
    for one in &blobs {
        let error = node.remote.write(one.0, one.1.clone()).await.unwrap_err();
        assert!(error.is_transient(), "{error}");
        let text = error.to_string();
        assert!(text.contains("s3://test/aether/packs/") && text.contains("slow down"), "{text}");
    }
    // The disk has them, which is not what was promised.
    assert_eq!(node.store.disk().missing(&names(&blobs)).unwrap(), []);
    assert_eq!(node.remote.find_missing(&names(&blobs)).await.unwrap(), names(&blobs));
    bucket.refuse(false);
    node.remote.write_batch(blobs.clone()).await.unwrap();
    assert_eq!(node.remote.find_missing(&names(&blobs)).await.unwrap(), []);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_tells_what_is_pending_and_brings_it_later_even_after_a_restart() {
    let bucket = Arc::new(TestBucket::default());
    let folder = tempfile::tempdir().unwrap();
    let node = TieredNode::start(&bucket, folder.path(), Durability::Behind, None).await;
    node.until("compared", |held| held.compared).await;
    bucket.refuse(true);
    let blobs: Vec<_> = (0..50).map(|n| blob(n, 1000 * n as usize + 1)).chain([blob(99, 6 << 20)]).collect();
    node.remote.write_batch(blobs.clone()).await.unwrap();
    assert_eq!(node.remote.find_missing(&names(&blobs)).await.unwrap(), []);
    let held = node.durable();
    assert_eq!(held.pending_blobs, blobs.len() as u64);
    assert_eq!(held.pending_bytes, blobs.iter().map(|(blob, _)| blob.size).sum::<u64>());
    node.stop().await;

    // As after a kill: nothing but the disk says that something is pending. The lock of the index goes with the last user.
    let again = loop {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let opened =
            Durable::open(bucket.clone(), "s3://test".to_owned(), "aether", &folder.path().join("packs"), TERMS).await;
        if opened.is_ok() {
            drop(opened);
            tokio::time::sleep(Duration::from_millis(50)).await;
            break TieredNode::start(&bucket, folder.path(), Durability::Behind, None).await;
        }
    };
    again.until("compared", |held| held.compared && held.pending_blobs == blobs.len() as u64).await;
    bucket.refuse(false);
    again.until("durable", |held| held.pending_blobs == 0 && held.pending_bytes == 0).await;
    again.stop().await;
    let other = tempfile::tempdir().unwrap();
    let other = TieredNode::start(&bucket, other.path(), Durability::Through, None).await;
    assert_reads(&other.remote, &blobs).await;
    other.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_needs_no_bucket_to_take_uploads() {
    let bucket = Arc::new(TestBucket::default());
    let folder = tempfile::tempdir().unwrap();
    let node = TieredNode::start(&bucket, folder.path(), Durability::Behind, None).await;
    let (first, second) = (blob(1, 100), blob(2, 20_000));
    node.remote.write(first.0, first.1.clone()).await.unwrap();
    bucket.refuse(true);
    bucket.refuse_lists(true);
    // Later than what was listed at the start may count for.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(node.remote.find_missing(&[first.0, second.0]).await.unwrap(), [second.0]);
    node.remote.write(second.0, second.1.clone()).await.unwrap();
    assert_eq!(node.remote.find_missing(&[first.0, second.0]).await.unwrap(), []);
    // A pin is a promise for the whole store, and is not made blindly.
    let (store, nowhere) = (node.store.clone(), blob(3, 10).0);
    let error = tokio::task::spawn_blocking(move || store.pin("uid", "Checkpoint", "", nowhere)).await.unwrap();
    assert!(error.unwrap_err().is_transient());
    bucket.refuse(false);
    bucket.refuse_lists(false);
    node.until("durable", |held| held.pending_blobs == 0).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_brings_what_a_client_did_not_wait_for() {
    let bucket = Arc::new(TestBucket::default());
    let folder = tempfile::tempdir().unwrap();
    let node = TieredNode::start(&bucket, folder.path(), Durability::Behind, None).await;
    node.until("compared", |held| held.compared).await;
    let blobs: Vec<_> = (0..20).map(|n| blob(n, 50_000)).collect();
    for one in &blobs {
        // It has begun, and is left alone with it.
        assert!(futures::poll!(std::pin::pin!(node.store.write_batch(vec![one.clone()]))).is_pending());
    }
    let names = names(&blobs);
    for _ in 0..200 {
        if node.store.durable().unwrap().missing(&names).unwrap().is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(node.store.disk().missing(&names).unwrap(), []);
    assert_eq!(node.store.durable().unwrap().missing(&names).unwrap(), []);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn packs_that_are_gone_are_made_again_of_what_the_disk_has() {
    let bucket = Arc::new(TestBucket::default());
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let node = TieredNode::start(&bucket, folders[0].path(), Durability::Behind, None).await;
    let blobs: Vec<_> = (0..20).map(|n| blob(n, 5000)).collect();
    node.remote.write_batch(blobs.clone()).await.unwrap();
    node.until("durable", |held| held.compared && held.pending_blobs == 0).await;
    let other = TieredNode::start(&bucket, folders[1].path(), Durability::Through, None).await;
    let durable = other.store.durable().unwrap();
    for pack in durable.packs().unwrap() {
        bucket.remove(&format!("aether/packs/{pack}")).await.unwrap();
    }
    node.store.rebuild().await.unwrap();
    node.until("durable", |held| held.compared && held.pending_blobs == 0).await;
    assert_reads(&other.remote, &blobs).await;
    for node in [node, other] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_stays_within_its_limit_and_what_is_wanted_stays() {
    const LIMIT: u64 = 8 << 20;
    let bucket = Arc::new(TestBucket::default());
    let folder = tempfile::tempdir().unwrap();
    let node = TieredNode::start(&bucket, folder.path(), Durability::Through, Some(LIMIT)).await;
    let blobs: Vec<_> = (0..300).map(|n| blob(n, 60_000)).collect();
    for chunk in blobs.chunks(30) {
        node.remote.write_batch(chunk.to_vec()).await.unwrap();
    }
    for _ in 0..200 {
        if node.store.statistics().disk.file_bytes <= LIMIT {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(node.store.statistics().disk.file_bytes <= LIMIT, "{:?}", node.store.statistics());
    assert_eq!(node.remote.find_missing(&names(&blobs)).await.unwrap(), []);
    assert_reads(&node.remote, &blobs).await;
    node.stop().await;

    // What only the disk has never goes, whatever the limit is.
    let bucket = Arc::new(TestBucket::default());
    bucket.refuse(true);
    let folder = tempfile::tempdir().unwrap();
    let node = TieredNode::start(&bucket, folder.path(), Durability::Behind, Some(LIMIT)).await;
    node.remote.write_batch(blobs.clone()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(node.store.disk().missing(&names(&blobs)).unwrap(), []);
    bucket.refuse(false);
    node.until("durable", |held| held.pending_blobs == 0).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_collected_goes_from_all_disks_and_none_brings_it_back() {
    let bucket = Arc::new(TestBucket::default());
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let node = TieredNode::start(&bucket, folders[0].path(), Durability::Through, None).await;
    let away = TieredNode::start(&bucket, folders[1].path(), Durability::Behind, None).await;
    let kept: Vec<_> = (0..5).map(|n| blob(n, 5000)).collect();
    let garbage: Vec<_> = (10..30).map(|n| blob(n, 5000)).collect();
    let source = MemoryStore::new();
    for (_, data) in &kept {
        source.put(data.clone());
    }
    let names_of_kept: Vec<String> = (0..kept.len()).map(|n| n.to_string()).collect();
    let entries = names_of_kept.iter().zip(&kept).map(|(name, (blob, _))| (name.as_str(), file(*blob)));
    let tree = source.put_directory(&directory(entries));
    upload_tree(tree, Arc::new(source), &away.remote, &|_| {}).await.unwrap();
    for node in [&node, &away] {
        node.remote.write_batch(garbage.clone()).await.unwrap();
    }
    away.until("durable", |held| held.compared && held.pending_blobs == 0).await;
    let store = node.store.clone();
    tokio::task::spawn_blocking(move || store.pin("uid", "Checkpoint", "", tree).unwrap()).await.unwrap();
    away.stop().await;

    tokio::time::sleep(TERMS.lease + Duration::from_millis(100)).await;
    let store = node.store.clone();
    let collect = move || store.collect(Pace::new(None), &mut |_| ControlFlow::Continue(()));
    let done = tokio::task::spawn_blocking(collect).await.unwrap().unwrap();
    assert!(done.deleted.blobs >= 20, "{done:?}");
    let is_gone = |node: &TieredNode| {
        assert_eq!(node.store.durable().unwrap().missing(&names(&garbage)).unwrap(), names(&garbage));
        assert_eq!(node.store.disk().missing(&names(&garbage)).unwrap(), names(&garbage));
        assert_eq!(node.store.durable().unwrap().missing(&names(&kept)).unwrap(), []);
    };
    is_gone(&node);
    let back = TieredNode::start(&bucket, folders[1].path(), Durability::Behind, None).await;
    back.until("compared", |held| held.compared && held.pending_blobs == 0).await;
    is_gone(&back);
    assert_reads(&back.remote, &kept).await;
    // As new as ever.
    back.remote.write_batch(garbage.clone()).await.unwrap();
    back.until("durable", |held| held.pending_blobs == 0).await;
    assert_reads(&node.remote, &garbage).await;
    for node in [node, back] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_found_and_taken_from_the_other_place() {
    let bucket = Arc::new(TestBucket::default());
    let folder = tempfile::tempdir().unwrap();
    let node = TieredNode::start(&bucket, folder.path(), Durability::Through, None).await;
    let blobs: Vec<_> = (0..4).map(|n| blob(n, 40_000)).collect();
    for one in &blobs {
        node.remote.write(one.0, one.1.clone()).await.unwrap();
    }
    // One on the disk, one in the bucket, one in both.
    for (one, _) in [&blobs[0], &blobs[2]] {
        let path = node.store.disk().object_path(&one.digest);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[7] ^= 1;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, bytes).unwrap();
    }
    for (one, _) in [&blobs[1], &blobs[2]] {
        let place = node.store.durable().unwrap().places(one).unwrap().pop().unwrap();
        bucket.damage(&format!("aether/packs/{}", place.pack), place.entry.offset + 9).await;
    }
    let store = node.store.clone();
    let (disk, of_bucket, lost) = tokio::task::spawn_blocking(move || {
        let of_bucket = store.scrub_bucket(Pace::new(None), &mut |_| ControlFlow::Continue(())).unwrap().unwrap().state;
        let disk = store.scrub_disk(Pace::new(None), &mut |_| ControlFlow::Continue(())).unwrap();
        (disk, of_bucket, store.damages(10).unwrap())
    })
    .await
    .unwrap();
    assert_eq!((of_bucket.blobs, of_bucket.damaged, of_bucket.healed), (4, 2, 1), "{of_bucket:?}");
    assert_eq!(lost.iter().map(|damage| damage.blob).collect::<Vec<_>>(), [blobs[2].0]);
    assert_eq!((disk.blobs, disk.healed), (3, 1), "the lost one was set aside when it was to heal: {disk:?}");
    assert_reads(&node.remote, &[blobs[0].clone(), blobs[1].clone(), blobs[3].clone()]).await;
    assert_eq!(node.remote.find_missing(&names(&blobs)).await.unwrap(), [blobs[2].0]);
    let other = tempfile::tempdir().unwrap();
    let other = TieredNode::start(&bucket, other.path(), Durability::Through, None).await;
    assert_reads(&other.remote, &[blobs[0].clone(), blobs[1].clone(), blobs[3].clone()]).await;
    for node in [node, other] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_nodes_see_what_each_wrote() {
    let bucket = Arc::new(TestBucket::default());
    let folders: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let mut nodes = Vec::new();
    for folder in &folders {
        nodes.push(TieredNode::start(&bucket, folder.path(), Durability::Through, None).await);
    }
    let blobs: Vec<_> = (0..30).map(|n| blob(n, 10_000)).collect();
    for (one, node) in blobs.iter().zip(nodes.iter().cycle()) {
        node.remote.write(one.0, one.1.clone()).await.unwrap();
    }
    let trees: Vec<Blob> = names(&blobs[..3]);
    for (node, tree) in nodes.iter().zip(trees.iter().cycle().skip(1)) {
        let (store, tree) = (node.store.clone(), *tree);
        let pinned = tokio::task::spawn_blocking(move || store.pin("uid", "Checkpoint", &tree.to_string(), tree));
        pinned.await.unwrap().unwrap();
    }
    for node in &nodes {
        assert_reads(&node.remote, &blobs).await;
    }
    // Nobody has it: that is said, after the bucket was asked.
    let error = nodes[0].remote.read(blob(77, 10).0).await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound { .. }), "{error}");
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pins_of_a_disk_move_to_the_bucket_and_its_blobs_follow() {
    let bucket = Arc::new(TestBucket::default());
    let folder = tempfile::tempdir().unwrap();
    let disk = common::open(folder.path());
    let (content, data) = blob(1, 3000);
    disk.put_batch(vec![(content, data.clone())]).unwrap();
    let tree = disk.put_directory(&directory([("f", file(content))])).unwrap();
    disk.pin("uid", "Checkpoint", "", tree).unwrap();
    drop(disk);
    let node = TieredNode::start(&bucket, folder.path(), Durability::Through, None).await;
    node.until("durable", |held| held.compared && held.pending_blobs == 0).await;
    assert_eq!(node.store.disk().roots(None, None).unwrap(), []);
    node.stop().await;

    let fresh = tempfile::tempdir().unwrap();
    let node = TieredNode::start(&bucket, fresh.path(), Durability::Through, None).await;
    let store = node.store.clone();
    tokio::task::spawn_blocking(move || {
        let roots: HashSet<Blob> = store.roots(Some("uid"), None).unwrap().into_iter().map(|root| root.tree).collect();
        assert_eq!(roots, HashSet::from([tree]));
        assert!(store.fsck(false).unwrap().is_healthy());
        let error = store.pin("uid", "Checkpoint", "x", blob(5, 10).0).unwrap_err();
        assert!(matches!(error, StoreError::NotFound { .. }), "{error}");
        assert_eq!(store.read_blob(&content).unwrap(), data);
    })
    .await
    .unwrap();
    node.stop().await;
}

#[test]
fn a_disk_that_becomes_a_cache_is_rid_of_what_a_collection_had_begun() {
    for (broken_off, acquitted) in [(Phase::Rescue, true), (Phase::Sweep, false)] {
        let folder = tempfile::tempdir().unwrap();
        let config = LocalConfig {
            objects: folder.path().join("objects"),
            index: folder.path().join("index"),
            inline_limit: 100,
        };
        let collect = |store: &LocalStore, until: Option<Phase>| {
            store.collect(Pace::new(None), &mut |progress| match until {
                Some(phase) if progress.phase == phase => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            })
        };
        let blobs = vec![blob(1, 10), blob(2, 1000)];
        let names = names(&blobs);
        let store = LocalStore::open_collected(config.clone(), Duration::ZERO).unwrap();
        store.put_batch(blobs.clone()).unwrap();
        // Its lease ends in the millisecond in which it began.
        std::thread::sleep(Duration::from_millis(2));
        collect(&store, Some(broken_off)).unwrap_err();
        drop(store);

        let store = LocalStore::open_cache(config.clone()).unwrap();
        let left = if acquitted { vec![] } else { names.clone() };
        assert_eq!(store.missing(&names).unwrap(), left);
        assert_eq!(store.object_path(&names[1].digest).exists(), acquitted);
        assert_eq!(store.statistics().file_blobs, u64::from(acquitted));
        store.put_batch(blobs).unwrap();
        drop(store);

        let store = LocalStore::open_collected(config, Duration::from_secs(3600)).unwrap();
        let done = collect(&store, None).unwrap();
        assert!(done.protected_until.is_some(), "the pins of a cache are elsewhere");
        assert_eq!(store.missing(&names).unwrap(), []);
    }
}

#[test]
fn what_was_the_cache_of_a_bucket_is_not_collected() {
    let folder = tempfile::tempdir().unwrap();
    let (content, data) = blob(1, 3000);
    common::open(folder.path()).put_batch(vec![(content, data)]).unwrap();
    let gc = |options: &[&str]| {
        let output = std::process::Command::new(program::PROGRAM).arg("gc").args(options).output().unwrap();
        (output.status.success(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    let here = ["--data-dir", folder.path().to_str().unwrap()];
    let packs = folder.path().join("packs");
    std::fs::create_dir(&packs).unwrap();
    let (done, said) = gc(&here);
    assert!(!done && said.contains(packs.to_str().unwrap()), "{said}");
    // A node serves it, and does not collect it either.
    let node = program::Process::start(folder.path());
    let (done, said) = gc(&["--address", &node.uri()]);
    assert!(!done && said.contains("not open for being collected"), "{said}");
    assert!(node.end(rustix::process::Signal::TERM).success());
    // The bucket is gone for good.
    std::fs::remove_dir(&packs).unwrap();
    let (done, said) = gc(&here);
    assert!(done, "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_several_nodes_goes_on_when_one_ends() {
    let bucket = Arc::new(TestBucket::default());
    let folders: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let mut nodes = Vec::new();
    for folder in &folders {
        nodes.push(TieredNode::start(&bucket, folder.path(), Durability::Through, None).await);
    }
    let uris: Vec<&str> = nodes.iter().map(|node| node.uri.as_str()).collect();
    let mut config = RemoteConfig::new(uris.join(","));
    config.patience = Duration::from_secs(2);
    let remote = RemoteStore::lazy(&config).unwrap();
    remote.check().await.unwrap();
    conformance(&remote).await;
    let blobs: Vec<_> = (0..90).map(|n| blob(n, 10_000)).chain([blob(99, 6 << 20)]).collect();
    remote.write_batch(blobs.clone()).await.unwrap();
    for node in &nodes {
        let held = node.store.disk().missing(&names(&blobs)).unwrap();
        assert!(held.len() > 40 && held.len() < 80, "each has its share: {}", held.len());
    }
    let (nowhere, _) = blob(300, 10);
    assert!(matches!(remote.read(nowhere).await, Err(StoreError::NotFound { .. })));
    // What a disk was the only one to have is found by the others.
    nodes.remove(1).stop().await;
    assert_reads(&remote, &blobs).await;
    assert_eq!(remote.find_missing(&names(&blobs)).await.unwrap(), [], "they have just been looked for");
    assert_eq!(
        remote.read_range(blobs[90].0, 1 << 20, 100).await.unwrap(),
        blobs[90].1.slice(1 << 20..(1 << 20) + 100)
    );
    let more: Vec<_> = (200..260).map(|n| blob(n, 20_000)).collect();
    remote.write_batch(more.clone()).await.unwrap();
    remote.check().await.unwrap();
    // The node that does not answer might know: that is no "not found".
    let error = remote.read(nowhere).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    nodes.remove(1).stop().await;
    assert_reads(&remote, &more).await;
    nodes.remove(0).stop().await;
    let error = remote.read(more[0].0).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
}
