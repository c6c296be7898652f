//! Three store nodes over a real S3 service: nodes are killed and lose their disks at random moments while clients upload,
//! pin, unpin and read, and while the bucket is collected over and over. Nothing that was acknowledged and is pinned is lost, not even
//! when in the end all disks are; and nothing else is left then.
//!
//! Where uploads are acknowledged before they are in the bucket, the same holds as long as disks are not lost.
//!
//! `AETHER_SEED` repeats the sequence of one run (not its timing); `AETHER_ROUNDS` sets its length.

mod node;

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use aether_cas::{
    Blob, MemoryStore, RemoteStore, Store, StoreError,
    remote::RemoteConfig,
    testing::{blob, bytes, directory, file},
    transfer::upload_tree,
    tree,
};
use aether_proto::store::v1::{
    CollectProgress, CollectRequest, GetStatisticsRequest, ListRootsRequest, PinRootRequest, Root, UnpinRootsRequest,
    store_admin_client::StoreAdminClient,
};
use aether_testkit::bucket::Bucket;
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};

use node::Node;

const NODES: usize = 3;
const UPLOADERS: u64 = 3;

/// Random numbers that a seed repeats.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(1);
        let bytes: [u8; 8] = bytes(self.0, 8)[..].try_into().unwrap();
        u64::from_le_bytes(bytes) % sides
    }
}

/// For how long an answer is good, and by how old a list of the condemned it is given. Clocks are one clock here.
const TERMS: [&str; 3] = ["--gc-lease=12s", "--s3-view=1000", "--s3-skew=0"];
const LEASE: Duration = Duration::from_secs(12);
/// A client that takes longer from its first question to its pin was promised nothing.
const PROMISED: Duration = Duration::from_secs(5);
const OWNER: &str = "property";
const KIND: &str = "Checkpoint";

/// A tree that was uploaded.
struct Tree {
    root: Blob,
    /// Contents, from which seed and how long.
    contents: Vec<(Blob, u64, usize)>,
    directories: HashMap<Blob, tree::Directory>,
}

/// Pins by name; of those whose last change was not acknowledged nothing is known.
type Pins = BTreeMap<String, Option<Arc<Tree>>>;

struct World {
    remote: RemoteStore,
    uris: Vec<String>,
    done: Mutex<Pins>,
    stop: AtomicBool,
    uploads: AtomicU64,
    failed_uploads: AtomicU64,
    reads: AtomicU64,
    failed_reads: AtomicU64,
    pins: AtomicU64,
    collections: AtomicU64,
    deleted: AtomicU64,
}

impl World {
    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Uploads one tree after the other.
    async fn upload(self: Arc<Self>, uploader: u64, seed: u64) {
        let mut dice = Dice(seed ^ uploader << 32);
        let mut number = (uploader + 1) * 1_000_000_000;
        while !self.is_over() {
            let source = MemoryStore::new();
            let mut contents = Vec::new();
            let mut directories = HashMap::new();
            let mut folders = Vec::new();
            for n in 0..1 + dice.roll(4) {
                let mut files = Vec::new();
                for k in 0..1 + dice.roll(30) {
                    number += 1;
                    let length = match dice.roll(60) {
                        0 => 4_500_000 + dice.roll(2_000_000),
                        1..10 => 20_000 + dice.roll(200_000),
                        _ => 1 + dice.roll(8_000),
                    };
                    let (blob, data) = blob(number, length as usize);
                    source.put(data);
                    contents.push((blob, number, length as usize));
                    files.push((format!("f{k}"), file(blob)));
                }
                let folder = directory(files.iter().map(|(name, node)| (name.as_str(), node.clone())));
                let blob = source.put_directory(&folder);
                directories.insert(blob, folder);
                folders.push((format!("d{n}"), tree::Node::Directory(blob)));
            }
            let top = directory(folders.iter().map(|(name, node)| (name.as_str(), node.clone())));
            let root = source.put_directory(&top);
            directories.insert(root, top);
            let begin = Instant::now();
            match upload_tree(root, Arc::new(source), &self.remote, &|_| {}).await {
                Ok(_) => {
                    self.uploads.fetch_add(1, Ordering::Relaxed);
                    let tree = Arc::new(Tree { root, contents, directories });
                    // What is not pinned is soon nobody's.
                    if dice.roll(3) > 0 {
                        self.pin(&mut dice, uploader, tree, begin).await;
                    }
                }
                Err(error) => {
                    assert!(error.is_transient(), "an upload failed for good: {error}");
                    self.failed_uploads.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }

    /// Pins a tree at some node, or unpins; each uploader has its own names, so that it knows what the last word was.
    async fn pin(&self, dice: &mut Dice, uploader: u64, tree: Arc<Tree>, begin: Instant) {
        let name = format!("{uploader}-{}", dice.roll(20));
        let uri = self.uris[dice.roll(NODES as u64) as usize].clone();
        let Ok(mut admin) = connect(uri).await else { return };
        if begin.elapsed() > PROMISED {
            return;
        }
        // While it is under way, and when it fails, nobody knows.
        self.done.lock().unwrap().remove(&name);
        let (owner_uid, kind) = (OWNER.to_owned(), KIND.to_owned());
        let pinned = if dice.roll(5) == 0 {
            let request = UnpinRootsRequest { owner_uid, kind, name: Some(name.clone()) };
            admin.unpin_roots(request).await.map(|_| None)
        } else {
            let pin = Root { owner_uid, kind, name: name.clone(), tree: tree.root.to_string(), pinned_at: 0 };
            admin.pin_root(PinRootRequest { root: Some(pin) }).await.map(|_| Some(tree))
        };
        match pinned {
            Ok(pinned) => {
                self.pins.fetch_add(1, Ordering::Relaxed);
                self.done.lock().unwrap().insert(name, pinned);
            }
            Err(status) => {
                let refused = status.code() == Code::NotFound && begin.elapsed() < PROMISED;
                assert!(!refused, "a tree was stored and is not there: {status}");
            }
        }
    }

    /// Collects the bucket by one node after the other.
    async fn collect(self: Arc<Self>, seed: u64) {
        let mut dice = Dice(seed ^ 99 << 40);
        while !self.is_over() {
            let uri = self.uris[dice.roll(NODES as u64) as usize].clone();
            if let Ok(done) = collect(uri, false).await {
                assert!(done.incomplete_roots.is_empty(), "{:?}", done.incomplete_roots);
                self.collections.fetch_add(1, Ordering::Relaxed);
                self.deleted.fetch_add(done.deleted_blobs, Ordering::Relaxed);
            }
            tokio::time::sleep(Duration::from_millis(dice.roll(500))).await;
        }
    }

    /// Reads what was acknowledged, at random.
    async fn read(self: Arc<Self>, seed: u64) {
        let mut dice = Dice(seed ^ 77 << 40);
        while !self.is_over() {
            let pinned: Vec<(String, Arc<Tree>)> = {
                let done = self.done.lock().unwrap();
                done.iter().filter_map(|(name, tree)| Some((name.clone(), tree.clone()?))).collect()
            };
            let Some((name, tree)) = pinned.get(dice.roll(pinned.len().max(1) as u64) as usize) else {
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            let count = tree.contents.len() as u64;
            let picked: Vec<_> = (0..20).map(|_| tree.contents[dice.roll(count) as usize]).collect();
            let names: Vec<Blob> = picked.iter().map(|(blob, ..)| *blob).collect();
            match self.remote.read_batch(&names).await {
                Ok(read) => {
                    for (data, (blob, seed, length)) in read.into_iter().zip(picked) {
                        assert_eq!(data, bytes(seed, length), "{blob}");
                    }
                    self.reads.fetch_add(names.len() as u64, Ordering::Relaxed);
                }
                Err(error) => {
                    let is_pinned = || {
                        let done = self.done.lock().unwrap();
                        done.get(name).is_some_and(|now| now.as_ref().is_some_and(|now| Arc::ptr_eq(now, tree)))
                    };
                    assert!(error.is_transient() || !is_pinned(), "what was acknowledged is lost: {error}");
                    self.failed_reads.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }

    /// Compares everything that was acknowledged with what the store has.
    async fn compare(&self) {
        let pins = self.done.lock().unwrap().clone();
        let trees: Vec<&Arc<Tree>> = pins.values().flatten().collect();
        let contents: Vec<_> = trees.iter().flat_map(|tree| &tree.contents).collect();
        for some in contents.chunks(500) {
            let names: Vec<Blob> = some.iter().map(|(blob, ..)| *blob).collect();
            let read = self.remote.read_batch(&names).await.unwrap();
            for (data, (blob, seed, length)) in read.into_iter().zip(some) {
                assert_eq!(data, bytes(*seed, *length), "{blob}");
            }
        }
        let directories: Vec<_> = trees.iter().flat_map(|tree| &tree.directories).collect();
        let names: Vec<Blob> = directories.iter().map(|(blob, _)| **blob).collect();
        for (data, (_, directory)) in self.remote.read_batch(&names).await.unwrap().iter().zip(&directories) {
            assert_eq!(tree::Directory::decode(data).unwrap(), **directory);
        }
        for uri in &self.uris {
            let request = ListRootsRequest { owner_uid: OWNER.to_owned(), kind: String::new() };
            let listed = connect(uri.clone()).await.unwrap().list_roots(request).await.unwrap();
            let listed: HashMap<String, String> =
                listed.into_inner().roots.into_iter().map(|root| (root.name, root.tree)).collect();
            for (name, pinned) in &pins {
                let pinned = pinned.as_ref().map(|tree| tree.root.to_string());
                assert_eq!(listed.get(name).cloned(), pinned, "pin {name} at {uri}");
            }
        }
        let (trees, contents) = (trees.len(), contents.len());
        println!("{trees} pinned trees with {contents} contents and {} directories are there", directories.len());
    }
}

async fn connect(uri: String) -> Result<StoreAdminClient<Channel>, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(uri)?.timeout(Duration::from_secs(20));
    Ok(StoreAdminClient::new(endpoint.connect().await?))
}

/// One collection by one node, to its end, or a dry run.
async fn collect(uri: String, dry_run: bool) -> Result<CollectProgress, tonic::Status> {
    let unavailable = |error: tonic::transport::Error| tonic::Status::unavailable(error.to_string());
    let mut admin = StoreAdminClient::new(Endpoint::from_shared(uri).unwrap().connect().await.map_err(unavailable)?);
    let mut answers = admin.collect(CollectRequest { dry_run, ..Default::default() }).await?.into_inner();
    let mut last = None;
    while let Some(answer) = answers.message().await? {
        last = answer.progress;
    }
    last.ok_or_else(|| tonic::Status::internal("no progress"))
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().and_then(|text| text.parse().ok())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_die_at_random_and_nothing_acknowledged_is_lost() {
    play("through", number("AETHER_ROUNDS").unwrap_or(50)).await;
    play("behind", number("AETHER_ROUNDS").unwrap_or(10)).await;
}

/// So many rounds, and what is there in the end.
async fn play(durability: &'static str, rounds: u64) {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    let seed = number("AETHER_SEED").unwrap_or(clock);
    let keeps_disks = durability == "behind";
    println!("AETHER_SEED={seed}");
    let mut dice = Dice(seed);
    let folder = tempfile::tempdir().unwrap();
    let bucket = Bucket::start(folder.path());
    let mut nodes: Vec<Node> = (0..NODES)
        .map(|n| Node::new(PathBuf::from(folder.path()).join(format!("node-{n}")), &bucket, durability))
        .collect();
    nodes.iter_mut().for_each(Node::start);
    nodes.iter_mut().for_each(Node::wait_until_it_serves);

    let uris: Vec<String> = nodes.iter().map(Node::uri).collect();
    let world = Arc::new(World {
        remote: RemoteStore::lazy(&RemoteConfig::new(uris.join(","))).unwrap(),
        uris,
        done: Mutex::default(),
        stop: AtomicBool::new(false),
        uploads: AtomicU64::new(0),
        failed_uploads: AtomicU64::new(0),
        reads: AtomicU64::new(0),
        failed_reads: AtomicU64::new(0),
        pins: AtomicU64::new(0),
        collections: AtomicU64::new(0),
        deleted: AtomicU64::new(0),
    });
    let mut clients: Vec<_> = (0..UPLOADERS).map(|n| tokio::spawn(world.clone().upload(n, seed))).collect();
    clients.push(tokio::spawn(world.clone().read(seed)));
    clients.push(tokio::spawn(world.clone().collect(seed)));

    let begin = Instant::now();
    let (mut kills, mut lost_disks) = (0, 0);
    for _ in 0..rounds {
        tokio::time::sleep(Duration::from_millis(50 + dice.roll(700))).await;
        // Mostly one node, sometimes all of them.
        let victims: Vec<usize> = match dice.roll(10) {
            0 => (0..NODES).collect(),
            1..3 => (0..2).map(|n| (n + dice.roll(3) as usize) % NODES).collect(),
            _ => vec![dice.roll(NODES as u64) as usize],
        };
        for &victim in &victims {
            nodes[victim].kill();
            kills += 1;
        }
        tokio::time::sleep(Duration::from_millis(dice.roll(500))).await;
        for victim in victims {
            nodes[victim].kill();
            if dice.roll(4) == 0 && !keeps_disks {
                nodes[victim].lose_disk();
                lost_disks += 1;
            }
            nodes[victim].start();
        }
        // Not always before the next one is killed.
        if dice.roll(3) > 0 {
            tokio::task::block_in_place(|| nodes.iter_mut().for_each(Node::wait_until_it_serves));
        }
        assert!(!clients.iter().any(tokio::task::JoinHandle::is_finished), "a client found something wrong");
    }
    world.stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    tokio::task::block_in_place(|| nodes.iter_mut().for_each(Node::wait_until_it_serves));
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!(
        "{durability}: {rounds} rounds in {:.0?}: {kills} kills, {lost_disks} disks lost; {} trees uploaded, {} uploads gave up; \
         {} reads, {} gave up; {} pins changed; {} collections ended, {} blobs deleted",
        begin.elapsed(),
        count(&world.uploads),
        count(&world.failed_uploads),
        count(&world.reads),
        count(&world.failed_reads),
        count(&world.pins),
        count(&world.collections),
        count(&world.deleted),
    );
    assert!(count(&world.uploads) >= rounds, "clients got on");
    assert!(rounds < 50 || count(&world.deleted) > 0, "collections got on");
    world.compare().await;

    // The bucket alone, when it has everything.
    for uri in &world.uris {
        let mut admin = connect(uri.clone()).await.unwrap();
        let begin = Instant::now();
        loop {
            let held = admin.get_statistics(GetStatisticsRequest {}).await.unwrap().into_inner().durable.unwrap();
            if held.compared && held.pending_blobs == 0 {
                break;
            }
            assert!(begin.elapsed() < Duration::from_secs(60), "it does not get to the bucket: {held:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    for node in &mut nodes {
        node.kill();
        node.lose_disk();
    }
    nodes.iter_mut().for_each(Node::start);
    tokio::task::block_in_place(|| nodes.iter_mut().for_each(Node::wait_until_it_serves));
    world.compare().await;
    let error = world.remote.read(blob(1, 10).0).await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound { .. }), "and nothing else: {error}");

    // What is left is what is pinned, once the leases have ended: those of what is stored anew too.
    let uri = world.uris[0].clone();
    tokio::time::sleep(LEASE).await;
    collect(uri.clone(), false).await.unwrap();
    tokio::time::sleep(LEASE).await;
    let left = collect(uri, true).await.unwrap();
    assert_eq!(left.condemned_blobs, 0, "of {}", left.examined_blobs);
    world.compare().await;
}
