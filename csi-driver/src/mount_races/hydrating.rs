//! When contents come: in the background where the lazy layer answers, before the mount where it does not.
//!
//! In the place of the layer stands an empty file system: it answers, and has no content.

use std::fs;

use aether_cas::lazy::Places;
use aether_cas::tree::{Attributes, Name, Node as Entry};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::*;
use crate::hydration;

const CONTENT: &[u8] = b"of the base";

/// A node whose session has one file, and the driver expects the lazy layer.
async fn lazy_node(root: &Path) -> Node {
    lazy_node_with(root, &[("file", CONTENT.to_vec())], &["--lazy"]).await
}

async fn lazy_node_with(root: &Path, files: &[(&str, Vec<u8>)], arguments: &[&str]) -> Node {
    let store = MemoryStore::new();
    let mut tree = Directory::default();
    for (name, data) in files {
        let content = Blob::of(data);
        store.write(content, data.clone().into()).await.unwrap();
        let attributes = Attributes { mode: 0o644, ..Attributes::default() };
        let file = Entry::File { content, attributes, link_group: None };
        tree.entries.insert(Name::new(name.as_bytes()).unwrap(), file);
    }
    store.write(tree.blob(), tree.encode()).await.unwrap();
    Node::with_base(root, store, tree.blob(), arguments).await
}

impl Node {
    fn places(&self) -> Places {
        Places::new(&self.driver.config.state_dir)
    }

    fn layer(&self) -> PathBuf {
        self.places().mountpoint()
    }

    fn serve_layer(&self) {
        fs::create_dir_all(self.layer()).unwrap();
        mount("none", self.layer(), "tmpfs", MountFlags::empty(), None).unwrap();
    }

    async fn incomplete(&self) -> usize {
        self.driver.engine.incomplete().await.unwrap().len()
    }

    fn told_of_absence(&self) -> bool {
        self.server.take_writes().iter().any(|write| write.plural == "events")
    }
}

#[test]
fn a_session_is_mounted_before_its_contents_are_here_and_they_come_by_themselves() {
    run("hydrating::a_session_is_mounted_before_its_contents_are_here_and_they_come_by_themselves", async |root| {
        let node = lazy_node(root).await;
        node.serve_layer();
        let target = node.publish("1").await.unwrap();
        assert_eq!(node.incomplete().await, 1);
        assert_eq!(fs::metadata(target.join("file")).unwrap().len(), CONTENT.len() as u64);
        fs::read(target.join("file")).expect_err("no content is here");
        assert!(node.places().needed().exists(), "the lazy layer knows that it is needed");
        // However many ask at once, each hears that the layer lives.
        let asked = (0..16).map(|_| node.driver.engine.lazy_layer_answers());
        let answers = futures::future::try_join_all(asked).await.unwrap();
        assert_eq!(answers, [true; 16]);

        let stop = CancellationToken::new();
        let background = tokio::spawn(hydration::run(node.driver.clone(), stop.clone()));
        let begun = Instant::now();
        while node.incomplete().await > 0 {
            assert!(begun.elapsed() < Duration::from_secs(30), "nothing comes");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(fs::read(target.join("file")).unwrap(), CONTENT);
        assert!(!node.told_of_absence());
        assert!(!node.places().needed().exists());
        stop.cancel();
        background.await.unwrap();
        let metrics = &node.driver.metrics;
        assert_eq!((metrics.hydrated_objects.get(), metrics.hydrated_bytes.get()), (1, CONTENT.len() as u64));
        node.driver.unpublish(&target).await.unwrap();
    });
}

#[test]
fn without_the_lazy_layer_contents_come_first() {
    run("hydrating::without_the_lazy_layer_contents_come_first", async |root| {
        let node = lazy_node(root).await;
        let target = node.publish("1").await.unwrap();
        assert_eq!(fs::read(target.join("file")).unwrap(), CONTENT);
        assert_eq!((node.incomplete().await, node.driver.metrics.hydrated_objects.get()), (0, 1));
        node.driver.unpublish(&target).await.unwrap();
    });
}

#[test]
fn a_mount_waits_for_contents_when_the_lazy_layer_went_away_before_it() {
    run("hydrating::a_mount_waits_for_contents_when_the_lazy_layer_went_away_before_it", async |root| {
        let node = lazy_node(root).await;
        node.serve_layer();
        let target = node.publish("1").await.unwrap();
        fs::write(target.join("work"), "mine").unwrap();
        assert_eq!(node.incomplete().await, 1);
        // As after a restart of the node.
        node.driver.unpublish(&target).await.unwrap();
        node.driver.engine.unmount_session(UID).await.unwrap();
        unmount(node.layer(), UnmountFlags::DETACH).unwrap();
        assert!(!node.told_of_absence());
        let target = node.publish("2").await.unwrap();
        assert!(node.told_of_absence(), "the session has an event that says why it took long");
        assert_eq!(fs::read_to_string(target.join("work")).unwrap(), "mine");
        assert_eq!(fs::read(target.join("file")).unwrap(), CONTENT);
        assert_eq!(node.incomplete().await, 0);
        node.driver.unpublish(&target).await.unwrap();
    });
}

#[test]
fn what_a_reader_and_the_background_both_fetched_is_kept_once() {
    run("hydrating::what_a_reader_and_the_background_both_fetched_is_kept_once", async |root| {
        let node = lazy_node(root).await;
        node.serve_layer();
        node.driver.warm(&node.session()).await.unwrap();
        let tree = node.driver.engine.incomplete().await.unwrap()[0].root;
        let fetched = node.places().fetched_now().unwrap().join(Blob::of(CONTENT).digest.object_path());
        // While the background has begun to fetch it.
        let reader = |_| {
            fs::create_dir_all(fetched.parent().unwrap()).unwrap();
            fs::write(&fetched, CONTENT).unwrap();
        };
        node.driver.engine.hydrate(tree, &*node.driver.remote, &reader).await.unwrap();
        assert_eq!(node.driver.engine.objects().statistics().file_blobs, 1);
        assert!(!fetched.exists());
    });
}

#[test]
fn while_the_lazy_layer_is_dead_the_background_has_no_limit() {
    run("hydrating::while_the_lazy_layer_is_dead_the_background_has_no_limit", async |root| {
        let names: Vec<String> = (0..25).map(|n| format!("file-{n}")).collect();
        // Too large for a batch, so that each is read and paid for by itself.
        let files: Vec<(&str, Vec<u8>)> =
            names.iter().zip(0_u8..).map(|(name, n)| (name.as_str(), vec![n; 4 << 20])).collect();
        let node = lazy_node_with(root, &files, &["--lazy", "--hydration-bandwidth=1Mi"]).await;
        node.serve_layer();
        node.driver.warm(&node.session()).await.unwrap();
        let stop = CancellationToken::new();
        let watching = tokio::spawn(hydration::watch_layer(node.driver.clone(), stop.clone()));
        let background = tokio::spawn(hydration::run(node.driver.clone(), stop.clone()));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(node.incomplete().await, 1, "100 s with the limit");
        unmount(node.layer(), UnmountFlags::DETACH).unwrap();
        let begun = Instant::now();
        while node.incomplete().await > 0 {
            assert!(begun.elapsed() < Duration::from_secs(60), "it keeps to the limit");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        stop.cancel();
        watching.await.unwrap();
        background.await.unwrap();
    });
}
