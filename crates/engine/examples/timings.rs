//! Prints what the engine's operations take on this machine, on a tree of 22,700 files (`--files N` for another).
//!
//!     cargo run -p aether-engine --example timings
//!
//! Everything happens in a mount namespace and a temporary directory of its own. Needs root.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use aether_cas::tree::{Attributes, Directory, Mtime, Name, Node, Owner};
use aether_cas::{Blob, Digest, MemoryStore, Store};
use aether_engine::pool::PoolConfig;
use aether_engine::{Config, Engine, testing};

const OWNER: Owner = Owner { uid: 1000, gid: 1000 };
const FILES_PER_DIRECTORY: usize = 10;

fn main() {
    let files = std::env::args().skip_while(|argument| argument != "--files").nth(1);
    let files: usize = files.map_or(22_700, |files| files.parse().expect("--files takes a number"));
    testing::isolated_main(|root| {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            for (name, pool) in [("btrfs", PoolConfig::Image { bytes: 2 << 30 }), ("directory", PoolConfig::Directory)]
            {
                measure(&root.join(name), name, pool, files).await;
            }
        });
    });
}

async fn measure(root: &Path, name: &str, pool: PoolConfig, files: usize) {
    let (store, tree) = source(files).await;
    let engine = Engine::open(Config { pool, ..Config::new(root) }).await.expect("the engine opens");
    println!("\n{name} pool, tree of {files} files");
    let started = Instant::now();
    let image = engine.ensure_image(tree, OWNER, &store, &|_| {}).await.expect("the image is made");
    show("fetch, build and mount the image", started.elapsed());
    let started = Instant::now();
    let (bytes, _) = aether_engine::image::encode(tree, OWNER, engine.objects()).expect("the image is encoded");
    show(&format!("  of which building {} kB of image", bytes.len() / 1024), started.elapsed());

    let mut mounts = Vec::new();
    for n in 0..50 {
        let started = Instant::now();
        let id = format!("s{n}");
        engine.create_session(&id, &image).await.expect("a session");
        engine.mount_session(&id).await.expect("mounted");
        mounts.push(started.elapsed());
    }
    show("make and mount a session (median of 50)", median(mounts));

    let view = engine.mount_session("s0").await.expect("mounted");
    edit(&view, 20);
    snapshots(&engine, &view, "20 changed files", "a", 50).await;
    edit(&view, files);
    // A directory pool copies every changed file for every fork: seconds each.
    let forks = if name == "btrfs" { 50 } else { 2 };
    snapshots(&engine, &view, &format!("{files} changed files"), "b", forks).await;
}

async fn snapshots(engine: &Engine, view: &Path, what: &str, prefix: &str, forks: usize) {
    println!("  with {what}:");
    let mut taken = Vec::new();
    for n in 0..10 {
        let started = Instant::now();
        engine.snapshot("s0", &format!("{prefix}{n}"), &[], None).await.expect("a snapshot");
        taken.push(started.elapsed());
    }
    show("snapshot, first", taken[0]);
    show("snapshot, median of 10", median(taken));
    let started = Instant::now();
    let digested = engine.digest(&format!("{prefix}0")).await.expect("a digest");
    show(&format!("digest ({} read)", digested.read_files), started.elapsed());
    let started = Instant::now();
    let digested = engine.digest(&format!("{prefix}1")).await.expect("a digest");
    show(&format!("digest again ({} read)", digested.read_files), started.elapsed());
    fs::write(view.join(path(0)), format!("changed once more, {prefix}")).expect("written");
    engine.snapshot("s0", &format!("{prefix}-edited"), &[], None).await.expect("a snapshot");
    let started = Instant::now();
    let digested = engine.digest(&format!("{prefix}-edited")).await.expect("a digest");
    show(&format!("digest after one more edit ({} read)", digested.read_files), started.elapsed());
    let started = Instant::now();
    let at_once = (0..forks).map(|n| {
        let (engine, id, snapshot) = (engine.clone(), format!("at-once-{prefix}-{n}"), format!("{prefix}0"));
        tokio::spawn(async move {
            engine.fork_session(&id, &snapshot).await.expect("a fork");
            engine.mount_session(&id).await.expect("mounted");
        })
    });
    for fork in at_once.collect::<Vec<_>>() {
        fork.await.expect("forked");
    }
    show(&format!("{forks} forks at once, mounted"), started.elapsed());
    let started = Instant::now();
    for n in 0..forks {
        let id = format!("fork-{prefix}-{n}");
        engine.fork_session(&id, &format!("{prefix}0")).await.expect("a fork");
        engine.mount_session(&id).await.expect("mounted");
        if n == 0 {
            show("fork and mount, first", started.elapsed());
        }
    }
    show(&format!("{forks} forks, mounted"), started.elapsed());
}

fn edit(view: &Path, files: usize) {
    for n in 0..files {
        fs::write(view.join(path(n)), format!("changed {n}")).expect("written");
    }
}

fn path(n: usize) -> String {
    format!("part-{:03}/dir-{:04}/file-{n:05}", n / FILES_PER_DIRECTORY / 50, n / FILES_PER_DIRECTORY)
}

async fn source(files: usize) -> (MemoryStore, Blob) {
    let store = MemoryStore::new();
    let attributes = |mode| Attributes { mode, mtime: Mtime { seconds: 7, nanos: 0 }, ..Attributes::default() };
    let directory = || Directory { attributes: attributes(0o755), entries: BTreeMap::new() };
    let name = |text: &str| Name::new(text.as_bytes().to_vec()).expect("a plain name");
    let mut parts: BTreeMap<String, BTreeMap<String, Directory>> = BTreeMap::new();
    for n in 0..files {
        let contents = format!("contents of {n}\n").repeat(n % 50 + 1).into_bytes();
        let content = Blob { digest: Digest::of(&contents), size: contents.len() as u64 };
        store.write(content, contents.into()).await.expect("written");
        let whole = path(n);
        let mut components = whole.split('/');
        let mut next = || components.next().expect("three components").to_owned();
        let (part, folder, file) = (next(), next(), next());
        let node = Node::File { content, attributes: attributes(0o644), link_group: None };
        parts.entry(part).or_default().entry(folder).or_insert_with(directory).entries.insert(name(&file), node);
    }
    let mut top = directory();
    for (part, folders) in parts {
        let mut middle = directory();
        for (folder, directory) in folders {
            store.write(directory.blob(), directory.encode()).await.expect("written");
            middle.entries.insert(name(&folder), Node::Directory(directory.blob()));
        }
        store.write(middle.blob(), middle.encode()).await.expect("written");
        top.entries.insert(name(&part), Node::Directory(middle.blob()));
    }
    store.write(top.blob(), top.encode()).await.expect("written");
    (store, top.blob())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn show(what: &str, time: Duration) {
    println!("  {what:<44} {:>9.2} ms", time.as_secs_f64() * 1000.0);
}
