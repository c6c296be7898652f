//! A session that leaves this node while another takes it over.

use std::fs;
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};

use aether_api::names::recovered_checkpoint_name;
use aether_testkit::{Fate, Write};

use super::*;
use crate::failure::Failure;
use crate::records::{SessionRecord, Upper};

fn lets_go(write: &Write) -> bool {
    write.plural == "aethersessions" && write.subresource == "status"
}

impl Node {
    fn record(&self) -> Option<SessionRecord> {
        self.driver.sessions.get(UID)
    }

    async fn recover(&self) -> Result<()> {
        let session = self.session();
        let _lock = self.driver.session_locks.lock(UID).await;
        self.driver.recover(&session, &self.record().unwrap()).await
    }

    /// A pod wrote `work` and is gone.
    async fn worked(&self) {
        let target = self.publish("1").await.unwrap();
        fs::write(target.join("work"), "unsaved").unwrap();
        self.driver.unpublish(&target).await.unwrap();
    }

    /// What a checkpoint of this node holds.
    async fn tree_of(&self, checkpoint: &str) -> aether_cas::Blob {
        let checkpoint: AetherCheckpoint = self.server.get(NAMESPACE, checkpoint).unwrap();
        let status = checkpoint.status.unwrap();
        assert_eq!(status.durability, Some(aether_api::session::Durability::Local));
        self.driver.engine.digest(&status.snapshot.unwrap()).await.unwrap().root
    }
}

#[test]
fn what_a_process_writes_after_the_loss_of_its_session_is_kept_too() {
    run("leaving::what_a_process_writes_after_the_loss_of_its_session_is_kept_too", async |root| {
        let node = Node::new(root).await;
        let target = node.publish("1").await.unwrap();
        let mut log = fs::File::create(target.join("log")).unwrap();
        log.write_all(b"before").unwrap();
        node.taken_over();
        assert!(node.driver.holds_now(UID).await.unwrap().is_none(), "the record alone decides nothing");

        let busy = node.recover().await.unwrap_err();
        assert!(matches!(&busy, Failure::Engine(aether_engine::Error::Busy { .. })), "{busy}");
        assert_eq!(node.checkpoints(), ["fix-recovered-1"]);
        log.write_all(b" and after").unwrap();
        drop(log);

        let deadline = Instant::now() + Duration::from_secs(30);
        while let Err(failure) = node.recover().await {
            // The kernel lets go of a mount a moment after the last file in it is closed.
            assert!(Instant::now() < deadline, "{failure}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(node.checkpoints(), ["fix-recovered-1", "fix-recovered-1-2"]);
        assert_ne!(node.tree_of("fix-recovered-1").await, node.tree_of("fix-recovered-1-2").await);
        assert!(node.record().is_none() && !target.exists());
        assert!(node.driver.engine.session(UID).await.unwrap_err().is_not_found());
    });
}

/// Another node takes over when everything is uploaded and the lease is about to be let go. What was uploaded is nobody's
/// head, so it must not count as kept.
#[test]
fn a_takeover_just_before_the_lease_is_let_go_loses_nothing() {
    run("leaving::a_takeover_just_before_the_lease_is_let_go_loses_nothing", async |root| {
        let node = Node::new(root).await;
        let base = node.session().head_root().unwrap().to_owned();
        node.worked().await;
        let (server, once) = (node.server.clone(), AtomicBool::new(false));
        node.server.before_writes(move |write| {
            if lets_go(write) && !once.swap(true, Ordering::Relaxed) {
                take_over(&server);
            }
            Fate::Answered
        });
        node.driver.release(&node.session()).await.unwrap();

        assert_eq!(node.session().holder(), Some("b"));
        assert_eq!(node.session().head_root(), Some(base.as_str()), "the new holder's head was not moved");
        let record = node.record().unwrap();
        assert_eq!((&record.upper, record.last_root.as_deref()), (&Upper::Dirty, Some(base.as_str())));

        node.recover().await.unwrap();
        let kept = recovered_checkpoint_name("fix", 1);
        assert_eq!(node.checkpoints(), std::slice::from_ref(&kept));
        assert_ne!(node.tree_of(&kept).await.to_string(), base);
        assert!(node.record().is_none());
    });
}

/// The lease was let go and the answer was lost; then another node took the session, from a head with all of our work.
#[test]
fn a_takeover_after_a_release_whose_answer_was_lost_keeps_nothing_twice() {
    run("leaving::a_takeover_after_a_release_whose_answer_was_lost_keeps_nothing_twice", async |root| {
        let node = Node::new(root).await;
        node.worked().await;
        node.server.before_writes(|write| if lets_go(write) { Fate::AnswerLost } else { Fate::Answered });
        node.driver.release(&node.session()).await.unwrap_err();
        node.server.before_writes(|_| Fate::Answered);
        let head = node.session().head_root().unwrap().to_owned();
        assert_eq!(node.session().holder(), None);
        assert_eq!(node.record().unwrap().upper, Upper::Dirty, "nobody said that it was let go");

        node.taken_over();
        node.recover().await.unwrap();
        assert!(node.checkpoints().is_empty(), "the head has it all");
        assert_eq!(node.session().head_root(), Some(head.as_str()));
        assert!(node.record().is_none());
    });
}

/// As before, but a pod here wants the session again: the loop looks again, or the pod takes the lease anew. Either way the
/// work is there.
#[test]
fn a_release_whose_answer_was_lost_is_finished_by_the_next_attempt() {
    run("leaving::a_release_whose_answer_was_lost_is_finished_by_the_next_attempt", async |root| {
        let node = Node::new(root).await;
        node.worked().await;
        node.server.before_writes(|write| if lets_go(write) { Fate::AnswerLost } else { Fate::Answered });
        node.driver.release(&node.session()).await.unwrap_err();
        node.server.before_writes(|_| Fate::Answered);
        node.driver.release(&node.session()).await.unwrap();
        let head = node.session().head_root().unwrap().to_owned();
        assert_eq!(node.record().unwrap().upper, Upper::Clean { root: head });

        let target = node.publish("2").await.unwrap();
        assert_eq!(fs::read_to_string(target.join("work")).unwrap(), "unsaved");
        assert_eq!(node.session().status.clone().unwrap().attachment.unwrap().epoch, 2);
        assert!(node.checkpoints().is_empty());
    });
}

/// A pod mounts the session while its release is on the way: the release ends, the pod keeps the lease and its work.
#[test]
fn a_pod_that_comes_while_the_session_is_let_go_keeps_it() {
    run("leaving::a_pod_that_comes_while_the_session_is_let_go_keeps_it", async |root| {
        let node = Node::new(root).await;
        node.worked().await;
        for round in 0..20 {
            let pod = format!("again-{round}");
            let session = node.session();
            let (released, target) = tokio::join!(node.driver.release(&session), node.publish(&pod));
            let target = target.unwrap();
            // Either it was let go first and taken again, or it was never let go.
            if let Err(failure) = released {
                assert!(matches!(failure, Failure::NotYet(_)), "{failure}");
            }
            assert_eq!(node.session().holder(), Some("a"));
            assert_eq!(node.record().unwrap().upper, Upper::Dirty);
            assert_eq!(fs::read_to_string(target.join("work")).unwrap(), "unsaved");
            fs::write(target.join(&pod), &pod).unwrap();
            node.driver.unpublish(&target).await.unwrap();
        }
        node.driver.release(&node.session()).await.unwrap();
        let target = node.publish("last").await.unwrap();
        assert_eq!(fs::read_dir(&target).unwrap().count(), 21);
        assert!(node.checkpoints().is_empty());
    });
}
