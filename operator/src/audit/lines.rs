//! What there is to say of commits, approvals and notes. Pure.

use aether_api::approval::Decision;
use aether_api::commit::{AetherCommitStatus, CommitPhase};
use aether_api::identity::Identity;
use aether_api::{AetherApproval, AetherCommit, AetherNote};
use aether_audit::{Entry, Object, Verb};
use jiff::Timestamp;
use kube::ResourceExt;

use crate::objects;

/// The most bytes of a name or a tree in a line, which are shorter by all rules of today. What is cut is found by the object's uid.
const LONGEST: usize = 1024;

/// The account of the operator, which does what no user does.
pub fn operator(namespace: &str) -> String {
    format!("system:serviceaccount:{namespace}:aether-operator")
}

/// When the object was made; long ago when it does not say.
pub fn made<K: objects::Object>(object: &K) -> Timestamp {
    object.creation_timestamp().map_or(Timestamp::UNIX_EPOCH, |time| time.0)
}

/// What has become of a commit between two of its statuses, by the operator of this account. `asked`: whether it is genuine
/// who asked for it.
pub fn commit(
    commit: &AetherCommit,
    before: &AetherCommitStatus,
    now: &AetherCommitStatus,
    asked: bool,
    operator: &str,
) -> Vec<Entry> {
    let entry = |verb, actor: &str, time: Option<Timestamp>| Entry {
        // The API server's clock may be ahead of ours.
        time: time.unwrap_or_else(Timestamp::now).max(made(commit)),
        actor: cut(actor),
        verb,
        object: about(commit),
        root: now.root.as_deref().map(cut),
        occasion: 0,
    };
    let mut entries = Vec::new();
    let ended = before.finished.is_none() && now.finished.is_some();
    if asked && before.root.is_none() && (now.root.is_some() || ended) {
        let by = commit.spec.requested_by.clone().unwrap_or_default();
        entries.push(entry(Verb::Requested, &by.username, Some(made(commit))));
    }
    if before.phase != Some(CommitPhase::Running) && now.phase == Some(CommitPhase::Running) {
        // What was released is counted again before it is tried again, and may have to wait in between.
        let occasion = now.releases.unwrap_or(0).into();
        entries.push(Entry { occasion, ..entry(Verb::Released, operator, None) });
    }
    if ended {
        let verb = if now.phase == Some(CommitPhase::Succeeded) { Verb::Succeeded } else { Verb::Failed };
        entries.push(entry(verb, operator, now.finished.as_ref().map(|time| time.0)));
    }
    entries
}

/// What a reviewer has said, whom the operator's signature names.
pub fn voice(approval: &AetherApproval, reviewer: &Identity) -> Entry {
    let verb = match approval.spec.decision {
        Decision::Approve => Verb::Approved,
        Decision::Reject => Verb::Rejected,
    };
    Entry {
        time: made(approval),
        actor: cut(&reviewer.username),
        verb,
        object: about(approval),
        root: Some(cut(&approval.spec.root)),
        occasion: 0,
    }
}

/// That somebody takes back what was said.
pub fn withdrawn(approval: &AetherApproval, by: &Identity) -> Entry {
    let time = Timestamp::now().max(made(approval));
    Entry { time, verb: Verb::Withdrawn, ..voice(approval, by) }
}

/// That a note is made.
pub fn noted(note: &AetherNote, by: &Identity) -> Entry {
    Entry {
        time: Timestamp::now(),
        actor: cut(&by.username),
        verb: Verb::Noted,
        object: about(note),
        root: None,
        occasion: 0,
    }
}

/// That a note is resolved or opened again, if it is. A note has each generation once, so that it tells the occasions apart.
pub fn turned(old: &AetherNote, new: &AetherNote, by: &Identity) -> Option<Entry> {
    let verb = match (old.spec.resolved, new.spec.resolved) {
        (false, true) => Verb::Resolved,
        (true, false) => Verb::Reopened,
        _ => return None,
    };
    let occasion = old.metadata.generation.and_then(|generation| generation.try_into().ok()).unwrap_or(0);
    Some(Entry { verb, occasion, ..noted(old, by) })
}

/// A line has to hold it, whatever somebody wrote into an object while the webhook took it.
fn cut(text: &str) -> String {
    let ends = text.char_indices().map(|(at, letter)| at + letter.len_utf8());
    text[..ends.take_while(|end| *end <= LONGEST).last().unwrap_or(0)].to_owned()
}

fn about<K: objects::Object>(object: &K) -> Object {
    Object {
        kind: K::kind(&()).into_owned(),
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
        uid: object.uid().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verbs(before: &AetherCommitStatus, now: &AetherCommitStatus) -> Vec<(Verb, u64)> {
        let entries = commit(&AetherCommit::new("fix", Default::default()), before, now, true, "operator");
        entries.iter().map(|entry| (entry.verb, entry.occasion)).collect()
    }

    #[test]
    fn each_change_of_a_commit_is_one_line() {
        let at = |phase| AetherCommitStatus { phase: Some(phase), root: Some("aa/1".into()), ..Default::default() };
        let ended = |phase| AetherCommitStatus { finished: Some(objects::now()), ..at(phase) };
        let (new, waits, runs) = (Default::default(), at(CommitPhase::AwaitingApproval), at(CommitPhase::Running));
        assert_eq!(verbs(&new, &at(CommitPhase::Pending)), [(Verb::Requested, 0)]);
        assert_eq!(verbs(&new, &runs), [(Verb::Requested, 0), (Verb::Released, 0)], "the rule asks for nobody");
        assert_eq!(verbs(&waits, &runs), [(Verb::Released, 0)]);
        let again = AetherCommitStatus { releases: Some(2), ..runs.clone() };
        assert_eq!(verbs(&waits, &again), [(Verb::Released, 2)], "after it was rejected in between");
        assert_eq!(verbs(&runs, &again), []);
        assert_eq!(verbs(&again, &waits), []);
        assert_eq!(verbs(&runs, &ended(CommitPhase::Succeeded)), [(Verb::Succeeded, 0)]);
        assert_eq!(verbs(&runs, &ended(CommitPhase::Failed)), [(Verb::Failed, 0)]);
        let never = AetherCommitStatus { root: None, ..ended(CommitPhase::Failed) };
        assert_eq!(verbs(&new, &never), [(Verb::Requested, 0), (Verb::Failed, 0)]);
        assert_eq!(verbs(&never, &never), []);
        let unknown = commit(&AetherCommit::new("fix", Default::default()), &new, &waits, false, "operator");
        assert_eq!(unknown, [], "nobody is named who did not ask");
    }

    #[test]
    fn what_is_cut_ends_between_two_letters() {
        for (text, expected) in [("ä".repeat(600), 1024), (format!("a{}", "ä".repeat(600)), 1023), ("ä".into(), 2)] {
            assert_eq!(cut(&text).len(), expected);
            assert!(text.starts_with(&cut(&text)));
        }
    }

    #[test]
    fn a_note_that_is_resolved_again_is_another_line() {
        let note = |generation, resolved| {
            let mut note = AetherNote::new("n", aether_api::AetherNoteSpec { resolved, ..Default::default() });
            note.metadata.generation = Some(generation);
            note
        };
        let by = Identity { username: "jane".into(), ..Identity::default() };
        let turned = |generation, from, to| turned(&note(generation, from), &note(generation, to), &by);
        let (first, second) = (turned(1, false, true).unwrap(), turned(3, false, true).unwrap());
        assert_eq!((first.verb, first.actor.as_str()), (Verb::Resolved, "jane"));
        assert!(!first.repeats(&second));
        assert!(first.repeats(&turned(1, false, true).unwrap()), "asked twice about one change");
        assert_eq!(turned(2, true, false).unwrap().verb, Verb::Reopened);
        assert_eq!(turned(4, true, true), None);
    }
}
