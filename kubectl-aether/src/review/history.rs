//! `log`: what became of a session, in the order in which it happened. What was said of its commits and taken back is in the audit
//! log alone.

use std::collections::BTreeMap;

use aether_api::{AetherApproval, AetherCheckpoint, AetherCommit, AetherNote, AetherRestore, AetherSession, names};
use anyhow::{Result, bail};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use kube::api::ListParams;
use serde::Deserialize;

use crate::cli::Log;
use crate::cluster::{Cluster, explain};
use crate::diff::review_error;
use crate::output::{first_line, print, printable, table};

use super::note::path;
use super::{phase, place, requester, session_of, session_of_checkpoint, short, target};

/// Kinds of things that happen. The cluster tells time in whole seconds: within one they come in this order, those about a commit
/// that was asked for earlier first.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Order {
    Made,
    Kept,
    Restored,
    Asked,
    Remarked,
    Decided,
    Withdrawn,
    Released,
    Ended,
}

/// One thing that happened.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Happening {
    time: Timestamp,
    /// When that was asked for which it is about.
    round: Timestamp,
    order: Order,
    what: String,
    who: String,
    text: String,
}

/// A line of the audit log, as far as it is told here.
#[derive(Debug, Deserialize)]
struct Line {
    time: Timestamp,
    actor: String,
    verb: String,
    object: About,
    root: Option<String>,
}

/// What a line is about.
#[derive(Debug, Deserialize)]
struct About {
    kind: String,
    uid: String,
}

#[derive(Debug, Deserialize)]
struct Lines {
    items: Vec<Line>,
}

/// The lines of the audit log on a commit.
async fn lines(cluster: &Cluster, commit: &str) -> Result<Vec<Line>> {
    let request = http::Request::get(path(cluster, &format!("commits/{commit}/audit"))).body(Vec::new())?;
    let lines: kube::Result<Lines> = cluster.client.request(request).await;
    Ok(lines.map_err(|error| review_error(error, &format!("read the audit log on commit {commit}")))?.items)
}

pub(crate) async fn log(cluster: &Cluster, args: &Log) -> Result<()> {
    let everything = ListParams::default();
    let session = cluster.api::<AetherSession>().get_opt(&args.session).await;
    let session = session.map_err(|error| explain(error, &format!("read session {}", args.session)))?;
    let (checkpoints, restores, commits, approvals, notes) = (
        cluster.api::<AetherCheckpoint>(),
        cluster.api::<AetherRestore>(),
        cluster.api::<AetherCommit>(),
        cluster.api::<AetherApproval>(),
        cluster.api::<AetherNote>(),
    );
    let (checkpoints, restores, commits, approvals, notes) = tokio::join!(
        checkpoints.list(&everything),
        restores.list(&everything),
        commits.list(&everything),
        approvals.list(&everything),
        notes.list(&everything),
    );
    let mut hidden = Vec::new();
    let approvals_shown = approvals.is_ok();
    let mut objects = Objects {
        approvals_shown,
        lines: BTreeMap::new(),
        checkpoints: checkpoints.map_err(|error| explain(error, "list checkpoints"))?.items,
        restores: listed(restores, "restores", &mut hidden),
        commits: listed(commits, "commits", &mut hidden),
        approvals: listed(approvals, "approvals", &mut hidden),
        notes: listed(notes, "notes", &mut hidden),
    };
    if !hidden.is_empty() {
        eprintln!("you may not list {}: they are left out", hidden.join(", "));
    }
    let names: Vec<String> = objects.commits_of(&args.session).map(|commit| commit.name_any()).collect();
    for name in names {
        match lines(cluster, &name).await {
            Ok(lines) => drop(objects.lines.insert(name, lines)),
            Err(error) => {
                eprintln!("{error:#}: what was withdrawn is left out");
                break;
            }
        }
    }
    let happened = objects.of(&args.session, session.as_ref());
    if happened.is_empty() {
        bail!("{}", cluster.not_found::<AetherSession>(&args.session).await);
    }
    let rows: Vec<_> = happened
        .into_iter()
        .map(|it| vec![it.time.strftime("%Y-%m-%d %H:%M:%SZ").to_string(), it.what, it.who, it.text])
        .collect();
    print(&table(&["TIME", "WHAT", "WHO", ""], &rows))
}

fn listed<K: Clone>(
    list: kube::Result<kube::core::ObjectList<K>>,
    what: &'static str,
    hidden: &mut Vec<&str>,
) -> Vec<K> {
    match list {
        Ok(list) => list.items,
        Err(_) => {
            hidden.push(what);
            Vec::new()
        }
    }
}

/// All that may have to do with a session.
struct Objects {
    checkpoints: Vec<AetherCheckpoint>,
    restores: Vec<AetherRestore>,
    commits: Vec<AetherCommit>,
    approvals: Vec<AetherApproval>,
    /// Whether these are all.
    approvals_shown: bool,
    notes: Vec<AetherNote>,
    /// Of the audit log, by commit.
    lines: BTreeMap<String, Vec<Line>>,
}

impl Objects {
    /// The commits of a session.
    fn commits_of<'a>(&'a self, session: &'a str) -> impl Iterator<Item = &'a AetherCommit> {
        let checkpoint_of = |commit: &'a AetherCommit| {
            let checkpoint = commit.spec.checkpoint.as_deref()?;
            session_of_checkpoint(checkpoint, &self.checkpoints)
        };
        self.commits.iter().filter(move |commit| session_of(commit).or_else(|| checkpoint_of(commit)) == Some(session))
    }

    fn of(&self, name: &str, session: Option<&AetherSession>) -> Vec<Happening> {
        let mut happened = Vec::new();
        let mut tell =
            |round: Option<&Time>, time: Option<&Time>, order, what: String, who: Option<&str>, text: String| {
                if let Some(time) = time {
                    let (round, who) = (round.unwrap_or(time).0, who.map(printable).unwrap_or_default());
                    happened.push(Happening { time: time.0, round, order, what, who, text: printable(&text) });
                }
            };
        if let Some(session) = session {
            let made = session.metadata.creation_timestamp.as_ref();
            let by = creator(session.annotations());
            tell(
                None,
                made,
                Order::Made,
                format!("session {name}"),
                by.as_deref(),
                format!("from {}", crate::get::origin(session, false)),
            );
        }
        // One that was taken for a commit is told with the commit.
        let told_later = |checkpoint: &AetherCheckpoint| {
            self.commits.iter().any(|commit| {
                let taken = commit.status.as_ref().and_then(|status| status.checkpoint.as_ref());
                commit.spec.session.is_some() && taken == checkpoint.metadata.name.as_ref()
            })
        };
        for checkpoint in self.checkpoints.iter().filter(|it| it.spec.session == name && !told_later(it)) {
            let status = checkpoint.status.clone().unwrap_or_default();
            let time = status.local_time.as_ref().or(checkpoint.metadata.creation_timestamp.as_ref());
            let text = [
                status.root.as_deref().map(|root| format!("tree {}", short(root))),
                status.changed_files.map(|files| format!("{files} changed files")),
                checkpoint.labels().get(names::ORIGIN_LABEL).cloned(),
                checkpoint.spec.message.as_deref().map(first_line),
            ];
            let text = text.into_iter().flatten().collect::<Vec<_>>().join(", ");
            let by = creator(checkpoint.annotations());
            tell(None, time, Order::Kept, format!("checkpoint {}", checkpoint.name_any()), by.as_deref(), text);
        }
        for restore in self.restores.iter().filter(|restore| restore.spec.session == name) {
            let text = format!("to checkpoint {}", restore.spec.checkpoint);
            let (made, what) =
                (restore.metadata.creation_timestamp.as_ref(), format!("restore {}", restore.name_any()));
            tell(None, made, Order::Restored, what, None, text);
        }
        for commit in self.commits_of(name) {
            let (id, status) = (commit.name_any(), commit.status.clone().unwrap_or_default());
            let asked = commit.metadata.creation_timestamp.as_ref();
            let text = [
                Some(format!("to {}", target(&commit.spec.target))),
                status.root.as_deref().map(|root| format!("tree {}", short(root))),
            ];
            let text = text.into_iter().flatten().collect::<Vec<_>>().join(", ");
            tell(asked, asked, Order::Asked, format!("commit {id}"), requester(commit), text);
            let by = status.approvals.map(|approvals| approvals.by.join(", ")).filter(|by| !by.is_empty());
            let by = by.map(|by| format!("approved by {by}")).unwrap_or_default();
            tell(asked, status.started.as_ref(), Order::Released, format!("commit {id} released"), None, by);
            let result = status.commit.map(|id| format!("git commit {id}"));
            let result = result.or(status.revision.map(|revision| format!("revision {revision}")));
            let result = result.or(status.place.map(|place| format!("at {place}")));
            let end = format!("commit {id} {}", phase(commit).to_lowercase());
            tell(asked, status.finished.as_ref(), Order::Ended, end, None, result.unwrap_or_default());
            for approval in self.approvals.iter().filter(|approval| approval.spec.commit == id) {
                let done = match approval.spec.decision {
                    aether_api::approval::Decision::Approve => "approved",
                    aether_api::approval::Decision::Reject => "rejected",
                };
                let void = approval.status.as_ref().filter(|status| !status.counts);
                let void =
                    void.map(|status| format!("does not count: {}", status.reason.as_deref().unwrap_or_default()));
                let tree = format!("tree {}", short(&approval.spec.root));
                let text = [Some(tree), approval.spec.text.as_deref().map(first_line), void];
                let who = approval.spec.reviewer.as_ref().map(|by| by.username.as_str());
                let text = text.into_iter().flatten().collect::<Vec<_>>().join(", ");
                let made = approval.metadata.creation_timestamp.as_ref();
                tell(asked, made, Order::Decided, format!("commit {id} {done}"), who, text);
            }
            // What was said and is not there any more, and who took it back.
            let said = self
                .lines
                .get(&id)
                .map_or(&[][..], Vec::as_slice)
                .iter()
                .filter(|line| line.object.kind == "AetherApproval");
            for line in said.clone() {
                let (time, who) = (Time(line.time), Some(line.actor.as_str()));
                let tree = format!("tree {}", short(line.root.as_deref().unwrap_or_default()));
                let is_there = self.approvals.iter().any(|there| there.uid().as_ref() == Some(&line.object.uid));
                if line.verb == "Withdrawn" {
                    let before =
                        said.clone().find(|other| other.object.uid == line.object.uid && other.verb != "Withdrawn");
                    let text = before.map(|it| format!("what {} had said: {}", it.actor, it.verb.to_lowercase()));
                    let text = text.unwrap_or_default();
                    tell(asked, Some(&time), Order::Withdrawn, format!("commit {id} decision withdrawn"), who, text);
                } else if !is_there {
                    let what = format!("commit {id} {}", line.verb.to_lowercase());
                    let mut after = said.clone().filter(|other| other.object.uid == line.object.uid);
                    let since = match after.any(|other| other.verb == "Withdrawn") {
                        true => ", withdrawn since",
                        false if self.approvals_shown => ", its object is gone",
                        false => "",
                    };
                    tell(asked, Some(&time), Order::Decided, what, who, format!("{tree}{since}"));
                }
            }
        }
        for note in &self.notes {
            if session_of_checkpoint(&note.spec.checkpoint, &self.checkpoints) != Some(name) {
                continue;
            }
            let resolved = if note.spec.resolved { " (resolved)" } else { "" };
            let text = format!("{}: {}{resolved}", place(&note.spec), first_line(&note.spec.text));
            let who = note.spec.author.as_ref().map(|by| by.username.as_str());
            let (made, what) = (note.metadata.creation_timestamp.as_ref(), format!("note {}", note.name_any()));
            let about = self.commits.iter().find(|commit| {
                let taken = commit.status.as_ref().and_then(|status| status.checkpoint.as_ref());
                commit.spec.checkpoint.as_ref().or(taken) == Some(&note.spec.checkpoint)
            });
            let asked = about.and_then(|commit| commit.metadata.creation_timestamp.as_ref());
            tell(asked, made, Order::Remarked, what, who, text);
        }
        happened.sort();
        happened
    }
}

/// Who made a session or checkpoint, as the operator wrote it down.
fn creator(annotations: &std::collections::BTreeMap<String, String>) -> Option<String> {
    let value: serde_json::Value = serde_json::from_str(annotations.get(names::CREATOR_ANNOTATION)?).ok()?;
    value.pointer("/by/username")?.as_str().map(Into::into)
}

#[cfg(test)]
mod tests {
    use aether_api::commit::GitTarget;
    use aether_api::{AetherApprovalSpec, AetherCheckpointSpec, AetherCommitSpec, AetherCommitStatus, AetherNoteSpec};

    use super::*;

    fn time(second: i64) -> Option<Time> {
        Some(Time(Timestamp::from_second(second).unwrap()))
    }

    #[test]
    fn what_happened_is_told_in_order_and_of_this_session_only() {
        let mut checkpoint =
            AetherCheckpoint::new("k", AetherCheckpointSpec { session: "s".into(), ..Default::default() });
        checkpoint.metadata.creation_timestamp = time(1);
        let mut other = AetherCheckpoint::new("o", AetherCheckpointSpec { session: "t".into(), ..Default::default() });
        other.metadata.creation_timestamp = time(1);
        let mut spec = AetherCommitSpec { checkpoint: Some("k".into()), ..Default::default() };
        spec.target.git = Some(GitTarget { branch: "b".into(), ..Default::default() });
        let mut commit = AetherCommit::new("c", spec);
        commit.metadata.creation_timestamp = time(2);
        commit.status = Some(AetherCommitStatus {
            phase: Some(aether_api::commit::CommitPhase::Succeeded),
            started: time(5),
            finished: time(6),
            commit: Some("f00".into()),
            ..Default::default()
        });
        let mut export = commit.clone();
        export.metadata.name = Some("e".into());
        export.metadata.creation_timestamp = time(7);
        if let Some(status) = &mut export.status {
            (status.commit, status.place, status.started, status.finished) =
                (None, Some("data/e".into()), None, time(8));
        }
        let mut approval = AetherApproval::new(
            "c.x",
            AetherApprovalSpec { commit: "c".into(), root: "r".into(), ..Default::default() },
        );
        approval.metadata.creation_timestamp = time(4);
        let mut note = AetherNote::new(
            "n",
            AetherNoteSpec { checkpoint: "k".into(), path: "a".into(), text: "why\x1b?".into(), ..Default::default() },
        );
        note.metadata.creation_timestamp = time(3);
        let mut foreign = note.clone();
        foreign.spec.checkpoint = "o".into();
        let objects = Objects {
            checkpoints: vec![checkpoint, other],
            restores: vec![],
            commits: vec![commit, export],
            approvals: vec![approval],
            approvals_shown: true,
            notes: vec![note, foreign],
            lines: BTreeMap::new(),
        };
        let happened = objects.of("s", None);
        let whats: Vec<&str> = happened.iter().map(|it| it.what.as_str()).collect();
        assert_eq!(
            whats,
            [
                "checkpoint k",
                "commit c",
                "note n",
                "commit c approved",
                "commit c released",
                "commit c succeeded",
                "commit e",
                "commit e succeeded"
            ]
        );
        assert_eq!(happened[2].text, "a: why\u{fffd}?");
        assert_eq!((happened[5].text.as_str(), happened[7].text.as_str()), ("git commit f00", "at data/e"));
        assert!(objects.of("nobody", None).is_empty());
    }

    #[test]
    fn what_was_withdrawn_is_told_from_the_audit_log() {
        let commit = AetherCommit::new("c", AetherCommitSpec { session: Some("s".into()), ..Default::default() });
        let spec = AetherApprovalSpec { commit: "c".into(), root: "r".into(), ..Default::default() };
        let mut approval = AetherApproval::new("c.x", spec);
        (approval.metadata.creation_timestamp, approval.metadata.uid) = (time(3), Some("there".into()));
        let line = |second, actor: &str, verb: &str, kind: &str, uid: &str| Line {
            time: Timestamp::from_second(second).unwrap(),
            actor: actor.into(),
            verb: verb.into(),
            object: About { kind: kind.into(), uid: uid.into() },
            root: Some("r".into()),
        };
        let lines = vec![
            line(0, "ada", "Requested", "AetherCommit", "c"),
            line(1, "jane", "Rejected", "AetherApproval", "gone"),
            line(2, "paula", "Withdrawn", "AetherApproval", "gone"),
            line(3, "jane", "Approved", "AetherApproval", "there"),
            line(4, "joe", "Approved", "AetherApproval", "lost"),
        ];
        let objects = Objects {
            checkpoints: vec![],
            restores: vec![],
            commits: vec![commit],
            approvals: vec![approval],
            approvals_shown: true,
            notes: vec![],
            lines: BTreeMap::from([("c".to_owned(), lines)]),
        };
        let told: Vec<String> =
            objects.of("s", None).iter().map(|it| format!("{} by {}: {}", it.what, it.who, it.text)).collect();
        assert_eq!(
            told,
            [
                "commit c rejected by jane: tree r, withdrawn since",
                "commit c decision withdrawn by paula: what jane had said: rejected",
                "commit c approved by : tree r",
                "commit c approved by joe: tree r, its object is gone"
            ]
        );
    }

    #[test]
    fn a_commit_of_a_session_is_told_with_its_checkpoint_and_a_second_in_its_order() {
        let mut checkpoint =
            AetherCheckpoint::new("c", AetherCheckpointSpec { session: "s".into(), ..Default::default() });
        checkpoint.metadata.creation_timestamp = time(1);
        let mut commit = AetherCommit::new("c", AetherCommitSpec { session: Some("s".into()), ..Default::default() });
        commit.metadata.creation_timestamp = time(1);
        let (root, checkpoint_name) = (Some("abc/7".into()), Some("c".into()));
        commit.status = Some(AetherCommitStatus { root, checkpoint: checkpoint_name, ..Default::default() });
        let decision = AetherApprovalSpec { commit: "c".into(), root: "abc/7".into(), ..Default::default() };
        let mut approval = AetherApproval::new("c.x", decision);
        approval.metadata.creation_timestamp = time(2);
        let mut note = AetherNote::new("n", AetherNoteSpec { checkpoint: "c".into(), ..Default::default() });
        note.metadata.creation_timestamp = time(2);
        let mut objects = Objects {
            checkpoints: vec![checkpoint],
            restores: vec![],
            commits: vec![commit],
            approvals: vec![approval],
            approvals_shown: true,
            notes: vec![note],
            lines: BTreeMap::new(),
        };
        let whats = |objects: &Objects| -> Vec<String> {
            objects.of("s", None).iter().map(|it| format!("{}: {}", it.what, it.text)).collect()
        };
        let told = whats(&objects);
        assert_eq!(told[0], "commit c: to nowhere, tree abc/7");
        assert!(told[1].starts_with("note n") && told[2].starts_with("commit c approved"), "{told:?}");
        assert_eq!(told.len(), 3);
        // The next attempt, in the very second of the decision on the first.
        let mut second = AetherCommit::new("d", AetherCommitSpec { session: Some("s".into()), ..Default::default() });
        second.metadata.creation_timestamp = time(2);
        objects.commits.insert(0, second);
        assert!(whats(&objects)[3].starts_with("commit d:"), "{:?}", whats(&objects));
        // Its own record outlives that of the commit.
        objects.commits.clear();
        assert!(whats(&objects)[0].starts_with("checkpoint c"));
    }
}
