//! Restores in place: done once whoever did them, with every writer held still, and with a way back that lacks nothing.

use std::fs;
use std::sync::Mutex;

use aether_api::conditions::{self, FAILED, reason};
use aether_api::session::{Consistency, Durability};
use aether_api::{
    AetherCheckpointSpec, AetherCheckpointStatus, AetherRestore, AetherRestoreSpec, AetherRestoreStatus, names,
};
use aether_cas::StoreError;
use aether_cas::lazy::Places;
use aether_cas::tree::{Attributes, Name, Node as Entry};
use async_trait::async_trait;
use bytes::Bytes;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use rustix::mount::{MountFlags, mount};

use super::*;
use crate::control;
use crate::moments::{uid, under_epoch};

impl Node {
    /// A checkpoint of the session as it is now, in the store.
    async fn checkpoint(&self, name: &str) -> Blob {
        let snapshot = self.driver.snapshot(UID, name).await.unwrap();
        let root = self.driver.make_durable(&snapshot.id).await.unwrap().root;
        self.put_checkpoint(name, root, None);
        root
    }

    /// A checkpoint of some node.
    fn put_checkpoint(&self, name: &str, root: Blob, base: Option<Base>) {
        let spec = AetherCheckpointSpec { session: "fix".into(), ..Default::default() };
        let mut checkpoint = AetherCheckpoint::new(name, spec);
        checkpoint.metadata.namespace = Some(NAMESPACE.into());
        checkpoint.status = Some(AetherCheckpointStatus {
            root: Some(root.to_string()),
            base,
            durability: Some(Durability::Durable),
            ..Default::default()
        });
        self.server.put(&checkpoint);
    }

    /// Where to look at a checkpoint that this node has taken.
    async fn look_into(&self, checkpoint: &str) -> PathBuf {
        let taken: AetherCheckpoint = self.server.get(NAMESPACE, checkpoint).unwrap();
        let status = taken.status.unwrap();
        assert_eq!((status.durability, status.node.as_deref()), (Some(Durability::Local), Some("a")));
        let copy = format!("copy-of-{checkpoint}");
        self.driver.engine.fork_session(&copy, &status.snapshot.unwrap()).await.unwrap();
        self.driver.engine.mount_session(&copy).await.unwrap()
    }

    /// Asks for a restore, and has this node look at it.
    async fn restore(&self, name: &str, to: &str) -> AetherRestoreStatus {
        let spec = AetherRestoreSpec { session: "fix".into(), checkpoint: to.into(), ..Default::default() };
        if self.server.get::<AetherRestore>(NAMESPACE, name).is_none() {
            let mut restore = AetherRestore::new(name, spec);
            restore.metadata.namespace = Some(NAMESPACE.into());
            self.server.put(&restore);
        }
        let restore: AetherRestore = self.server.get(NAMESPACE, name).unwrap();
        self.driver.cluster.sessions.hear_of((*self.session()).clone());
        control::restore(Arc::new(restore), self.driver.clone()).await.unwrap();
        self.server.get::<AetherRestore>(NAMESPACE, name).unwrap().status.unwrap_or_default()
    }

    /// The kubelet makes, or removes, the cgroup of a pod.
    fn cgroup(&self, pod: &str) -> PathBuf {
        self.root.join("cgroup/kubepods/besteffort").join(format!("pod{pod}"))
    }
}

#[test]
fn what_the_operator_has_restored_is_not_restored_again_here() {
    run("restoring::what_the_operator_has_restored_is_not_restored_again_here", async |root| {
        let node = Node::new(root).await;
        fs::create_dir_all(node.cgroup("1")).unwrap();
        let target = node.publish("1").await.unwrap();
        fs::write(target.join("work"), "good").unwrap();
        node.checkpoint("good").await;
        fs::write(target.join("work"), "since").unwrap();

        // The operator moved the head, was killed, and a pod here has mounted the session and written since.
        let mut moved = AetherRestore::new("back", Default::default());
        moved.metadata.namespace = Some(NAMESPACE.into());
        moved.metadata.uid = Some("r-1".into());
        moved.spec = AetherRestoreSpec { session: "fix".into(), checkpoint: "good".into(), ..Default::default() };
        node.server.put(&moved);
        node.server.change(NAMESPACE, "fix", |session: &mut AetherSession| {
            let status = session.status.get_or_insert_default();
            conditions::set(&mut status.conditions, moved.moved(), None);
        });
        assert_eq!(
            node.restore("back", "good").await,
            AetherRestoreStatus::default(),
            "left to the operator to finish"
        );
        assert_eq!(node.checkpoints(), ["good"], "no safety checkpoint");
        assert_eq!(fs::read_to_string(target.join("work")).unwrap(), "since");

        // Another restore is one of its own.
        let status = node.restore("again", "good").await;
        assert_eq!(status.phase.as_deref(), Some("Succeeded"), "{status:?}");
        assert_eq!(fs::read_to_string(target.join("work")).unwrap(), "good");
        assert_eq!(node.checkpoints(), ["again-safety", "good"]);
    });
}

#[test]
fn a_pod_without_processes_spoils_neither_a_moment_nor_a_restore() {
    run("restoring::a_pod_without_processes_spoils_neither_a_moment_nor_a_restore", async |root| {
        let node = Node::new(root).await;
        fs::create_dir_all(node.cgroup("1")).unwrap();
        let target = node.publish("1").await.unwrap();
        node.publish("ended").await.unwrap();
        fs::write(target.join("work"), "good").unwrap();
        node.checkpoint("good").await;
        fs::write(target.join("work"), "bad").unwrap();

        let status = node.restore("back", "good").await;
        assert_eq!(status.phase.as_deref(), Some("Succeeded"), "{status:?}");
        assert_eq!(fs::read_to_string(target.join("work")).unwrap(), "good");
        let safety: AetherCheckpoint = node.server.get(NAMESPACE, &status.safety_checkpoint.unwrap()).unwrap();
        assert_eq!(safety.status.unwrap().consistency, Some(Consistency::PointInTime));

        // A kubelet whose cgroups this driver does not see: anything may run and write.
        fs::remove_dir_all(node.root.join("cgroup/kubepods")).unwrap();
        fs::write(target.join("work"), "since").unwrap();
        let status = node.restore("blind", "good").await;
        let failed = conditions::get(&status.conditions, FAILED).expect("it is refused");
        assert!(failed.message.contains("pod 1") && failed.message.contains("pod ended"), "{}", failed.message);
        assert!(failed.message.contains("nothing was changed"), "{}", failed.message);
        assert_eq!(fs::read_to_string(target.join("work")).unwrap(), "since");
        assert_eq!(status.safety_checkpoint, None);
        assert_eq!(node.checkpoints(), ["back-safety", "good"]);
    });
}

type Meanwhile = Arc<Mutex<Option<Box<dyn FnOnce() + Send>>>>;

/// A store that is far away: something happens while a content is fetched, once.
#[derive(Clone, Default)]
struct Far {
    store: MemoryStore,
    meanwhile: Meanwhile,
}

impl Far {
    /// Has a tree with these files.
    async fn tree(&self, files: &[(&str, &str)]) -> Blob {
        let mut tree = Directory::default();
        for (name, text) in files {
            let content = Blob::of(text.as_bytes());
            self.store.write(content, text.as_bytes().to_vec().into()).await.unwrap();
            let attributes = Attributes { mode: 0o644, ..Attributes::default() };
            let name = Name::new(name.as_bytes().to_vec()).unwrap();
            tree.entries.insert(name, Entry::File { content, attributes, link_group: None });
        }
        self.store.write(tree.blob(), tree.encode()).await.unwrap();
        tree.blob()
    }

    fn meanwhile(&self, happens: impl FnOnce() + Send + 'static) {
        *self.meanwhile.lock().unwrap() = Some(Box::new(happens));
    }

    fn it_happened(&self) -> bool {
        self.meanwhile.lock().unwrap().is_none()
    }
}

#[async_trait]
impl Store for Far {
    async fn find_missing(&self, blobs: &[Blob]) -> Result<Vec<Blob>, StoreError> {
        self.store.find_missing(blobs).await
    }

    async fn read_batch(&self, blobs: &[Blob]) -> Result<Vec<Bytes>, StoreError> {
        self.store.read_batch(blobs).await
    }

    async fn read(&self, blob: Blob) -> Result<Bytes, StoreError> {
        self.store.read(blob).await
    }

    async fn fetch_to(&self, blob: Blob, path: &Path) -> Result<(), StoreError> {
        if let Some(happens) = self.meanwhile.lock().unwrap().take() {
            happens();
        }
        self.store.fetch_to(blob, path).await
    }

    async fn write_batch(&self, blobs: Vec<(Blob, Bytes)>) -> Result<(), StoreError> {
        self.store.write_batch(blobs).await
    }

    async fn write_file(&self, blob: Blob, path: &Path) -> Result<(), StoreError> {
        self.store.write_file(blob, path).await
    }

    async fn read_tree(&self, root: Blob) -> Result<Vec<(Blob, Bytes)>, StoreError> {
        self.store.read_tree(root).await
    }
}

#[test]
fn what_is_written_while_contents_are_fetched_is_in_the_safety_checkpoint() {
    run("restoring::what_is_written_while_contents_are_fetched_is_in_the_safety_checkpoint", async |root| {
        let far = Far::default();
        let base = far.tree(&[]).await;
        let node = Node::with_base(root, far.clone(), base, &[]).await;
        fs::create_dir_all(node.cgroup("1")).unwrap();
        let target = node.publish("1").await.unwrap();
        fs::write(target.join("work"), "bad").unwrap();
        node.put_checkpoint("good", far.tree(&[("work", "good")]).await, None);

        let (driver, late) = (node.driver.clone(), target.join("late"));
        far.meanwhile(move || {
            fs::write(late, "in the last moment").unwrap();
            let lock = driver.session_locks.lock(UID);
            assert!(futures::FutureExt::now_or_never(lock).is_some(), "nobody else waits for the network");
        });
        let status = node.restore("back", "good").await;
        assert!(far.it_happened());
        assert_eq!(status.phase.as_deref(), Some("Succeeded"), "{status:?}");
        assert_eq!(fs::read_to_string(target.join("work")).unwrap(), "good");
        assert!(!target.join("late").exists());

        let before = node.look_into(&status.safety_checkpoint.unwrap()).await;
        assert_eq!(fs::read_to_string(before.join("work")).unwrap(), "bad");
        assert_eq!(fs::read_to_string(before.join("late")).unwrap(), "in the last moment");
    });
}

/// Where contents come lazily, a pod can change a file whose former content was never here, after the restore saw that it need
/// not be fetched.
#[test]
fn a_content_that_is_found_missing_when_the_pods_stand_still_is_fetched_and_nothing_is_touched_before() {
    run(
        "restoring::a_content_that_is_found_missing_when_the_pods_stand_still_is_fetched_and_nothing_is_touched_before",
        async |root| {
            let far = Far::default();
            let base = far.tree(&[("file", "of the base")]).await;
            let node = Node::with_base(root, far.clone(), base, &["--lazy"]).await;
            let layer = Places::new(&node.driver.config.state_dir).mountpoint();
            fs::create_dir_all(&layer).unwrap();
            mount("none", &layer, "tmpfs", MountFlags::empty(), None).unwrap();
            fs::create_dir_all(node.cgroup("1")).unwrap();
            let target = node.publish("1").await.unwrap();
            node.put_checkpoint(
                "good",
                far.tree(&[("file", "of the base"), ("more", "of the checkpoint")]).await,
                None,
            );

            let file = target.join("file");
            far.meanwhile(move || {
                fs::remove_file(&file).unwrap();
                fs::write(&file, "of the pod").unwrap();
            });
            let status = node.restore("back", "good").await;
            assert!(far.it_happened());
            assert_eq!(status.phase.as_deref(), Some("Succeeded"), "{status:?}");
            assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "of the base");
            assert_eq!(fs::read_to_string(target.join("more")).unwrap(), "of the checkpoint");
            assert_eq!(fs::read_to_string(node.look_into("back-safety").await.join("file")).unwrap(), "of the pod");
        },
    );
}

/// A driver is killed when a session is restored and nobody has been told. Its pods go on meanwhile.
#[test]
fn a_restore_that_is_begun_again_keeps_what_was_written_since_too() {
    run("restoring::a_restore_that_is_begun_again_keeps_what_was_written_since_too", async |root| {
        let node = Node::new(root).await;
        fs::create_dir_all(node.cgroup("1")).unwrap();
        let target = node.publish("1").await.unwrap();
        node.server.change(NAMESPACE, "fix", |session: &mut AetherSession| {
            let attachment = session.status.as_mut().unwrap().attachment.as_mut().unwrap();
            attachment.since = Some(Time(jiff::Timestamp::now() - jiff::SignedDuration::from_secs(10)));
        });
        fs::write(target.join("work"), "good").unwrap();
        let good = node.checkpoint("good").await;
        fs::write(target.join("work"), "bad").unwrap();

        let mut restore = AetherRestore::new("back", Default::default());
        restore.metadata.namespace = Some(NAMESPACE.into());
        restore.metadata.uid = Some("r-1".into());
        restore.spec = AetherRestoreSpec { session: "fix".into(), checkpoint: "good".into(), ..Default::default() };
        node.server.put(&restore);
        let driver = &node.driver;
        let origin = names::ORIGIN_SAFETY;
        let made =
            driver.make_checkpoint(&node.session(), "back-safety", origin, String::new(), Some("r-1")).await.unwrap();
        let moment = under_epoch(&uid(&made), 1);
        let cgroups = [node.cgroup("1")];
        driver.engine.restore_in_place(UID, &moment, good, &cgroups, &*driver.remote).await.unwrap();
        fs::write(target.join("since"), "then").unwrap();

        let status = node.restore("back", "good").await;
        assert_eq!(status.phase.as_deref(), Some("Succeeded"), "{status:?}");
        assert!(!target.join("since").exists());
        assert_eq!(status.safety_checkpoint.as_deref(), Some("back-safety"), "what was there at first");
        assert_eq!(fs::read_to_string(node.look_into("back-safety").await.join("work")).unwrap(), "bad");
        assert_eq!(node.checkpoints(), ["back-safety", "back-safety-r-1", "good"]);
        assert_eq!(fs::read_to_string(node.look_into("back-safety-r-1").await.join("since")).unwrap(), "then");
    });
}

/// As before, but the pods are gone by then and the session is let go before anybody comes to the restore.
#[test]
fn what_a_restore_kept_outlives_the_release_of_the_session() {
    run("restoring::what_a_restore_kept_outlives_the_release_of_the_session", async |root| {
        let node = Node::new(root).await;
        let target = node.publish("1").await.unwrap();
        let good = node.checkpoint("good").await;
        fs::write(target.join("work"), "bad").unwrap();
        let driver = &node.driver;
        let origin = names::ORIGIN_SAFETY;
        let made =
            driver.make_checkpoint(&node.session(), "back-safety", origin, String::new(), Some("r-1")).await.unwrap();
        driver.cluster.checkpoints.hear_of(made.clone());
        driver.engine.restore_in_place(UID, &under_epoch(&uid(&made), 1), good, &[], &*driver.remote).await.unwrap();
        driver.unpublish(&target).await.unwrap();
        driver.release(&node.session()).await.unwrap();
        assert_eq!(node.session().holder(), None);
        assert_eq!(fs::read_to_string(node.look_into("back-safety").await.join("work")).unwrap(), "bad");
    });
}

#[test]
fn a_checkpoint_of_another_source_is_refused() {
    run("restoring::a_checkpoint_of_another_source_is_refused", async |root| {
        let node = Node::new(root).await;
        let target = node.publish("1").await.unwrap();
        fs::write(target.join("work"), "mine").unwrap();
        let of = |source: &str| Base {
            source_namespace: Some("platform".into()),
            source_name: Some(source.into()),
            ..node.session().status.clone().unwrap().base.unwrap()
        };
        let (linux, windows) = (of("linux"), of("windows"));
        node.server.change(NAMESPACE, "fix", |session: &mut AetherSession| {
            session.status.as_mut().unwrap().base = Some(linux);
        });
        let root = windows.root.clone().unwrap().parse().unwrap();
        node.put_checkpoint("theirs", root, Some(windows));
        let status = node.restore("back", "theirs").await;
        let failed = conditions::get(&status.conditions, FAILED).expect("it is refused");
        assert_eq!(failed.reason, reason::INVALID, "{}", failed.message);
        assert_eq!(fs::read_to_string(target.join("work")).unwrap(), "mine");
    });
}
