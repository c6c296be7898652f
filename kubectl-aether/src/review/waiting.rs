//! `review`: what waits for the caller, across namespaces.

use aether_api::commit::CommitPhase;
use aether_api::{AetherApproval, AetherCommit, names};
use anyhow::Result;
use kube::ResourceExt;
use kube::api::{Api, ListParams};

use crate::cli::{Format, Review};
use crate::cluster::{Cluster, explain};
use crate::output::{self, age, first_line, or_dash, printable};

use super::{me, phase, requester, root_of, session_of, target};

pub(crate) async fn review(cluster: &Cluster, args: &Review, of_namespace: bool) -> Result<()> {
    let everywhere = !of_namespace;
    let (mut commits, namespaces) = match everywhere {
        true => match Api::<AetherCommit>::all(cluster.client.clone()).list(&ListParams::default()).await {
            Ok(list) => (list.items, true),
            Err(kube::Error::Api(status)) if status.code == 403 => {
                eprintln!("you may not list commits of all namespaces: only those of {} are shown", cluster.namespace);
                (here(cluster).await?, false)
            }
            Err(error) => return Err(explain(error, "list commits")),
        },
        false => (here(cluster).await?, false),
    };
    let approvals: Api<AetherApproval> = if namespaces { Api::all(cluster.client.clone()) } else { cluster.api() };
    let approvals =
        approvals.list(&ListParams::default()).await.map_err(|error| explain(error, "list approvals"))?.items;
    let me = me(cluster).await?;
    if me.is_none() && !args.all {
        eprintln!("this cluster does not say who you are: also shown is what you have decided on");
    }
    commits.retain(|commit| waits(commit, me.as_deref(), &approvals, args.all));
    commits.sort_by_key(|commit| {
        (commit.metadata.creation_timestamp.clone().map(|time| time.0), commit.namespace(), commit.name_any())
    });
    if let Some(format) = args.print.output.and_then(Format::of_objects) {
        return output::objects(&commits, format);
    }
    if commits.is_empty() {
        eprintln!("nothing waits for you{}", if args.all { "" } else { "; --all shows also what you have decided on" });
        return Ok(());
    }
    let wide = args.print.output == Some(Format::Wide);
    let mut header = vec!["COMMIT", "SESSION", "TO", "BY", "STATE", "APPROVALS", "MINE", "AGE"];
    if wide {
        header.extend(["SOURCE", "MISSING", "TREE", "MESSAGE"]);
    }
    if namespaces {
        header.insert(0, "NAMESPACE");
    }
    let rows: Vec<_> = commits.iter().map(|commit| row(commit, me.as_deref(), &approvals, namespaces, wide)).collect();
    output::print(&output::table(&header, &rows))
}

async fn here(cluster: &Cluster) -> Result<Vec<AetherCommit>> {
    let list = cluster.api::<AetherCommit>().list(&ListParams::default()).await;
    Ok(list.map_err(|error| explain(error, "list commits"))?.items)
}

/// What the caller has said of the commit's present tree.
fn mine<'a>(commit: &AetherCommit, me: Option<&str>, approvals: &'a [AetherApproval]) -> Option<&'a AetherApproval> {
    let name = names::approval_name(&commit.name_any(), me?);
    approvals.iter().find(|approval| {
        approval.namespace() == commit.namespace()
            && approval.name_any() == name
            && Some(approval.spec.root.as_str()) == root_of(commit)
    })
}

/// Whether the caller has something to say of it.
fn waits(commit: &AetherCommit, me: Option<&str>, approvals: &[AetherApproval], all: bool) -> bool {
    let phase = commit.status.as_ref().and_then(|status| status.phase);
    if all {
        return matches!(phase, Some(CommitPhase::AwaitingApproval | CommitPhase::Rejected));
    }
    phase == Some(CommitPhase::AwaitingApproval)
        && mine(commit, me, approvals).is_none()
        && (me.is_none() || requester(commit) != me)
}

fn row(
    commit: &AetherCommit,
    me: Option<&str>,
    approvals: &[AetherApproval],
    namespaces: bool,
    wide: bool,
) -> Vec<String> {
    let status = commit.status.clone().unwrap_or_default();
    let counted = status.approvals.clone().unwrap_or_default();
    let mut row = vec![
        commit.name_any(),
        or_dash(session_of(commit)),
        printable(&target(&commit.spec.target)),
        or_dash(requester(commit).map(printable)),
        phase(commit).into(),
        format!("{}/{}", counted.have, counted.need),
        or_dash(mine(commit, me, approvals).map(|approval| format!("{:?}", approval.spec.decision))),
        age(commit.metadata.creation_timestamp.as_ref()),
    ];
    if wide {
        row.extend([
            or_dash(status.source.map(|source| format!("{}/{}", source.namespace, source.name))),
            printable(&counted.missing.join("; ")),
            or_dash(status.root),
            or_dash(commit.spec.target.git.as_ref().map(|git| first_line(&git.message))),
        ]);
    }
    if namespaces {
        row.insert(0, commit.namespace().unwrap_or_default());
    }
    row
}

#[cfg(test)]
mod tests {
    use aether_api::identity::Identity;
    use aether_api::{AetherApprovalSpec, AetherCommitSpec, AetherCommitStatus};

    use super::*;

    fn commit(by: &str, phase: CommitPhase) -> AetherCommit {
        let requested_by = Some(Identity { username: by.into(), ..Default::default() });
        let mut commit = AetherCommit::new("c", AetherCommitSpec { requested_by, ..Default::default() });
        commit.metadata.namespace = Some("demo".into());
        commit.status = Some(AetherCommitStatus { phase: Some(phase), root: Some("r".into()), ..Default::default() });
        commit
    }

    fn approval(by: &str, root: &str) -> AetherApproval {
        let spec = AetherApprovalSpec { commit: "c".into(), root: root.into(), ..Default::default() };
        let mut approval = AetherApproval::new(&names::approval_name("c", by), spec);
        approval.metadata.namespace = Some("demo".into());
        approval
    }

    #[test]
    fn what_waits_is_what_nobody_but_i_can_say() {
        let waiting = commit("bot", CommitPhase::AwaitingApproval);
        assert!(waits(&waiting, Some("ada"), &[], false));
        assert!(waits(&waiting, Some("ada"), &[approval("eve", "r")], false));
        assert!(!waits(&waiting, Some("ada"), &[approval("ada", "r")], false), "it is decided on");
        assert!(waits(&waiting, Some("ada"), &[approval("ada", "older")], false), "of another tree it says nothing");
        assert!(!waits(&waiting, Some("bot"), &[], false), "one's own work");
        assert!(!waits(&commit("bot", CommitPhase::Running), Some("ada"), &[], false));
        assert!(waits(&commit("bot", CommitPhase::Rejected), Some("bot"), &[], true));
        assert!(waits(&waiting, None, &[approval("ada", "r")], false));
        let mut other = approval("ada", "r");
        other.metadata.namespace = Some("other".into());
        assert!(waits(&waiting, Some("ada"), &[other], false));
    }
}
