//! Every name that two parts must spell alike: groups, labels, annotations, volume attributes.

use sha2::{Digest, Sha256};

/// The API group of all kinds.
pub const GROUP: &str = "aether.dev";
/// The version of all kinds.
pub const VERSION: &str = "v1alpha1";
/// The group of the aggregated API that serves contents to reviewers.
pub const REVIEW_GROUP: &str = "review.aether.dev";
/// The CSI driver's name, as it registers with kubelets.
pub const CSI_DRIVER: &str = "csi.aether.dev";

/// Field manager of the operator's writes.
pub const OPERATOR_MANAGER: &str = "aether-operator";
/// Field manager of the node drivers' writes.
pub const DRIVER_MANAGER: &str = "aether-driver";

/// Label on claims, volumes and pods of ours: the uid of the session they belong to.
pub const SESSION_UID_LABEL: &str = "aether.dev/session-uid";
/// Label: the session's name.
pub const SESSION_LABEL: &str = "aether.dev/session";
/// Label on import Jobs: the source's name.
pub const SOURCE_LABEL: &str = "aether.dev/source";
/// Label on pods of an AetherCommand: its name.
pub const COMMAND_LABEL: &str = "aether.dev/command";
/// Label on an AetherCommand: the check of a review rule that it is meant for, when its own name is another.
pub const CHECK_LABEL: &str = "aether.dev/check";
/// Label on the Jobs of commits and on checkpoints taken for one: the AetherCommit's uid.
pub const COMMIT_UID_LABEL: &str = "aether.dev/commit-uid";
/// Label on checkpoints that were not asked for by a person: see the `ORIGIN_*` values.
pub const ORIGIN_LABEL: &str = "aether.dev/origin";
/// Made by the session's `checkpoints.interval`; pruned to `checkpoints.keep`.
pub const ORIGIN_AUTOMATIC: &str = "automatic";
/// Taken before a restore.
pub const ORIGIN_SAFETY: &str = "safety";
/// What a lost node had unsaved when another took over.
pub const ORIGIN_RECOVERED: &str = "recovered";
/// Taken by a command with `checkpointAfter`.
pub const ORIGIN_COMMAND: &str = "command";
/// Taken for an AetherCommit that names a session.
pub const ORIGIN_COMMIT: &str = "commit";
/// Taken by `kubectl aether diff` for the time of the diff.
pub const ORIGIN_DIFF: &str = "diff";

/// Annotation on a claim of class `aether`: `NAMESPACE/NAME` (or `NAME` in the claim's namespace) of the source.
pub const CLAIM_SOURCE_ANNOTATION: &str = "aether.dev/source";
/// Annotation on a claim of class `aether`: the session's owner as `UID:GID`; 1000:1000 when absent.
pub const CLAIM_OWNER_ANNOTATION: &str = "aether.dev/owner";
/// Annotation on a safety checkpoint: the uid of the restore that it was taken for.
pub const RESTORE_UID_ANNOTATION: &str = "aether.dev/restore-uid";
/// Annotation on a checkpoint: the uid of the command after which it was taken.
pub const COMMAND_UID_ANNOTATION: &str = "aether.dev/command-uid";
/// Annotation on sessions and checkpoints: who made them, with the operator's proof, as JSON. Written by the operator when the
/// object is made.
pub const CREATOR_ANNOTATION: &str = "aether.dev/created-by";
/// Annotation on the Job of a commit: `NAMESPACE/NAME` of the AetherCommit.
pub const COMMIT_ANNOTATION: &str = "aether.dev/commit";
/// Annotation on a source: any new value asks for a new import.
pub const REFRESH_ANNOTATION: &str = "aether.dev/refresh";

/// Volume attribute: the namespace of the session a volume mounts.
pub const ATTRIBUTE_NAMESPACE: &str = "aether.dev/namespace";
/// Volume attribute: the name of the session a volume mounts.
pub const ATTRIBUTE_SESSION: &str = "aether.dev/session";
/// Volume attribute: the uid of the session a volume mounts.
pub const ATTRIBUTE_SESSION_UID: &str = "aether.dev/session-uid";
/// Attribute a user writes on an inline volume: `NAME` or `NAMESPACE/NAME` of a source; the pod gets a session of its own.
pub const INLINE_SOURCE: &str = "source";
/// Attribute a user writes on an inline volume: a session of the pod's namespace.
pub const INLINE_SESSION: &str = "session";
/// Attribute a user writes on an inline volume beside `source`: the owner as `UID:GID`; 1000:1000 when absent.
pub const INLINE_OWNER: &str = "owner";

/// Attribute a user writes on an inline volume beside `source`: the most bytes that the pod may write, such as `10Gi`; no
/// limit when absent.
pub const INLINE_LIMIT: &str = "limit";

/// The uid and gid that own a new session's files when nobody says otherwise.
pub const DEFAULT_OWNER: (u32, u32) = (1000, 1000);

/// How the names of sessions' PersistentVolumes begin.
pub const VOLUME_PREFIX: &str = "aether-";

/// The name of a session's PersistentVolume.
pub fn volume_name(session_uid: &str) -> String {
    format!("{VOLUME_PREFIX}{session_uid}")
}

/// The name of the checkpoint that keeps what a lost node had unsaved under lease epoch `epoch`.
pub fn recovered_checkpoint_name(session: &str, epoch: i64) -> String {
    format!("{session}-recovered-{epoch}")
}

/// The name of the one AetherApproval that this user can make of this commit.
pub fn approval_name(commit: &str, username: &str) -> String {
    let hash = hex::encode(&Sha256::digest(username)[..8]);
    format!("{commit}.{hash}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_has_one_voice() {
        assert_eq!(approval_name("fix", "jane"), "fix.81f8f6dde88365f3");
        assert_ne!(approval_name("fix", "jane"), approval_name("fix", "Jane"));
        assert!(approval_name("fix", "").starts_with("fix."));
    }
}
