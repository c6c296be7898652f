//! Writes down what is said of a commit and what becomes of it, before either can be seen.

use aether_api::commit::AetherCommitStatus;
use aether_api::names::approval_name;
use aether_api::{AetherApproval, AetherCommit};
use aether_audit::Entry;
use kube::{Api, ResourceExt};

use super::settle;
use crate::admission::is_genuine;
use crate::audit::{IN_TIME, lines};
use crate::context::Context;
use crate::error::Result;
use crate::objects;
use crate::signature::Keys;

/// Writes down what has become of the commit between two of its statuses; else why that cannot be.
pub(super) async fn changes(
    commit: &AetherCommit,
    before: &AetherCommitStatus,
    now: &AetherCommitStatus,
    context: &Context,
) -> Result<std::result::Result<(), String>> {
    let keys = context.keyring.keys();
    let asked = keys.as_ref().is_some_and(|keys| settle::is_genuine(commit, keys).is_ok());
    let mut entries = lines::commit(commit, before, now, asked, &lines::operator(&context.config.namespace));
    if let (Some(_), true, Some(keys)) = (&now.root, now.finished.is_some(), keys) {
        // What was said since it was released, before the line of its end.
        let approvals: Api<AetherApproval> =
            objects::namespaced(&context.client, &commit.namespace().unwrap_or_default());
        let given = objects::list(&approvals, "").await?;
        let end = entries.len().saturating_sub(1);
        entries.splice(end..end, voices(&given, commit, &keys));
    }
    Ok(context.audit.tell(&entries, lines::made(commit), IN_TIME).await)
}

/// Writes down what reviewers have said of the commit; else why that cannot be.
pub(super) async fn said(
    given: &[AetherApproval],
    commit: &AetherCommit,
    keys: &Keys,
    context: &Context,
) -> std::result::Result<(), String> {
    context.audit.tell(&voices(given, commit, keys), lines::made(commit), IN_TIME).await
}

/// Whether somebody rejected the commit, as far as it says, whose approval is not there any more.
pub(super) fn is_missed(
    given: &[AetherApproval],
    commit: &AetherCommit,
    status: &AetherCommitStatus,
    keys: &Keys,
) -> bool {
    let mut rejected = status.approvals.iter().flat_map(|approvals| &approvals.rejected);
    rejected.any(|who| !speaks(given, &approval_name(&commit.name_any(), who), commit, keys))
}

/// Whose rejection stands though it is gone, by the log: whoever had deleted it with the right to would be written there. It may
/// have been deleted while no operator answered, and so nobody asked who did it; also before the commit said that it was rejected.
pub(super) async fn standing(
    given: &[AetherApproval],
    commit: &AetherCommit,
    keys: &Keys,
    context: &Context,
) -> std::result::Result<Vec<String>, String> {
    let namespace = commit.namespace().unwrap_or_default();
    let rejections = context.audit.rejections(&namespace, &commit.name_any(), lines::made(commit)).await?;
    let gone = rejections.into_iter().filter(|(name, _)| !speaks(given, name, commit, keys));
    Ok(gone.map(|(_, who)| who).collect())
}

/// Whether there is a word of the reviewer whose approvals have this name.
fn speaks(given: &[AetherApproval], name: &str, commit: &AetherCommit, keys: &Keys) -> bool {
    given.iter().any(|approval| approval.name_any() == name && is_genuine(approval, commit, keys).is_ok())
}

fn voices(given: &[AetherApproval], commit: &AetherCommit, keys: &Keys) -> Vec<Entry> {
    let of_it = given.iter().filter(|approval| approval.spec.commit == commit.name_any());
    of_it.filter_map(|approval| Some(lines::voice(approval, &is_genuine(approval, commit, keys).ok()?))).collect()
}
