//! Restores in place: done once whoever did them, and with every writer held still.

use std::fs;

use aether_api::conditions::{self, FAILED};
use aether_api::session::{Consistency, Durability};
use aether_api::{AetherCheckpointSpec, AetherCheckpointStatus, AetherRestore, AetherRestoreSpec, AetherRestoreStatus};

use super::*;
use crate::control;

impl Node {
    /// A checkpoint of the session as it is now, in the store.
    async fn checkpoint(&self, name: &str) {
        let snapshot = self.driver.snapshot(UID, name).await.unwrap();
        let digested = self.driver.make_durable(&snapshot.id).await.unwrap();
        let spec = AetherCheckpointSpec { session: "fix".into(), ..Default::default() };
        let mut checkpoint = AetherCheckpoint::new(name, spec);
        checkpoint.metadata.namespace = Some(NAMESPACE.into());
        checkpoint.status = Some(AetherCheckpointStatus {
            root: Some(digested.root.to_string()),
            durability: Some(Durability::Durable),
            ..Default::default()
        });
        self.server.put(&checkpoint);
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
        assert_eq!(fs::read_to_string(target.join("work")).unwrap(), "since");
        let safety: AetherCheckpoint = node.server.get(NAMESPACE, &status.safety_checkpoint.unwrap()).unwrap();
        assert_eq!(safety.status.unwrap().consistency, Some(Consistency::PerFile));
    });
}
