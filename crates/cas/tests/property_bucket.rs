//! Collections of a bucket by several nodes at one time, beside uploads, pins and unpins by way of others, never lose what is
//! reachable, and leave nothing else in the end. Collectors die at any request that they make to the bucket.
//!
//! `AETHER_SEEDS=100` plays more seeds, `AETHER_SEED=7` one.

#[path = "common/bucket.rs"]
mod client;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::ControlFlow,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use aether_cas::{
    Blob, MemoryStore, Store, StoreError,
    collect::Progress,
    durable::{Terms, format::MAX_SHARED_BLOB},
    store::Result,
    testing::{Random, blob, bucket::TestBucket, directory, file},
    transfer::upload_tree,
    tree::{Directory, Node},
};
use client::Client;

const TERMS: Terms =
    Terms { lease: Duration::from_millis(1500), view: Duration::from_millis(150), skew: Duration::ZERO };
/// A client that takes longer was promised nothing, and does not pin.
const PROMISED: Duration = Duration::from_millis(700);
const WRITERS: u64 = 3;
const LIFE: Duration = Duration::from_secs(6);
/// How much of a pack may be waste while there is much to do.
const WASTE: [u64; 2] = [0, 60];

/// What all writers together know.
struct World {
    bucket: TestBucket,
    clients: Vec<Arc<Client>>,
    /// Where the trees are made.
    local: Arc<MemoryStore>,
    /// Pins that were acknowledged, and not given up since.
    pinned: Mutex<BTreeMap<(String, String), Blob>>,
    stop: AtomicBool,
    uploads: AtomicU64,
    late: AtomicU64,
    collections: AtomicU64,
    deaths: AtomicU64,
    rescued: AtomicU64,
}

/// A tree of two levels made of a few contents, so that trees share much and come back.
fn make_tree(local: &MemoryStore, random: &mut Random) -> Blob {
    let mut subdirectories = Vec::new();
    for name in ["a", "b", "c"] {
        let names = ["x", "y"].map(|name| {
            let number = random.below(12);
            // One of them has a pack of its own.
            let (blob, data) = blob(number, if number == 0 { (4 << 20) + 9 } else { 90 + 100 * number as usize });
            local.put(data);
            (name, file(blob))
        });
        subdirectories.push((name, Node::Directory(local.put_directory(&directory(names)))));
    }
    let middle = Node::Directory(local.put_directory(&directory(subdirectories[..2].to_vec())));
    local.put_directory(&directory([("middle", middle), ("c", subdirectories[2].1.clone())]))
}

async fn write(world: Arc<World>, writer: u64, mut random: Random) {
    while !world.stop.load(Ordering::Relaxed) {
        let client = world.clients[random.below(world.clients.len() as u64) as usize].clone();
        let owner = format!("owner-{writer}-{}", random.below(3));
        let kind = ["SessionHead", "Checkpoint"][random.below(2) as usize].to_owned();
        let key = (owner.clone(), kind.clone());
        if random.below(4) == 0 {
            world.pinned.lock().unwrap().remove(&key);
            client.durable.unpin(&owner, Some(&kind), None).await.unwrap();
            continue;
        }
        // Sometimes a tree that is there already gets another owner: only the answer "present" keeps it meanwhile.
        let old = (random.below(3) == 0)
            .then(|| world.pinned.lock().unwrap().iter().find(|(k, _)| k.0 == owner).map(|(k, t)| (k.clone(), *t)))
            .flatten();
        let tree = old.as_ref().map_or_else(|| make_tree(&world.local, &mut random), |(_, tree)| *tree);
        let begin = Instant::now();
        upload_tree(tree, world.local.clone(), &*client, &|_| {}).await.unwrap();
        if let Some(((owner, kind), _)) = old {
            world.pinned.lock().unwrap().remove(&(owner.clone(), kind.clone()));
            client.durable.unpin(&owner, Some(&kind), None).await.unwrap();
        }
        if random.below(3) == 0 {
            // A client that thinks before it pins, as long as it may.
            tokio::time::sleep(Duration::from_millis(random.below(400))).await;
        }
        if begin.elapsed() > PROMISED {
            world.late.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        world.pinned.lock().unwrap().remove(&key);
        // By another node than the one that has it.
        let other = &world.clients[random.below(world.clients.len() as u64) as usize];
        other.durable.refresh(Instant::now()).await.unwrap();
        let missing = other.find_missing(&[tree]).await.unwrap();
        if begin.elapsed() > PROMISED {
            world.late.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        assert!(missing.is_empty(), "{tree} was stored and is not there");
        other.durable.pin(&owner, &kind, "", tree).await.unwrap();
        world.pinned.lock().unwrap().insert(key, tree);
        world.uploads.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(random.below(60))).await;
    }
}

/// Collects until it dies, or with a node that lives.
async fn collect(client: &Arc<Client>, waste: u64, breaks_off: Option<u64>) -> Result<Progress> {
    let mut told = 0;
    let watch = move |_: &Progress| {
        told += 1;
        if breaks_off == Some(told) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    client.collect(waste, watch).await
}

async fn collector(world: Arc<World>, mut random: Random) {
    let mut kept: Option<Arc<Client>> = None;
    while !world.stop.load(Ordering::Relaxed) {
        let bucket = world.bucket.beside();
        let mortal = random.below(3) > 0;
        let client = match kept.take().filter(|_| !mortal) {
            Some(client) => client,
            None => {
                if mortal {
                    bucket.end_after(random.below(90));
                }
                match Client::open(TERMS, bucket).await {
                    Ok(client) => Arc::new(client),
                    Err(_) => continue,
                }
            }
        };
        let breaks_off = (random.below(4) == 0).then(|| 1 + random.below(30));
        match collect(&client, WASTE[random.below(2) as usize], breaks_off).await {
            Ok(done) => {
                assert!(done.incomplete.is_empty(), "{:?}", done.incomplete);
                world.collections.fetch_add(1, Ordering::Relaxed);
                world.rescued.fetch_add(done.rescued, Ordering::Relaxed);
            }
            Err(StoreError::Closed(_)) => {}
            Err(error) if mortal => {
                assert!(error.is_transient(), "{error}");
                world.deaths.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => panic!("{error}"),
        }
        if !mortal {
            kept = Some(client);
        }
    }
}

/// Reads every pinned tree wholly; returns the blobs that are reachable.
async fn check(world: &World, client: &Client) -> BTreeSet<Blob> {
    let roots = client.durable.roots(None, None).await.unwrap();
    let found: BTreeMap<_, _> =
        roots.iter().map(|root| ((root.owner_uid.clone(), root.kind.clone()), root.tree)).collect();
    for (key, tree) in world.pinned.lock().unwrap().iter() {
        assert_eq!(found.get(key), Some(tree), "an acknowledged pin");
    }
    let mut reachable = BTreeSet::new();
    let mut waiting: Vec<Blob> = roots.iter().map(|root| root.tree).collect();
    while let Some(blob) = waiting.pop() {
        if reachable.insert(blob) {
            let data = client.get(blob).await.unwrap_or_else(|e| panic!("a pinned tree has lost {blob}: {e}"));
            let directory = Directory::decode(&data).unwrap();
            waiting.extend(directory.subdirectories().map(|(_, blob)| blob));
            for content in directory.contents() {
                if reachable.insert(content) {
                    client.get(content).await.unwrap_or_else(|e| panic!("a pinned tree has lost {content}: {e}"));
                }
            }
        }
    }
    reachable
}

async fn play(seed: u64) {
    let bucket = TestBucket::default();
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(Arc::new(Client::open(TERMS, bucket.beside()).await.unwrap()));
    }
    let world = Arc::new(World {
        bucket,
        clients,
        local: Arc::new(MemoryStore::new()),
        pinned: Mutex::default(),
        stop: AtomicBool::new(false),
        uploads: AtomicU64::new(0),
        late: AtomicU64::new(0),
        collections: AtomicU64::new(0),
        deaths: AtomicU64::new(0),
        rescued: AtomicU64::new(0),
    });
    let mut tasks: Vec<_> =
        (0..WRITERS).map(|n| tokio::spawn(write(world.clone(), n, Random(seed * 100 + n)))).collect();
    tasks.extend((0..2).map(|n| tokio::spawn(collector(world.clone(), Random(seed * 100 + 50 + n)))));
    let begin = Instant::now();
    while begin.elapsed() < LIFE && !tasks.iter().any(tokio::task::JoinHandle::is_finished) {
        tokio::time::sleep(Duration::from_millis(200)).await;
        // Somebody who has nothing but the bucket.
        check_now(&world).await;
    }
    world.stop.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }

    let client = Arc::new(Client::open(TERMS, world.bucket.beside()).await.unwrap());
    let reachable = check(&world, &client).await;
    tokio::time::sleep(TERMS.lease + Duration::from_millis(50)).await;
    for _ in 0..2 {
        collect(&client, 0, None).await.unwrap();
        // What was stored anew is young.
        tokio::time::sleep(TERMS.lease + Duration::from_millis(50)).await;
    }
    let client = Client::open(TERMS, world.bucket.beside()).await.unwrap();
    assert_eq!(check(&world, &client).await, reachable);
    let mut held = BTreeSet::new();
    for pack in client.durable.packs().unwrap() {
        held.extend(client.durable.pack_entries(pack).unwrap().into_iter().map(|entry| entry.blob));
    }
    assert_eq!(held, reachable, "seed {seed}: what is held is what is reachable");
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!(
        "seed {seed}: {} trees pinned, {} came late, {} blobs left; {} collections ended, {} died, {} blobs rescued",
        count(&world.uploads),
        count(&world.late),
        held.len(),
        count(&world.collections),
        count(&world.deaths),
        count(&world.rescued),
    );
    assert!(count(&world.uploads) > 20 && count(&world.collections) > 3 && count(&world.deaths) > 3);
}

/// Every pin that stays pinned meanwhile is whole.
async fn check_now(world: &World) {
    let before = world.pinned.lock().unwrap().clone();
    let client = Client::open(TERMS, world.bucket.beside()).await.unwrap();
    for (key, tree) in before {
        let mut waiting = vec![tree];
        let mut lost = None;
        while let Some(blob) = waiting.pop() {
            match client.get(blob).await {
                Ok(data) => {
                    let directory = Directory::decode(&data).unwrap();
                    waiting.extend(directory.subdirectories().map(|(_, blob)| blob));
                    for content in directory.contents().filter(|content| content.size < MAX_SHARED_BLOB) {
                        if let Err(error) = client.get(content).await {
                            lost = Some(error);
                        }
                    }
                }
                Err(error) => lost = Some(error),
            }
        }
        if let Some(error) = lost {
            assert_ne!(world.pinned.lock().unwrap().get(&key), Some(&tree), "a pinned tree is not whole: {error}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
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
