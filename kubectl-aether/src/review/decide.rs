//! `approve` and `reject`: a decision on exactly the tree that a commit shows.
//!
//! One person has one voice, so a decision of one's own that says something else is withdrawn first.

use aether_api::approval::Decision;
use aether_api::commit::CommitPhase;
use aether_api::{AetherApproval, AetherApprovalSpec, AetherCommit, names};
use anyhow::{Result, bail};
use kube::ResourceExt;
use kube::api::{DeleteParams, PostParams, Preconditions};

use crate::cli;
use crate::cluster::{Cluster, explain};
use crate::output::{self, age, confirm, first_line};

use super::{me, phase, requester, root_of, session_of, short, target, undecided};

pub(crate) async fn approve(cluster: &Cluster, args: &cli::Approve) -> Result<()> {
    let commit: AetherCommit = cluster.find(&args.commit).await?;
    let root = decidable(&commit, args.root.as_deref())?;
    if !args.yes {
        confirm(&format!("{}Approve commit {} with tree {root}?", summary(&commit), args.commit))?;
    }
    let approval = record(cluster, &commit, &root, Decision::Approve, args.message.as_deref()).await?;
    told(cluster, &approval, args.print.output)
}

pub(crate) async fn reject(cluster: &Cluster, args: &cli::Reject) -> Result<()> {
    let commit: AetherCommit = cluster.find(&args.commit).await?;
    let root = decidable(&commit, args.root.as_deref())?;
    if !args.yes {
        confirm(&format!("{}Reject commit {}?", summary(&commit), args.commit))?;
    }
    let approval = record(cluster, &commit, &root, Decision::Reject, Some(&args.message)).await?;
    told(cluster, &approval, args.print.output)
}

fn told(cluster: &Cluster, approval: &AetherApproval, format: Option<cli::ObjectFormat>) -> Result<()> {
    if approval.spec.reviewer.is_none() {
        eprintln!(
            "warning: the cluster did not write down who you are, so this will not count: Aether's admission webhook does not serve"
        );
    }
    if let Some(format) = format {
        return output::object(approval, format);
    }
    let (done, what) = match approval.spec.decision {
        Decision::Approve => ("approved", "withdraw it"),
        Decision::Reject => ("rejected", "withdraw that"),
    };
    output::print(&format!(
        "commit {} {done} with tree {}\n`kubectl aether delete approval/{} -n {}` would {what}\n",
        approval.spec.commit,
        short(&approval.spec.root),
        approval.name_any(),
        cluster.namespace
    ))
}

/// The tree that a decision would be about, or why there can be none.
pub(super) fn decidable(commit: &AetherCommit, seen: Option<&str>) -> Result<String> {
    let name = commit.name_any();
    if !undecided(commit) {
        bail!("commit {name} is {} already: it is too late to decide on it", phase(commit));
    }
    let Some(root) = root_of(commit) else {
        bail!("commit {name} has no tree yet: its checkpoint is on its way to the store");
    };
    match seen {
        Some(seen) if seen != root => {
            bail!("the tree of commit {name} is {root}, not {seen}: look at it again with `kubectl aether show {name}`")
        }
        _ => Ok(root.to_owned()),
    }
}

/// What is being decided on.
fn summary(commit: &AetherCommit) -> String {
    let status = commit.status.clone().unwrap_or_default();
    let message = commit.spec.target.git.as_ref().map(|git| format!("\n  {}", first_line(&git.message)));
    let approvals = status.approvals.map(|approvals| format!(", {} of {} approvals", approvals.have, approvals.need));
    format!(
        "commit {} of session {} to {}, asked for by {} {} ago{}{}\n",
        commit.name_any(),
        session_of(commit).unwrap_or("?"),
        target(&commit.spec.target),
        requester(commit).unwrap_or("somebody"),
        age(commit.metadata.creation_timestamp.as_ref()),
        approvals.unwrap_or_default(),
        message.unwrap_or_default(),
    ) + if status.phase == Some(CommitPhase::Rejected) { "  it is rejected now\n" } else { "" }
}

/// Writes down what the caller says of the commit, instead of what they said before.
pub(super) async fn record(
    cluster: &Cluster,
    commit: &AetherCommit,
    root: &str,
    decision: Decision,
    text: Option<&str>,
) -> Result<AetherApproval> {
    let name = commit.name_any();
    let spec = AetherApprovalSpec {
        commit: name.clone(),
        root: root.into(),
        decision,
        text: text.map(Into::into),
        ..Default::default()
    };
    let api = cluster.api::<AetherApproval>();
    let mut wanted = AetherApproval::new("", spec);
    match me(cluster).await? {
        Some(user) => {
            let own = names::approval_name(&name, &user);
            if let Some(before) = said_already(cluster, &own, &wanted).await? {
                return Ok(before);
            }
            wanted.metadata.name = Some(own);
        }
        // The operator writes the name then. This has to be the beginning of one all the same.
        None => {
            wanted.metadata.name = None;
            wanted.metadata.generate_name = Some(format!("{name}-"));
        }
    }
    let mut made = api.create(&PostParams::default(), &wanted).await;
    if let Err(kube::Error::Api(status)) = &made
        && status.is_already_exists()
        && wanted.metadata.name.is_none()
        && let Some(own) = status.details.as_ref().map(|details| details.name.clone()).filter(|own| !own.is_empty())
    {
        if let Some(before) = said_already(cluster, &own, &wanted).await? {
            return Ok(before);
        }
        made = api.create(&PostParams::default(), &wanted).await;
    }
    let verb = match decision {
        Decision::Approve => "approve",
        Decision::Reject => "reject",
    };
    made.map_err(|error| explain(error, &format!("{verb} commit {name}")))
}

/// What the caller has said before by this name, if it is the same; what is not is withdrawn.
async fn said_already(cluster: &Cluster, own: &str, wanted: &AetherApproval) -> Result<Option<AetherApproval>> {
    let before = cluster.api::<AetherApproval>().get_opt(own).await;
    let Some(before) = before.map_err(|error| explain(error, &format!("read approval {own}")))? else {
        return Ok(None);
    };
    let (was, is) = (&before.spec, &wanted.spec);
    if (was.decision, &was.root) == (is.decision, &is.root) && (is.text.is_none() || was.text == is.text) {
        return Ok(Some(before));
    }
    withdraw(cluster, &before).await?;
    Ok(None)
}

/// Deletes a decision of the caller's own, and not one that was made of its name meanwhile.
async fn withdraw(cluster: &Cluster, approval: &AetherApproval) -> Result<()> {
    let how = DeleteParams::default().preconditions(Preconditions { uid: approval.uid(), resource_version: None });
    match cluster.api::<AetherApproval>().delete(&approval.name_any(), &how).await {
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        other => other.map(drop).map_err(|error| {
            explain(error, &format!("withdraw what you said before (approval {})", approval.name_any()))
        }),
    }
}

#[cfg(test)]
mod tests {
    use aether_api::{AetherCommitSpec, AetherCommitStatus};

    use super::*;

    #[test]
    fn a_decision_is_on_the_tree_that_was_seen() {
        let mut commit = AetherCommit::new("c", AetherCommitSpec::default());
        assert!(decidable(&commit, None).unwrap_err().to_string().contains("no tree yet"));
        let status =
            AetherCommitStatus { root: Some("r/1".into()), phase: Some(CommitPhase::Rejected), ..Default::default() };
        commit.status = Some(status);
        assert_eq!(decidable(&commit, Some("r/1")).unwrap(), "r/1");
        let error = decidable(&commit, Some("q/1")).unwrap_err().to_string();
        assert!(error.contains("r/1") && error.contains("q/1"), "{error}");
        commit.status.as_mut().unwrap().phase = Some(CommitPhase::Running);
        assert!(decidable(&commit, None).unwrap_err().to_string().contains("too late"));
    }
}
