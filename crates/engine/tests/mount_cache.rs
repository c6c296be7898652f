//! The object cache and its limit.

#[allow(dead_code, reason = "the tree of the other tests is not that of these")]
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use aether_cas::transfer::OnProgress;
use aether_cas::{Blob, MemoryStore};
use aether_engine::pool::PoolConfig;
use aether_engine::state::Image;
use aether_engine::testing::isolated_async;
use aether_engine::{Config, Engine, Error, mount};
use support::{OWNER, Source, read_tree};

const QUIET: OnProgress<'static> = &|_| {};
/// Of every tree's own contents.
const OWN: u64 = 100_000;
/// Of what all trees share.
const SHARED: u64 = 10_000;

/// `src/own` is of this tree alone, `src/shared` of every tree.
async fn source(store: &MemoryStore, name: &str) -> Source {
    let own = name.bytes().cycle().take(OWN as usize).collect();
    Source::of(store.clone(), &[("src/own".into(), own), ("src/shared".into(), vec![0; SHARED as usize])]).await
}

async fn open(root: &Path, limit: u64) -> Engine {
    let pool = PoolConfig::Image { bytes: 256 << 20 };
    Engine::open(Config { pool, object_limit: Some(limit), ..Config::new(root) }).await.unwrap()
}

async fn image(engine: &Engine, source: &Source) -> Image {
    engine.ensure_image(source.root, OWNER, &source.store, QUIET).await.unwrap()
}

async fn object_bytes(engine: &Engine) -> u64 {
    engine.statistics().await.unwrap().object_bytes
}

fn shows(view: &Path, name: &str) {
    let own: Vec<u8> = name.bytes().cycle().take(OWN as usize).collect();
    assert!(fs::read(view.join("src/own")).unwrap() == own, "{name}");
    assert_eq!(fs::read(view.join("src/shared")).unwrap().len(), SHARED as usize);
}

#[test]
fn what_was_used_longest_ago_goes_first() {
    isolated_async("what_was_used_longest_ago_goes_first", async |root| {
        let limit = 3 * OWN + SHARED;
        let engine = open(root, limit).await;
        let (store, mut sources) = (MemoryStore::new(), BTreeMap::new());
        for name in ["a", "b", "c"] {
            sources.insert(name, source(&store, name).await);
            image(&engine, &sources[name]).await;
        }
        assert_eq!(object_bytes(&engine).await, limit, "three trees fit");
        // `a` is the oldest, but a session is on it.
        engine.create_session("s", &image(&engine, &sources["a"]).await).await.unwrap();
        let view = engine.mount_session("s").await.unwrap();
        sources.insert("d", source(&store, "d").await);
        image(&engine, &sources["d"]).await;
        let statistics = engine.statistics().await.unwrap();
        assert_eq!((statistics.object_bytes, statistics.images), (limit, 3), "b made room for d");
        shows(&view, "a");
        assert_eq!(engine.fsck().await.unwrap(), Vec::<String>::new());

        // The order is that of the last use, not that of the first, and survives the process.
        image(&engine, &sources["c"]).await;
        let target = root.join("view");
        engine.publish_image(&image(&engine, &sources["c"]).await, &target).await.unwrap();
        engine.unpublish(&target).await.unwrap();
        drop(engine);
        let engine = open(root, limit).await;
        image(&engine, &sources["b"]).await;
        assert_eq!(object_bytes(&engine).await, limit);
        for (name, here) in [("a", true), ("b", true), ("c", true), ("d", false)] {
            let content = Blob::of(&name.bytes().cycle().take(OWN as usize).collect::<Vec<_>>());
            assert_eq!(engine.objects().contains(&content).unwrap(), here, "{name}");
        }
        assert_eq!(engine.fsck().await.unwrap(), Vec::<String>::new());
    });
}

#[test]
fn what_is_shown_or_only_here_stays() {
    isolated_async("what_is_shown_or_only_here_stays", async |root| {
        let store = MemoryStore::new();
        let [shown, edited, later] = ["shown", "edited", "later"].map(|name| source(&store, name));
        let (shown, edited, later) = (shown.await, edited.await, later.await);
        let limit = 2 * OWN + SHARED + 1000;
        let engine = open(root, limit).await;
        // A view without a session, taken away lazily while a process still reads in it.
        let target = root.join("view");
        engine.publish_image(&image(&engine, &shown).await, &target).await.unwrap();
        let directory = fs::File::open(target.join("src")).unwrap();
        mount::unmount_lazy(&target).unwrap();

        engine.create_session("s", &image(&engine, &edited).await).await.unwrap();
        let view = engine.mount_session("s").await.unwrap();
        fs::write(view.join("src/new"), [7; 1000]).unwrap();
        engine.snapshot("s", "cp", &[], None).await.unwrap();
        let root_of_cp = engine.digest("cp").await.unwrap().root;

        let full = engine.ensure_image(later.root, OWNER, &later.store, QUIET).await;
        let Err(error @ Error::Full { .. }) = full else { panic!("{full:?}") };
        assert!(error.to_string().contains("raise the limit"), "{error}");
        let held = std::os::fd::AsFd::as_fd(&directory);
        let own = rustix::fs::openat(held, "own", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
        assert_eq!(fs::File::from(own).metadata().unwrap().len(), OWN);

        // Nobody reads in it any more: there is room.
        drop(directory);
        image(&engine, &later).await;
        shows(&view, "edited");
        assert_eq!(fs::read(view.join("src/new")).unwrap(), [7; 1000]);

        // Of no use here any more, but the store that is asked does not have the new content: it stays.
        let before = read_tree(&view);
        engine.delete_session("s").await.unwrap();
        engine.delete_snapshot("cp").await.unwrap();
        let new = Blob::of(&[7; 1000]);
        engine.make_room(limit, &store).await.unwrap_err();
        assert!(engine.objects().contains(&new).unwrap(), "only here");

        engine.upload(root_of_cp, &store, QUIET).await.unwrap();
        engine.make_room(limit, &store).await.unwrap();
        assert!(!engine.objects().contains(&new).unwrap(), "durable");
        assert_eq!(engine.fsck().await.unwrap(), Vec::<String>::new());

        // And it comes back.
        let checkpoint = engine.ensure_image(root_of_cp, OWNER, &store, QUIET).await.unwrap();
        engine.create_session("s", &checkpoint).await.unwrap();
        assert_eq!(read_tree(&engine.mount_session("s").await.unwrap()), before);
    });
}
