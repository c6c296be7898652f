//! What the work behind the pods' backs must not take away, nor leave.

use std::fs;

use aether_api::conditions::{self, FAILED};
use aether_api::session::{Consistency, ForkedFrom};
use aether_testkit::Fate;
use jiff::SignedDuration;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use rustix::mount::{UnmountFlags, unmount};

use super::*;
use crate::control;
use crate::moments::under_epoch;
use crate::publish::VIEW;
use crate::records::{PublishRecord, Record as _, SessionRecord};

impl Node {
    async fn has_snapshot(&self, name: &str) -> bool {
        self.driver.engine.snapshot_record(name).await.is_ok()
    }

    async fn snapshots(&self) -> Vec<String> {
        self.driver.engine.snapshots().await.unwrap().into_iter().map(|snapshot| snapshot.id).collect()
    }
}

#[test]
fn a_session_that_cannot_go_yet_keeps_no_other_from_going() {
    run("tidying::a_session_that_cannot_go_yet_keeps_no_other_from_going", async |root| {
        let node = Node::new(root).await;
        let target = node.publish("1").await.unwrap();
        node.driver.unpublish(&target).await.unwrap();
        // Somebody is still in it.
        let view = node.driver.engine.mount_session(UID).await.unwrap();
        let held = fs::File::open(&view).unwrap();
        let snapshot = node.driver.snapshot(UID, "of-nothing").await.unwrap();
        for number in 0..16 {
            let record = SessionRecord { uid: format!("gone-{number}"), ..node.driver.sessions.get(UID).unwrap() };
            node.driver.sessions.put(record).await.unwrap();
        }
        node.server.remove::<AetherSession>(NAMESPACE, "fix");
        control::tidy(&node.driver).await;
        let left: Vec<String> = node.driver.sessions.all().into_iter().map(|record| record.uid).collect();
        assert_eq!(left, [UID]);

        control::drop_snapshots(&node.driver, SignedDuration::ZERO).await.unwrap();
        assert!(!node.has_snapshot(&snapshot.id).await);
        drop(held);
    });
}

#[test]
fn a_snapshot_that_is_worked_on_stays_however_old_it_is() {
    run("tidying::a_snapshot_that_is_worked_on_stays_however_old_it_is", async |root| {
        let node = Node::new(root).await;
        node.publish("1").await.unwrap();
        let used = node.driver.moments.using("release-1.e1");
        node.driver.snapshot(UID, "release-1.e1").await.unwrap();
        control::drop_snapshots(&node.driver, SignedDuration::ZERO).await.unwrap();
        assert!(node.has_snapshot("release-1.e1").await);
        drop(used);
        control::drop_snapshots(&node.driver, SignedDuration::ZERO).await.unwrap();
        assert!(!node.has_snapshot("release-1.e1").await);
    });
}

#[test]
fn an_automatic_checkpoint_whose_answer_was_lost_has_its_moment() {
    run("tidying::an_automatic_checkpoint_whose_answer_was_lost_has_its_moment", async |root| {
        let node = Node::new(root).await;
        let target = node.publish("1").await.unwrap();
        fs::write(target.join("work"), "first").unwrap();
        node.server.before_writes(|write| {
            let stamp = write.plural == "aethercheckpoints" && write.subresource == "status";
            if stamp { Fate::AnswerLost } else { Fate::Answered }
        });
        control::checkpoint_if_changed(&node.driver, UID, None).await.unwrap_err();
        let made = node.server.all::<AetherCheckpoint>().remove(0);
        assert!(node.has_snapshot(&made.status.unwrap().snapshot.unwrap()).await);

        // One that is not needed goes at once.
        node.server.before_writes(|_| Fate::Answered);
        let before = node.snapshots().await;
        let root = node.driver.engine.digest(&before[0]).await.unwrap().root;
        assert_eq!(control::checkpoint_if_changed(&node.driver, UID, Some(root)).await.unwrap(), Some(root));
        assert_eq!(node.snapshots().await, before);
    });
}

#[test]
fn a_session_is_free_while_an_automatic_checkpoint_of_it_is_read() {
    run("tidying::a_session_is_free_while_an_automatic_checkpoint_of_it_is_read", async |root| {
        let node = Node::new(root).await;
        let target = node.publish("1").await.unwrap();
        fs::write(target.join("work"), "first").unwrap();
        let workers = node.driver.workers.available_permits().try_into().unwrap();
        let busy = node.driver.workers.acquire_many(workers).await.unwrap();
        let driver = node.driver.clone();
        let checkpoint = tokio::spawn(async move { control::checkpoint_if_changed(&driver, UID, None).await });
        while node.snapshots().await.is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // Taken, and waiting for a worker: the session is not locked.
        drop(tokio::time::timeout(Duration::from_secs(30), node.driver.session_locks.lock(UID)).await.unwrap());
        assert!(node.checkpoints().is_empty());

        // Another node takes it over meanwhile: what was taken here is no checkpoint of it any more.
        node.taken_over();
        drop(busy);
        checkpoint.await.unwrap().unwrap();
        assert!(node.checkpoints().is_empty() && node.snapshots().await.is_empty());
    });
}

#[test]
fn a_fork_whose_moment_is_lost_says_so() {
    run("tidying::a_fork_whose_moment_is_lost_says_so", async |root| {
        let node = Node::new(root).await;
        let mut fork =
            AetherSession::new("fork", AetherSessionSpec { session: Some("fix".into()), ..Default::default() });
        fork.metadata.namespace = Some(NAMESPACE.into());
        let forked = ForkedFrom {
            session: "fix".into(),
            uid: UID.into(),
            node: Some("a".into()),
            snapshot: Some("fork-1.e1".into()),
            time: Time(jiff::Timestamp::now()),
            consistency: Consistency::PointInTime,
            frozen_microseconds: None,
            durable: false,
        };
        fork.status = Some(AetherSessionStatus { forked_from: Some(forked), ..Default::default() });
        node.server.put(&fork);
        let now = || Arc::new(node.server.get::<AetherSession>(NAMESPACE, "fork").unwrap());
        control::fork(now(), node.driver.clone()).await.unwrap();
        let status = now().status.clone().unwrap();
        let failed = conditions::get(&status.conditions, FAILED).expect("it will never start");
        assert!(failed.message.contains("fork-1.e1") && failed.message.contains("fork again"), "{}", failed.message);

        // Nobody waits for it, and nothing is written a second time.
        node.server.take_writes();
        control::fork(now(), node.driver.clone()).await.unwrap();
        assert_eq!(node.server.take_writes(), []);
        let Err(refused) = node.driver.attach(now(), None, None, &patience()).await else { panic!("it was mounted") };
        assert!(refused.to_string().contains("fork again"), "{refused}");
    });
}

#[test]
fn a_late_clean_up_leaves_a_volume_alone_that_was_published_again() {
    run("tidying::a_late_clean_up_leaves_a_volume_alone_that_was_published_again", async |root| {
        let node = Node::new(root).await;
        let target = node.publish("1").await.unwrap();
        fs::write(target.join("work"), "of the pod").unwrap();
        let record = node.driver.publishes.get(&target.to_string_lossy()).unwrap();
        let late = PublishRecord { inline: true, unpublished: true, ..record.clone() };
        node.driver.publishes.put(PublishRecord { inline: true, ..record }).await.unwrap();
        node.driver.try_end_own_session(&late).await.unwrap();
        assert!(node.server.get::<AetherSession>(NAMESPACE, "fix").is_some());
        assert!(node.driver.sessions.get(UID).is_some() && node.driver.publishes.get(&late.key()).is_some());
        assert_eq!(fs::read_to_string(target.join("work")).unwrap(), "of the pod");

        // In its own time it does what it is for.
        rustix::mount::unmount(&target, UnmountFlags::DETACH).unwrap();
        node.driver.publishes.put(late.clone()).await.unwrap();
        node.driver.try_end_own_session(&late).await.unwrap();
        assert!(node.server.get::<AetherSession>(NAMESPACE, "fix").is_none());
        assert!(node.driver.sessions.get(UID).is_none() && node.driver.publishes.get(&late.key()).is_none());
    });
}

#[test]
fn a_frozen_view_whose_mount_was_lost_goes_when_another_takes_its_place() {
    run("tidying::a_frozen_view_whose_mount_was_lost_goes_when_another_takes_its_place", async |root| {
        let node = Node::new(root).await;
        let target = node.publish("1").await.unwrap();
        fs::write(target.join("work"), "first").unwrap();
        node.driver.snapshot(UID, &under_epoch("moment", 1)).await.unwrap();
        let reader = node.target("reader");
        let read_only = || Publish { read_only: true, ..publish(&reader, "reader") };
        for _ in 0..2 {
            node.driver.publish(read_only(), patience()).await.unwrap();
            assert_eq!(fs::read_to_string(reader.join("work")).unwrap(), "first");
            unmount(&reader, UnmountFlags::DETACH).unwrap();
        }
        let sessions = node.driver.engine.session_records().await.unwrap();
        let views: Vec<_> = sessions.into_iter().filter(|session| session.id.starts_with(VIEW)).collect();
        assert_eq!(views.len(), 1, "{views:?}");
    });
}

#[test]
fn who_only_reads_a_session_keeps_no_lease_that_its_node_knows_nothing_of() {
    run("tidying::who_only_reads_a_session_keeps_no_lease_that_its_node_knows_nothing_of", async |root| {
        let node = Node::new(root).await;
        let reader = node.target("reader");
        let wanted = Publish { read_only: true, ..publish(&reader, "reader") };
        node.driver.publish(wanted, patience()).await.unwrap();
        // Taken by a driver that was killed before it wrote so down.
        node.server.change(NAMESPACE, "fix", |session: &mut AetherSession| {
            let status = session.status.get_or_insert_default();
            status.attachment = Some(Attachment { node: Some("a".into()), epoch: 1, since: None });
        });
        control::session(node.session(), node.driver.clone()).await.unwrap();
        assert_eq!(node.session().holder(), None);
    });
}
