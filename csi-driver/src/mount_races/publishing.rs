//! Publishes that meet each other, and publishes that fail half-way.

use std::fs;
use std::os::unix::fs::symlink;

use futures::StreamExt as _;

use super::*;
use crate::control;
use crate::records::Upper;

#[test]
fn two_pods_of_one_node_starting_together_share_the_session() {
    run("publishing::two_pods_of_one_node_starting_together_share_the_session", async |root| {
        let node = Node::new(root).await;
        let stale = node.session();
        let target = node.publish("1").await.unwrap();
        fs::write(target.join("work"), "of the first pod").unwrap();

        // The second pod's publish looked at the cache before the first one's lease was in it.
        assert!(stale.holder().is_none());
        let attached = node.driver.attach(stale, None, None, &patience()).await.unwrap();
        assert_eq!(attached.session.holder(), Some("a"));
        assert_eq!(fs::read_to_string(target.join("work")).unwrap(), "of the first pod");
        let record = node.driver.sessions.get(UID).unwrap();
        assert_eq!((record.epoch, &record.upper), (1, &Upper::Dirty));
        assert!(node.checkpoints().is_empty(), "nothing was recovered");
    });
}

#[test]
fn a_publish_that_fails_after_it_took_the_lease_gives_it_back() {
    run("publishing::a_publish_that_fails_after_it_took_the_lease_gives_it_back", async |root| {
        let node = Node::new(root).await;
        let mut queue = node.driver.cluster.sessions.queue();
        // The kubelet's directory is gone in a way that only the mount itself notices.
        let target = node.target("1");
        fs::remove_dir(target.parent().unwrap()).unwrap();
        symlink("nowhere/at/all", target.parent().unwrap()).unwrap();
        let failure = node.driver.publish(publish(&target, "1"), patience()).await.unwrap_err();
        assert_eq!(node.session().holder(), Some("a"), "the lease was taken before: {failure}");
        assert!(node.driver.publishes.get(&target.to_string_lossy()).is_none(), "nothing is published");

        // The control loop is told to look at the session, and lets go of what nobody writes.
        let poked =
            tokio::time::timeout(Duration::from_secs(30), queue.next()).await.expect("nobody was told").unwrap();
        assert_eq!((poked.namespace.as_deref(), poked.name.as_str()), (Some(NAMESPACE), "fix"));
        control::release(node.session(), node.driver.clone()).await.unwrap();
        assert_eq!(node.session().holder(), None);
        let record = node.driver.sessions.get(UID).unwrap();
        assert!(matches!(record.upper, Upper::Clean { .. }), "{record:?}");
    });
}

#[test]
fn a_driver_whose_records_are_lost_refuses_to_begin_and_touches_nothing() {
    run("publishing::a_driver_whose_records_are_lost_refuses_to_begin_and_touches_nothing", async |root| {
        let node = Node::new(root).await;
        node.driver.require_records().await.unwrap();
        let target = node.publish("1").await.unwrap();
        fs::write(target.join("work"), "unsaved").unwrap();
        node.driver.require_records().await.unwrap();
        node.driver.unpublish(&target).await.unwrap();
        let server = node.server.clone();
        drop(node);

        let (records, elsewhere) = (root.join("state/driver"), root.join("elsewhere"));
        fs::rename(&records, &elsewhere).unwrap();
        let blind = driver(root, &server, MemoryStore::new()).await.unwrap();
        let refused = blind.require_records().await.unwrap_err().to_string();
        assert!(refused.contains("driver/sessions") && refused.contains("bring them back"), "{refused}");
        control::drop_unrecorded(&Arc::new(blind)).await.unwrap();

        fs::remove_dir_all(&records).unwrap();
        fs::rename(&elsewhere, &records).unwrap();
        let driver = driver(root, &server, MemoryStore::new()).await.unwrap();
        driver.require_records().await.unwrap();
        let view = driver.engine.mount_session(UID).await.unwrap();
        assert_eq!(fs::read_to_string(view.join("work")).unwrap(), "unsaved");
    });
}
