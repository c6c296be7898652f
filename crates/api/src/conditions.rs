//! Condition types and reasons, and the one way to set them. Conditions carry the truth; `phase` is for people.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// The object can be used for what it is for.
pub const READY: &str = "Ready";
/// A source: an import is under way.
pub const IMPORTING: &str = "Importing";
/// A checkpoint: its tree is in the store, and losing the node loses nothing of it.
pub const DURABLE: &str = "Durable";
/// A commit: whether the review rule of its source is satisfied.
pub const APPROVED: &str = "Approved";
/// A request (restore, command, commit) ended well.
pub const COMPLETE: &str = "Complete";
/// A request or checkpoint ended badly, for good.
pub const FAILED: &str = "Failed";
/// What has a tree in the store: whether the store still has all contents of it. Not there while it never missed any.
pub const INTACT: &str = "Intact";

/// A session: an AetherRestore moved its head while no node held it; which one, [`crate::AetherRestore::has_moved`] reads.
pub const RESTORED: &str = "Restored";

/// Reasons, used with the types above.
pub mod reason {
    /// All is as asked for.
    pub const READY: &str = "Ready";
    /// Work has begun and goes on.
    pub const IN_PROGRESS: &str = "InProgress";
    /// The spec contradicts itself or breaks a rule; the message says which.
    pub const INVALID: &str = "Invalid";
    /// The repository's URL leads nowhere.
    pub const REPOSITORY_NOT_FOUND: &str = "RepositoryNotFound";
    /// The repository is there, the ref is not.
    pub const REF_NOT_FOUND: &str = "RefNotFound";
    /// The bucket does not exist, or its service cannot be reached.
    pub const BUCKET_NOT_FOUND: &str = "BucketNotFound";
    /// The repository or bucket refused the credentials, or wants some.
    pub const AUTHENTICATION_FAILED: &str = "AuthenticationFailed";
    /// The Secret that the spec names does not exist.
    pub const SECRET_NOT_FOUND: &str = "SecretNotFound";
    /// The Secret that the spec names lacks the keys of its type.
    pub const SECRET_INVALID: &str = "SecretInvalid";
    /// The claim that the spec names does not exist.
    pub const CLAIM_NOT_FOUND: &str = "ClaimNotFound";
    /// The import Job failed in a way that has no reason of its own; the message has its last words.
    pub const IMPORT_FAILED: &str = "ImportFailed";
    /// The source does not exist (yet).
    pub const SOURCE_NOT_FOUND: &str = "SourceNotFound";
    /// The source has no revision yet.
    pub const SOURCE_NOT_READY: &str = "SourceNotReady";
    /// The revision that the spec names is not one of the source's.
    pub const REVISION_NOT_FOUND: &str = "RevisionNotFound";
    /// The source does not list the session's namespace in `allowedNamespaces`.
    pub const NAMESPACE_NOT_ALLOWED: &str = "NamespaceNotAllowed";
    /// The session that the spec names does not exist.
    pub const SESSION_NOT_FOUND: &str = "SessionNotFound";
    /// The session that the spec names is not usable yet.
    pub const SESSION_NOT_READY: &str = "SessionNotReady";
    /// The checkpoint that the spec names does not exist.
    pub const CHECKPOINT_NOT_FOUND: &str = "CheckpointNotFound";
    /// The checkpoint that the spec names has no durable tree yet.
    pub const CHECKPOINT_NOT_READY: &str = "CheckpointNotReady";
    /// The node that must act has not answered yet.
    pub const WAITING_FOR_NODE: &str = "WaitingForNode";
    /// The claim is not bound yet.
    pub const WAITING_FOR_CLAIM: &str = "WaitingForClaim";
    /// A claim or volume of that name exists and is not ours.
    pub const NAME_TAKEN: &str = "NameTaken";
    /// Another node holds the writer's lease.
    pub const HELD_ELSEWHERE: &str = "HeldElsewhere";
    /// The command ended with an exit code other than 0.
    pub const EXITED: &str = "Exited";
    /// The command ran into its time limit.
    pub const TIMED_OUT: &str = "TimedOut";
    /// The pod could not run the command at all.
    pub const POD_FAILED: &str = "PodFailed";
    /// The node could not do what was asked; the message says why.
    pub const NODE_FAILED: &str = "NodeFailed";
    /// What was asked for is done.
    pub const DONE: &str = "Done";
    /// A commit: the review rule is satisfied.
    pub const APPROVED: &str = "Approved";
    /// A commit: approvals or checks are missing.
    pub const AWAITING_APPROVAL: &str = "AwaitingApproval";
    /// A commit: a reviewer rejects it.
    pub const REJECTED: &str = "Rejected";
    /// A commit: the operator has not written down who asked for it, or not what it says now.
    pub const NOT_SIGNED: &str = "NotSigned";
    /// A commit: what becomes of it cannot be written into the audit log, so nothing does.
    pub const AUDIT_LOG_UNAVAILABLE: &str = "AuditLogUnavailable";
    /// A commit: the repository does not have the commit that the session started from.
    pub const BASE_NOT_FOUND: &str = "BaseNotFound";
    /// A commit: the branch is not where the session started from.
    pub const BRANCH_MOVED: &str = "BranchMoved";
    /// A commit: the branch has changed the same paths.
    pub const CONFLICT: &str = "Conflict";
    /// A commit: the branch has all of it already.
    pub const NOTHING_TO_COMMIT: &str = "NothingToCommit";
    /// A commit: the git server does not take the push.
    pub const PUSH_REJECTED: &str = "PushRejected";
    /// A commit: there is something else where the copy is to be.
    pub const TARGET_EXISTS: &str = "TargetExists";
    /// A commit: the store does not have all of the tree.
    pub const TREE_INCOMPLETE: &str = "TreeIncomplete";
    /// A commit: its Job failed in a way that has no reason of its own; the message has its last words.
    pub const COMMIT_FAILED: &str = "CommitFailed";
    /// A commit: the Job of its name is not the one that the operator asks for.
    pub const INVALID_JOB: &str = "InvalidJob";
    /// The store has no good copy of some contents any more; the message names the paths.
    pub const CONTENTS_LOST: &str = "ContentsLost";
    /// The store has again what it had lost.
    pub const CONTENTS_BACK: &str = "ContentsBack";
}

/// A condition as it should be; [`set`] gives it its time.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// The condition's type, a constant of this module.
    pub type_: &'static str,
    /// Whether it holds.
    pub status: bool,
    /// One word, a constant of [`reason`].
    pub reason: String,
    /// For people: names the object and, where something is wrong, the way out.
    pub message: String,
}

impl Wanted {
    /// The condition holds.
    pub fn yes(type_: &'static str, reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self { type_, status: true, reason: reason.into(), message: message.into() }
    }

    /// The condition does not hold.
    pub fn no(type_: &'static str, reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self { type_, status: false, reason: reason.into(), message: message.into() }
    }
}

/// Puts `wanted` into `conditions`. The transition time moves only when the status flips, so that setting the same
/// condition twice leaves an equal list.
pub fn set(conditions: &mut Vec<Condition>, wanted: Wanted, generation: Option<i64>) {
    let status = if wanted.status { "True" } else { "False" };
    let last_transition_time = conditions
        .iter()
        .find(|condition| condition.type_ == wanted.type_ && condition.status == status)
        .map_or_else(|| Time(jiff::Timestamp::now()), |condition| condition.last_transition_time.clone());
    let condition = Condition {
        type_: wanted.type_.into(),
        status: status.into(),
        reason: wanted.reason,
        message: wanted.message,
        observed_generation: generation,
        last_transition_time,
    };
    match conditions.iter_mut().find(|existing| existing.type_ == condition.type_) {
        Some(existing) => *existing = condition,
        None => conditions.push(condition),
    }
}

/// The condition of this type, if it was ever set.
pub fn get<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}

/// Whether the condition of this type is `True`.
pub fn is_true(conditions: &[Condition], type_: &str) -> bool {
    get(conditions, type_).is_some_and(|condition| condition.status == "True")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_condition_twice_changes_nothing() {
        let mut conditions = Vec::new();
        set(&mut conditions, Wanted::no(READY, reason::IN_PROGRESS, "waiting"), Some(1));
        let first = conditions.clone();
        set(&mut conditions, Wanted::no(READY, reason::IN_PROGRESS, "waiting"), Some(1));
        assert_eq!(first, conditions);
        set(&mut conditions, Wanted::yes(READY, reason::READY, ""), Some(1));
        assert!(is_true(&conditions, READY));
        assert_eq!(conditions.len(), 1);
    }
}
