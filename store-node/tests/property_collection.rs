//! Collections beside uploads, pins, unpins and kills never lose what is reachable, and leave nothing else in the end.
//!
//! A real node runs in a process of its own and is ended in each round: at a named point of a collection, or by a signal
//! in the midst of everything. Clients do what the driver and the operator do: build a tree on what they have, upload it as
//! far as the store says that it is missing, then pin it. After each round every tree that is pinned is read to its last
//! byte, and every pin that was acknowledged is there.
//!
//! `AETHER_SEEDS=100` runs more seeds, `AETHER_SEED=7` one.

#[path = "common/program.rs"]
mod program;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use aether_cas::{
    Blob, LocalConfig, LocalStore, RemoteStore, Store, StoreError, crash,
    local::Root,
    testing::{Random, blob, directory, file},
    transfer::upload_tree,
    tree::{Directory, Node},
};
use aether_proto::store::v1::{
    self as proto, CollectRequest, ListRootsRequest, PinRootRequest, UnpinRootsRequest,
    store_admin_client::StoreAdminClient,
};
use program::Process;
use rustix::process::Signal;
use tempfile::TempDir;
use tonic::transport::Channel;

const LEASE: Duration = Duration::from_secs(2);
/// A client that takes longer, on a busy machine, was promised nothing, and does not pin.
const PROMISED: Duration = Duration::from_secs(1);
const OPTIONS: &[&str] =
    &["--gc-lease", "2s", "--gc-interval", "off", "--scrub-interval", "off", "--inline-limit", "200"];
const ROUNDS: u64 = 6;
const WRITERS: u64 = 3;

/// What all writers together know.
struct World {
    folder: TempDir,
    /// Where the trees are made: the node of a session.
    local: LocalStore,
    _local_folder: TempDir,
    /// Pins that were acknowledged, and not given up since.
    pinned: Mutex<BTreeMap<(String, String), Blob>>,
    /// What happened.
    uploads: AtomicU64,
    late: AtomicU64,
}

fn config(folder: &Path, inline_limit: u64) -> LocalConfig {
    LocalConfig { objects: folder.join("objects"), index: folder.join("index"), inline_limit }
}

/// A tree of two levels made of a few contents, so that trees share much and come back.
fn make_tree(local: &LocalStore, random: &mut Random) -> Blob {
    let mut subdirectories = Vec::new();
    let mut made: Vec<Directory> = Vec::new();
    for name in ["a", "b", "c"] {
        let contents: Vec<_> = (0..2)
            .map(|_| {
                let number = random.below(12);
                // In the index, and as files.
                blob(number, if number.is_multiple_of(2) { 90 } else { 700 })
            })
            .collect();
        local.put_batch(contents.clone()).unwrap();
        let names = ["x", "y"];
        let below = directory(names.iter().zip(&contents).map(|(name, (blob, _))| (*name, file(*blob))));
        subdirectories.push((name, Node::Directory(below.blob())));
        made.push(below);
    }
    // One level more, of only a part: what is present is found at any height.
    let middle = directory(subdirectories[..2].to_vec());
    let root = directory([("middle", Node::Directory(middle.blob())), ("c", subdirectories[2].1.clone())]);
    made.extend([middle, root.clone()]);
    local.put_directories(&made).unwrap();
    root.blob()
}

/// Uploads, pins and unpins until the node is gone.
async fn write(world: Arc<World>, remote: RemoteStore, uri: String, writer: u64, mut random: Random) {
    let Ok(mut admin) = StoreAdminClient::connect(uri).await else { return };
    loop {
        let owner = format!("owner-{writer}-{}", random.below(3));
        let kind = ["SessionHead", "Checkpoint"][random.below(2) as usize].to_owned();
        let key = (owner.clone(), kind.clone());
        if random.below(4) == 0 {
            // Whether it comes to pass is not known if no answer comes: it is given up before.
            world.pinned.lock().unwrap().remove(&key);
            let request = UnpinRootsRequest { owner_uid: owner, kind, name: None };
            if admin.unpin_roots(request).await.is_err() {
                return;
            }
            continue;
        }
        // Sometimes a tree that is there already gets another owner: only the answer "present" keeps it meanwhile.
        let old = random.below(3) == 0;
        let old =
            old.then(|| world.pinned.lock().unwrap().iter().find(|(k, _)| k.0 == owner).map(|(k, t)| (k.clone(), *t)));
        let old = old.flatten();
        let tree = old.as_ref().map_or_else(|| make_tree(&world.local, &mut random), |(_, tree)| *tree);
        let begin = Instant::now();
        if upload_tree(tree, Arc::new(world.local.clone()), &remote, &|_| {}).await.is_err() {
            return;
        }
        if let Some(((owner_uid, kind), _)) = old {
            world.pinned.lock().unwrap().remove(&(owner_uid.clone(), kind.clone()));
            if admin.unpin_roots(UnpinRootsRequest { owner_uid, kind, name: None }).await.is_err() {
                return;
            }
        }
        if random.below(3) == 0 {
            // A client that thinks before it pins, as long as it may.
            tokio::time::sleep(Duration::from_millis(random.below(600))).await;
        }
        if begin.elapsed() > PROMISED {
            world.late.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let root = proto::Root { owner_uid: owner, kind, tree: tree.to_string(), ..Default::default() };
        world.pinned.lock().unwrap().remove(&key);
        match admin.pin_root(PinRootRequest { root: Some(root) }).await {
            Ok(_) => {
                world.pinned.lock().unwrap().insert(key, tree);
                world.uploads.fetch_add(1, Ordering::Relaxed);
            }
            Err(status) if status.code() == tonic::Code::NotFound && begin.elapsed() <= PROMISED => {
                panic!("{tree} was stored and is not there: {status}")
            }
            Err(status) if status.code() == tonic::Code::NotFound => {
                world.late.fetch_add(1, Ordering::Relaxed);
            }
            Err(_) => return,
        }
        tokio::time::sleep(Duration::from_millis(random.below(60))).await;
    }
}

async fn collect(admin: &mut StoreAdminClient<Channel>, rate: u64) -> Result<proto::CollectProgress, tonic::Status> {
    let mut answers = admin.collect(CollectRequest { rate, ..Default::default() }).await?.into_inner();
    let mut last = None;
    while let Some(answer) = answers.message().await? {
        last = answer.progress;
    }
    last.ok_or_else(|| tonic::Status::internal("no progress"))
}

/// Reads every pinned tree wholly; returns the blobs that are reachable.
async fn check(world: &World, process: &Process) -> BTreeSet<Blob> {
    let remote = process.remote();
    let mut admin = StoreAdminClient::connect(process.uri()).await.unwrap();
    let roots = admin.list_roots(ListRootsRequest::default()).await.unwrap().into_inner().roots;
    let found: BTreeMap<_, _> =
        roots.iter().map(|root| ((root.owner_uid.clone(), root.kind.clone()), root.tree.clone())).collect();
    for (key, tree) in world.pinned.lock().unwrap().iter() {
        assert_eq!(found.get(key), Some(&tree.to_string()), "an acknowledged pin");
    }
    let mut reachable = BTreeSet::new();
    let mut waiting: Vec<Blob> = roots.iter().map(|root| root.tree.parse().unwrap()).collect();
    while let Some(blob) = waiting.pop() {
        if !reachable.insert(blob) {
            continue;
        }
        // Reading verifies.
        let data = remote.read(blob).await.unwrap_or_else(|error| panic!("a pinned tree has lost {blob}: {error}"));
        let directory = Directory::decode(&data).unwrap();
        waiting.extend(directory.subdirectories().map(|(_, blob)| blob));
        for content in directory.contents() {
            if reachable.insert(content) {
                remote.read(content).await.unwrap_or_else(|error| panic!("a pinned tree has lost {content}: {error}"));
            }
        }
    }
    reachable
}

/// One life of the node. Says whether it ended at its crash point.
async fn round(world: &Arc<World>, seed: u64, round: u64, crash_at: Option<&str>) -> bool {
    let mut random = Random(seed * 1000 + round);
    let mut process = Process::start_with(world.folder.path(), OPTIONS, crash_at);
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let random = Random(random.below(u64::MAX));
            tokio::spawn(write(world.clone(), process.remote(), process.uri(), writer, random))
        })
        .collect();
    let begin = Instant::now();
    let life = Duration::from_millis(2500 + random.below(1500));
    let gone = Arc::new(AtomicBool::new(false));
    let collector = {
        let (uri, gone, rate) = (process.uri(), gone.clone(), [0, 50, 20][random.below(3) as usize]);
        tokio::spawn(async move {
            let Ok(mut admin) = StoreAdminClient::connect(uri).await else { return };
            while !gone.load(Ordering::Relaxed) {
                match collect(&mut admin, rate).await {
                    Ok(done) => assert!(done.incomplete_roots.is_empty(), "{:?}", done.incomplete_roots),
                    Err(status) if status.code() == tonic::Code::FailedPrecondition => panic!("{status}"),
                    Err(_) => return,
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
    };
    while begin.elapsed() < life && !process.has_ended() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let crashed = process.has_ended();
    process.end(Signal::KILL);
    gone.store(true, Ordering::Relaxed);
    collector.await.unwrap();
    for writer in writers {
        writer.await.unwrap();
    }
    assert!(crash_at.is_some() || !crashed, "it ended by itself");
    crashed
}

async fn play(seed: u64) {
    let (folder, local_folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let local = LocalStore::open(config(local_folder.path(), 0)).unwrap();
    let world = Arc::new(World {
        folder,
        local,
        _local_folder: local_folder,
        pinned: Mutex::default(),
        uploads: AtomicU64::new(0),
        late: AtomicU64::new(0),
    });
    let (mut armed, mut crashes) = (0, 0);
    for number in 0..ROUNDS {
        // Each point in turn, and in every fourth round a kill at no particular one.
        let turn = usize::try_from(seed * ROUNDS + number).unwrap();
        let point = (turn % 4 != 3).then(|| crash::POINTS[turn % crash::POINTS.len()]);
        let nth = point.map(|point| format!("{point}@{}", 1 + turn % 3));
        armed += u32::from(point.is_some());
        crashes += u32::from(round(&world, seed, number, nth.as_deref()).await);
        let process = Process::start_with(world.folder.path(), OPTIONS, None);
        check(&world, &process).await;
        process.end(Signal::KILL);
    }

    let process = Process::start_with(world.folder.path(), OPTIONS, None);
    let reachable = check(&world, &process).await;
    tokio::time::sleep(LEASE + Duration::from_millis(100)).await;
    let mut admin = StoreAdminClient::connect(process.uri()).await.unwrap();
    let mut deleted = 0;
    for _ in 0..2 {
        deleted += collect(&mut admin, 0).await.unwrap().deleted_blobs;
    }
    assert_eq!(check(&world, &process).await, reachable);
    drop(admin);
    assert!(process.end(Signal::TERM).success());

    let store = LocalStore::open(config(world.folder.path(), 200)).unwrap();
    let mut held = BTreeSet::new();
    store
        .for_each(|blob, _| {
            held.insert(blob);
            Ok::<_, StoreError>(())
        })
        .unwrap();
    assert_eq!(held, reachable, "seed {seed}: what is held is what is reachable");
    let roots: Vec<Root> = store.roots(None, None).unwrap();
    let (uploads, late) = (world.uploads.load(Ordering::Relaxed), world.late.load(Ordering::Relaxed));
    println!(
        "seed {seed}: {uploads} trees pinned, {late} came late, {} roots and {} blobs left, {deleted} deleted in the end, \
         {crashes} of {armed} crash points reached",
        roots.len(),
        held.len()
    );
    assert!(uploads > 20, "{uploads} trees");
    assert!(crashes * 2 > armed, "only {crashes} of {armed} crash points were reached");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_reachable_is_lost_and_nothing_else_is_left() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let seeds = match number("AETHER_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("AETHER_SEEDS").unwrap_or(2),
    };
    for seed in seeds {
        play(seed).await;
    }
}
