//! The writer's lease of a session: who holds it, and what a node that wants it has to do next. Pure.
//!
//! The lease is `status.attachment` of the session and changes by compare-and-swap only. Its epoch grows with each
//! taking and alone decides who lost: a holder that is cut off never gives a lease back. Whether a holder lives is
//! read from the node lease that its kubelet renews; a session writes no heartbeat ([`aether_api::liveness`]).

use aether_api::liveness::Liveness;
use aether_api::session::Attachment;

use crate::records::{SessionRecord, Upper};

/// What a node that wants to write a session does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// It holds the lease already, under this epoch, and its upper is the session.
    Keep { epoch: i64 },
    /// Take the lease under this epoch by compare-and-swap.
    Take { epoch: i64, from: Option<String> },
    /// First keep what the upper here has unsaved as the checkpoint `recovered-<epoch>`: others may have written since.
    Recover,
    /// What was seen of the lease is older than what this node wrote: read the session again. Never a reason to recover.
    Reread,
    /// Somebody else holds it: ask whether they live.
    Inspect { holder: String },
    /// Somebody else holds it and lives: wait, and look again when the session changes or the holder's lease ends.
    Wait { holder: String },
}

/// Decides for node `me`. `local` is what this node has of the session, `liveness` what is known of the holder, if it
/// was asked for.
pub(crate) fn decide(
    attachment: Option<&Attachment>,
    local: Option<&SessionRecord>,
    me: &str,
    liveness: Option<Liveness>,
) -> Action {
    let epoch = attachment.map_or(0, |attachment| attachment.epoch);
    let holder = attachment.and_then(|attachment| attachment.node.as_deref());
    if let Some(local) = local {
        let mine = holder == Some(me) && local.epoch == epoch;
        match local.upper {
            Upper::Dirty if mine => return Action::Keep { epoch },
            Upper::Dirty if local.epoch > epoch => return Action::Reread,
            Upper::Dirty | Upper::Fenced { .. } => return Action::Recover,
            Upper::Clean { .. } => {}
        }
    }
    match holder {
        None => Action::Take { epoch: epoch + 1, from: None },
        // This node took it and was killed before it wrote that down, or lost its records: nothing was mounted
        // under that epoch that is still here.
        Some(holder) if holder == me => Action::Take { epoch: epoch + 1, from: None },
        Some(holder) => match liveness {
            None => Action::Inspect { holder: holder.to_owned() },
            Some(liveness) if liveness.lost() => Action::Take { epoch: epoch + 1, from: Some(holder.to_owned()) },
            Some(_) => Action::Wait { holder: holder.to_owned() },
        },
    }
}

/// Whether `me` holds the lease under the epoch of its record, and the upper here is the session.
pub(crate) fn holds(attachment: Option<&Attachment>, local: &SessionRecord, me: &str) -> bool {
    local.upper == Upper::Dirty
        && attachment
            .is_some_and(|attachment| attachment.node.as_deref() == Some(me) && attachment.epoch == local.epoch)
}

/// Whether another node has taken the session over since this node wrote it.
pub(crate) fn lost(attachment: Option<&Attachment>, local: &SessionRecord, me: &str) -> bool {
    attachment.is_some_and(|attachment| {
        attachment.epoch > local.epoch
            && !(attachment.node.as_deref() == Some(me) && attachment.epoch == local.epoch + 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn attachment(node: Option<&str>, epoch: i64) -> Option<Attachment> {
        Some(Attachment { node: node.map(str::to_owned), epoch, since: None })
    }

    fn record(epoch: i64, upper: Upper) -> Option<SessionRecord> {
        Some(SessionRecord {
            uid: "u".into(),
            namespace: "team".into(),
            name: "fix".into(),
            epoch,
            upper,
            ..SessionRecord::default()
        })
    }

    fn clean() -> Upper {
        Upper::Clean { root: "ab/1".into() }
    }

    #[test]
    fn every_case_has_its_action() {
        let alive = Some(Liveness::Alive { again: Duration::from_secs(10) });
        let take = |epoch, from: Option<&str>| Action::Take { epoch, from: from.map(str::to_owned) };
        let wait = Action::Wait { holder: "b".into() };
        let inspect = Action::Inspect { holder: "b".into() };
        let cases = [
            ("never attached", None, None, None, take(1, None)),
            ("released by another", attachment(None, 4), None, None, take(5, None)),
            ("released here", attachment(None, 4), record(4, clean()), None, take(5, None)),
            ("held here", attachment(Some("a"), 4), record(4, Upper::Dirty), None, Action::Keep { epoch: 4 }),
            ("taken here, records lost", attachment(Some("a"), 4), None, None, take(5, None)),
            ("taken here, killed before the record", attachment(Some("a"), 5), record(4, clean()), None, take(6, None)),
            ("held elsewhere, not asked", attachment(Some("b"), 4), None, None, inspect.clone()),
            ("held elsewhere, with an old clean copy", attachment(Some("b"), 4), record(3, clean()), None, inspect),
            ("held elsewhere, alive", attachment(Some("b"), 4), None, alive, wait.clone()),
            ("held elsewhere, no lease to judge by", attachment(Some("b"), 4), None, Some(Liveness::Unknown), wait),
            ("holder deleted", attachment(Some("b"), 4), None, Some(Liveness::NodeGone), take(5, Some("b"))),
            ("holder expired", attachment(Some("b"), 4), None, Some(Liveness::Expired), take(5, Some("b"))),
            ("taken over by another", attachment(Some("b"), 5), record(4, Upper::Dirty), alive, Action::Recover),
            ("taken over and released", attachment(None, 5), record(4, Upper::Dirty), None, Action::Recover),
            ("let go by another hand", attachment(None, 4), record(4, Upper::Dirty), None, Action::Recover),
            ("two pods at once: the cache has not seen the lease", None, record(1, Upper::Dirty), None, Action::Reread),
            (
                "the cache shows the holder before",
                attachment(Some("b"), 3),
                record(4, Upper::Dirty),
                alive,
                Action::Reread,
            ),
            (
                "the cache shows our own lease before",
                attachment(Some("a"), 3),
                record(4, Upper::Dirty),
                None,
                Action::Reread,
            ),
            (
                "recovery not finished",
                attachment(Some("a"), 4),
                record(4, Upper::Fenced { snapshot: "s".into(), root: None }),
                None,
                Action::Recover,
            ),
        ];
        for (name, attachment, local, liveness, expected) in cases {
            assert_eq!(decide(attachment.as_ref(), local.as_ref(), "a", liveness), expected, "{name}");
        }
    }

    #[test]
    fn a_session_is_lost_when_another_node_took_it() {
        let local = record(4, Upper::Dirty).unwrap();
        let lost = |attachment: Option<Attachment>| lost(attachment.as_ref(), &local, "a");
        assert!(lost(attachment(Some("b"), 5)));
        assert!(lost(attachment(None, 5)));
        assert!(lost(attachment(Some("a"), 6)));
        assert!(!lost(attachment(Some("a"), 4)));
        assert!(!lost(attachment(None, 4)));
        // What the cache shows may be older than what this node has written.
        assert!(!lost(attachment(Some("b"), 3)));
        assert!(!lost(None));
    }

    #[test]
    fn a_node_holds_under_its_own_epoch_only() {
        let held = |attachment: Option<Attachment>, upper| holds(attachment.as_ref(), &record(4, upper).unwrap(), "a");
        assert!(held(attachment(Some("a"), 4), Upper::Dirty));
        assert!(!held(attachment(Some("a"), 4), clean()));
        assert!(!held(attachment(Some("a"), 5), Upper::Dirty));
        assert!(!held(attachment(Some("a"), 3), Upper::Dirty));
        assert!(!held(attachment(Some("b"), 4), Upper::Dirty));
        assert!(!held(attachment(None, 4), Upper::Dirty));
        assert!(!held(None, Upper::Dirty));
    }
}
