//! An engine whose sessions are mounted before their contents are there.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use aether_cas::lazy::{Catalog, Places};
use aether_cas::tree::{Attributes, Directory, Name, Node, Owner};
use aether_cas::{Blob, LocalStore, MemoryStore, Store};
use aether_engine::pool::PoolConfig;
use aether_engine::testing::isolated;
use aether_engine::{Config, Engine, mount};
use aether_lazy::{Exchange, Limits, Metrics};
use support::{Server, control, start};
use tokio::runtime::Runtime;

const OWNER: Owner = Owner { uid: 1000, gid: 1000 };
const FILES: usize = 60;

fn name(n: usize) -> String {
    format!("file-{n:02}")
}

fn content(n: usize, revision: u8) -> Vec<u8> {
    vec![n as u8 ^ revision; 1500 + n]
}

/// A tree of [`FILES`] files, in the store of the engine and in the server of the lazy layer.
async fn tree(store: &MemoryStore, server: &Server, revision: u8) -> Blob {
    let attributes = |mode| Attributes { mode, ..Attributes::default() };
    let mut top = Directory { attributes: attributes(0o755), entries: BTreeMap::new() };
    for n in 0..FILES {
        let bytes = content(n, revision);
        let blob = server.put(&bytes);
        store.write(blob, bytes.into()).await.unwrap();
        let node = Node::File { content: blob, attributes: attributes(0o644), link_group: None };
        top.entries.insert(Name::new(name(n).into_bytes()).unwrap(), node);
    }
    store.write(top.blob(), top.encode()).await.unwrap();
    top.blob()
}

struct TestNode {
    runtime: Runtime,
    store: MemoryStore,
    server: Server,
    engine: Engine,
    lazy: Option<(Exchange, Metrics)>,
}

fn config(root: &Path) -> Config {
    Config { pool: PoolConfig::Image { bytes: 300 << 20 }, lazy: true, ..Config::new(root.join("engine")) }
}

impl TestNode {
    fn new(root: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let engine = runtime.block_on(Engine::open(config(root))).unwrap();
        let server = Server::default();
        let mut node = Self { runtime, store: MemoryStore::new(), server, engine, lazy: None };
        node.serve();
        node
    }

    fn serve(&mut self) {
        let uri = self.server.start(&self.runtime);
        let places = Places::new(&self.engine.config().root);
        let limits = Limits { deadline: Duration::from_millis(500), ..Limits::default() };
        self.lazy = Some(start(&places, &uri, &self.runtime, limits));
    }

    fn metrics(&self) -> &Metrics {
        &self.lazy.as_ref().unwrap().1
    }

    /// Mounts a session on a tree whose contents are not fetched by the engine.
    async fn session(&self, id: &str, root: Blob) -> std::path::PathBuf {
        let image =
            self.engine.ensure_image_lazily(root, OWNER, Some("team/repo"), &self.store, &|_| {}).await.unwrap();
        self.engine.create_session(id, &image).await.unwrap();
        self.engine.mount_session(id).await.unwrap()
    }

    /// Takes everything away; the lazy layer ends when nothing uses it any more.
    fn finish(mut self, root: &Path) {
        mount::unmount_below(root).unwrap();
        if let Some((exchange, _)) = self.lazy.take() {
            drop(self.engine);
            exchange.join();
        }
    }
}

fn objects(engine: &Engine) -> &LocalStore {
    engine.objects()
}

#[test]
fn a_session_is_usable_at_once_and_whole_later() {
    isolated("a_session_is_usable_at_once_and_whole_later", |root| {
        let node = TestNode::new(root);
        node.runtime.block_on(async {
            let tree = tree(&node.store, &node.server, 0).await;
            let view = node.session("a", tree).await;
            assert_eq!(objects(&node.engine).statistics().file_blobs, 0, "no content is here");
            assert_eq!(fs::read_dir(&view).unwrap().count(), FILES);
            assert_eq!(fs::read(view.join(name(7))).unwrap(), content(7, 0));
            assert_eq!(node.server.behaviour.whole.load(Ordering::SeqCst), 1, "only what was read is fetched");
            // Changes, a checkpoint and a fork need nothing of the base.
            fs::write(view.join("new"), "mine").unwrap();
            fs::remove_file(view.join(name(3))).unwrap();
            fs::rename(view.join(name(4)), view.join("moved")).unwrap();
            node.engine.snapshot("a", "s1", &[], None).await.unwrap();
            let digested = node.engine.digest("s1").await.unwrap();
            assert_eq!((digested.deleted_files, objects(&node.engine).statistics().file_blobs), (2, 1));
            node.engine.fork_session("b", "s1").await.unwrap();
            let fork = node.engine.mount_session("b").await.unwrap();
            assert_eq!(fs::read(fork.join("moved")).unwrap(), content(4, 0));
            assert_eq!(fs::read(fork.join("new")).unwrap(), b"mine");
            assert!(node.engine.fsck().await.unwrap().is_empty(), "{:?}", node.engine.fsck().await.unwrap());
            let incomplete = node.engine.incomplete().await.unwrap();
            assert_eq!(incomplete.iter().map(|tree| tree.root).collect::<Vec<_>>(), [tree]);

            // The background's work: it takes over what readers brought, and fetches the rest.
            let moved = node.engine.hydrate(tree, &node.store, &|_| {}).await.unwrap();
            assert_eq!(moved.files, FILES as u64 - 2);
            assert!(node.engine.incomplete().await.unwrap().is_empty());
            assert!(node.engine.fsck().await.unwrap().is_empty(), "{:?}", node.engine.fsck().await.unwrap());
            let before = node.metrics().opens();
            for n in (0..FILES).filter(|n| ![3, 4].contains(n)) {
                assert_eq!(fs::read(view.join(name(n))).unwrap(), content(n, 0), "{n}");
                assert_eq!(fs::read(fork.join(name(n))).unwrap(), content(n, 0), "{n}");
            }
            assert_eq!(node.metrics().opens(), before, "nobody needs the lazy layer any more");
            node.engine.upload(digested.root, &node.store, &|_| {}).await.unwrap();
        });
        node.finish(root);
    });
}

#[test]
fn sessions_outlive_a_lazy_layer_that_fails_and_new_ones_do_without() {
    isolated("sessions_outlive_a_lazy_layer_that_fails_and_new_ones_do_without", |root| {
        let mut node = TestNode::new(root);
        let (first, second) = node
            .runtime
            .block_on(async { (tree(&node.store, &node.server, 0).await, tree(&node.store, &node.server, 64).await) });
        let view = node.runtime.block_on(node.session("a", first));
        assert_eq!(fs::read(view.join(name(1))).unwrap(), content(1, 0));
        node.server.behaviour.hang(true);
        assert_eq!(fs::read(view.join(name(2))).unwrap_err().raw_os_error(), Some(libc::EIO));
        // It is gone, and its connection too.
        let layer = Places::new(&node.engine.config().root).mountpoint();
        fs::write(control(&layer).join("abort"), "1").unwrap();
        node.lazy.take().unwrap().0.join();
        let error = fs::read(view.join(name(5))).unwrap_err();
        assert_ne!(error.kind(), std::io::ErrorKind::NotFound, "a dead layer is no deleted file");
        node.runtime.block_on(async {
            node.engine.unmount_session("a").await.unwrap();
            let refused = node.engine.mount_session("a").await.unwrap_err();
            assert!(refused.to_string().contains("lazy layer"), "{refused}");
            // Another session waits for its contents instead.
            node.session("b", second).await;
            assert_eq!(node.engine.incomplete().await.unwrap().len(), 1, "only the first tree");
            node.engine.hydrate(first, &node.store, &|_| {}).await.unwrap();
            let view = node.engine.mount_session("a").await.unwrap();
            for n in 0..FILES {
                assert_eq!(fs::read(view.join(name(n))).unwrap(), content(n, 0), "{n}");
            }
        });
        // Served again, sessions begin at once again.
        node.server.behaviour.hang(false);
        node.serve();
        let third = node.runtime.block_on(tree(&node.store, &node.server, 128));
        let view = node.runtime.block_on(node.session("c", third));
        assert_eq!(fs::read(view.join(name(9))).unwrap(), content(9, 128));
        assert_eq!(node.runtime.block_on(node.engine.incomplete()).unwrap().len(), 1);
        node.finish(root);
    });
}

#[test]
fn what_sessions_opened_first_is_fetched_first_for_the_next_revision() {
    isolated("what_sessions_opened_first_is_fetched_first_for_the_next_revision", |root| {
        let node = TestNode::new(root);
        node.runtime.block_on(async {
            let first = tree(&node.store, &node.server, 0).await;
            let view = node.session("a", first).await;
            for n in [50, 20, 40] {
                fs::read(view.join(name(n))).unwrap();
            }
            node.engine.hydrate(first, &node.store, &|_| {}).await.unwrap();
            let second = tree(&node.store, &node.server, 64).await;
            node.session("b", second).await;
            // The catalog is written in the order in which contents are wanted.
            let places = Places::new(&node.engine.config().root);
            let catalog = Catalog::open(&places.catalog()).unwrap();
            let wanted: Vec<Blob> = [50, 20, 40, 0, 1].map(|n| Blob::of(&content(n, 64))).to_vec();
            assert_eq!(catalog.blobs()[FILES..FILES + 5], wanted);
        });
        node.finish(root);
    });
}

#[test]
fn after_a_boot_the_catalog_has_what_is_missing_then() {
    isolated("after_a_boot_the_catalog_has_what_is_missing_then", |root| {
        let mut node = TestNode::new(root);
        let second = node.runtime.block_on(async {
            let first = tree(&node.store, &node.server, 0).await;
            node.session("a", first).await;
            node.engine.hydrate(first, &node.store, &|_| {}).await.unwrap();
            let second = tree(&node.store, &node.server, 64).await;
            node.session("b", second).await;
            second
        });
        // Nothing is mounted any more, and the catalog is an earlier boot's.
        mount::unmount_below(root).unwrap();
        let catalog = Places::new(&node.engine.config().root).catalog();
        node.lazy.take().unwrap().0.join();
        drop(node.engine);
        fs::File::options().write(true).open(&catalog).unwrap().write_all(&[0; 32]).unwrap();

        node.engine = node.runtime.block_on(Engine::open(config(root))).unwrap();
        let now = Catalog::open(&catalog).unwrap();
        assert_eq!(now.blobs(), (0..FILES).map(|n| Blob::of(&content(n, 64))).collect::<Vec<_>>());
        assert!(now.number(&now.blobs()[0].digest).unwrap() >= 2 * FILES as u64, "no number is given out twice");
        node.serve();
        node.runtime.block_on(async {
            assert_eq!(
                node.engine.incomplete().await.unwrap().iter().map(|tree| tree.root).collect::<Vec<_>>(),
                [second]
            );
            let view = node.engine.mount_session("b").await.unwrap();
            assert_eq!(fs::read(view.join(name(7))).unwrap(), content(7, 64));
        });
        node.finish(root);
    });
}
