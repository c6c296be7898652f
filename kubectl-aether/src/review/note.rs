//! `note`: remarks on lines. Where the lines are in the session's head says the aggregated API, which has the contents.

use aether_api::note::Lines;
use aether_api::{AetherCheckpoint, AetherCommit, AetherNote, AetherNoteSpec, AetherSession, names};
use anyhow::{Context, Result, anyhow, bail};
use kube::ResourceExt;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use serde::Deserialize;
use serde_json::json;

use crate::cli::{Format, NoteAction, NoteAdd, NoteList, NoteName};
use crate::cluster::{Cluster, explain};
use crate::diff::review_error;
use crate::kinds::Kind;
use crate::output::{self, age, first_line, or_dash, printable, table};

use super::{place, range, session_of_checkpoint};

pub(crate) async fn note(cluster: &Cluster, action: &NoteAction) -> Result<()> {
    match action {
        NoteAction::Add(args) => add(cluster, args).await,
        NoteAction::List(args) => list(cluster, args).await,
        NoteAction::Resolve(args) => set(cluster, args, true).await,
        NoteAction::Reopen(args) => set(cluster, args, false).await,
    }
}

/// A file of a checkpoint, as the aggregated API describes it.
#[derive(Debug, Deserialize)]
struct File {
    digest: String,
    /// How many lines it has; nothing of what is no text.
    lines: Option<u32>,
}

/// Where the lines of a note are in a session's head.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub(super) struct Placed {
    note: String,
    state: String,
    from: Option<u32>,
    to: Option<u32>,
    reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Placings {
    items: Vec<Placed>,
}

/// Where the aggregated API serves something of the namespace.
pub(super) fn path(cluster: &Cluster, rest: &str) -> String {
    format!("/apis/{}/{}/namespaces/{}/{rest}", names::REVIEW_GROUP, names::VERSION, cluster.namespace)
}

async fn add(cluster: &Cluster, args: &NoteAdd) -> Result<()> {
    let (stem, checkpoint) = match args.object.split_once('/') {
        Some((kind, name)) if Kind::of(kind) == Some(Kind::Checkpoint) => {
            (name, cluster.find::<AetherCheckpoint>(name).await?.name_any())
        }
        Some((kind, name)) if Kind::of(kind) == Some(Kind::Commit) => (name, of_commit(cluster, name).await?),
        Some(_) => bail!("{:?} has no files to remark on: say COMMIT or checkpoint/NAME", args.object),
        None => (args.object.as_str(), of_commit(cluster, &args.object).await?),
    };
    let place = &args.place;
    let query = url::form_urlencoded::Serializer::new(String::new()).append_pair("path", &place.path).finish();
    let request =
        http::Request::get(path(cluster, &format!("checkpoints/{checkpoint}/file?{query}"))).body(Vec::new())?;
    let file: File = cluster
        .client
        .request(request)
        .await
        .map_err(|error| review_error(error, &format!("read {} of checkpoint {checkpoint}", place.path)))?;
    if let Some((_, to)) = place.lines {
        match file.lines {
            None => bail!("{} is no text of reasonable size, so it has no lines: leave them out", place.path),
            Some(lines) if to > lines => bail!("{} has only {lines} lines", place.path),
            Some(_) => {}
        }
    }
    let spec = AetherNoteSpec {
        checkpoint,
        path: place.path.clone(),
        lines: place.lines.map(|(from, to)| Lines { from, to }),
        digest: Some(file.digest),
        text: args.message.clone(),
        ..Default::default()
    };
    let mut wanted = AetherNote::new("", spec);
    wanted.metadata.name = None;
    wanted.metadata.generate_name = Some(format!("{stem}-"));
    let made = cluster.api().create(&PostParams::default(), &wanted).await;
    let made = made.map_err(|error| explain(error, "make a note"))?;
    match args.print.output {
        Some(format) => output::object(&made, format),
        None => output::print(&format!("note {} on {}\n", made.name_any(), super::place(&made.spec))),
    }
}

async fn of_commit(cluster: &Cluster, name: &str) -> Result<String> {
    let commit: AetherCommit = cluster.find(name).await?;
    let checkpoint = commit.spec.checkpoint.or(commit.status.and_then(|status| status.checkpoint));
    checkpoint.ok_or_else(|| anyhow!("commit {name} has no checkpoint yet: it is on its way to the store"))
}

/// Asks where the lines of all notes of a session are in its head.
pub(super) async fn places(cluster: &Cluster, session: &str) -> Result<Vec<Placed>> {
    let request = http::Request::get(path(cluster, &format!("sessions/{session}/notes"))).body(Vec::new())?;
    let placings: Placings = cluster
        .client
        .request(request)
        .await
        .map_err(|error| review_error(error, &format!("ask where the notes of session {session} are")))?;
    Ok(placings.items)
}

async fn list(cluster: &Cluster, args: &NoteList) -> Result<()> {
    let notes = cluster.api::<AetherNote>().list(&ListParams::default()).await;
    let mut notes = notes.map_err(|error| explain(error, "list notes"))?.items;
    let mut placed = Vec::new();
    if let Some(session) = &args.session {
        let checkpoints = cluster.api::<AetherCheckpoint>().list(&ListParams::default()).await;
        let checkpoints = checkpoints.map_err(|error| explain(error, "list checkpoints"))?.items;
        notes.retain(|note| session_of_checkpoint(&note.spec.checkpoint, &checkpoints) == Some(session));
        if notes.is_empty() {
            // Without either, the name is wrong.
            cluster.find::<AetherSession>(session).await?;
        } else if args.print.output.is_none_or(|format| format == Format::Wide) {
            match places(cluster, session).await {
                Ok(places) => placed = places,
                Err(error) => eprintln!("where the lines are now is not shown: {error:#}"),
            }
        }
    }
    notes.retain(|note| args.all || !note.spec.resolved);
    if let Some(format) = args.print.output.and_then(Format::of_objects) {
        return output::objects(&notes, format);
    }
    if notes.is_empty() {
        eprintln!("no {}notes", if args.all { "" } else { "open " });
        return Ok(());
    }
    output::print(&listing(&notes, &placed, "", args.print.output == Some(Format::Wide)))
}

/// Notes as a table, the oldest first.
pub(super) fn listing(notes: &[AetherNote], placed: &[Placed], indent: &str, wide: bool) -> String {
    let mut notes: Vec<&AetherNote> = notes.iter().collect();
    notes.sort_by_key(|note| (note.metadata.creation_timestamp.clone().map(|time| time.0), note.name_any()));
    let name = format!("{indent}NOTE");
    let mut header = vec![name.as_str(), "PLACE", "NOW", "STATE", "BY", "AGE", "TEXT"];
    if wide {
        header.extend(["CHECKPOINT", "DIGEST"]);
    }
    let rows: Vec<_> = notes
        .iter()
        .map(|note| {
            let name = note.name_any();
            let mut row = vec![
                format!("{indent}{name}"),
                printable(&place(&note.spec)),
                or_dash(placed.iter().find(|placed| placed.note == name).map(now)),
                if note.spec.resolved { "resolved" } else { "open" }.into(),
                or_dash(note.spec.author.as_ref().map(|by| printable(&by.username))),
                age(note.metadata.creation_timestamp.as_ref()),
                first_line(&note.spec.text),
            ];
            if wide {
                row.extend([note.spec.checkpoint.clone(), or_dash(note.spec.digest.as_ref())]);
            }
            row
        })
        .collect();
    table(&header, &rows)
}

/// Where the lines are now, in a word or two.
fn now(placed: &Placed) -> String {
    match (placed.state.as_str(), placed.from, placed.to) {
        ("Same", ..) => "same".into(),
        ("Moved", Some(line), Some(to)) if line == to => format!("line {line}"),
        ("Moved", Some(from), Some(to)) => format!("lines {}", range(from, to)),
        ("Changed", ..) => "changed".into(),
        ("Gone", ..) => "gone".into(),
        _ => {
            format!("unknown{}", placed.reason.as_ref().map(|why| format!(": {}", printable(why))).unwrap_or_default())
        }
    }
}

async fn set(cluster: &Cluster, args: &NoteName, resolved: bool) -> Result<()> {
    let api = cluster.api::<AetherNote>();
    let mut failed = None;
    for name in &args.names {
        let patch = Patch::Merge(json!({"spec": {"resolved": resolved}}));
        let word = if resolved { "resolved" } else { "reopened" };
        match api.patch(name, &PatchParams::default(), &patch).await {
            Ok(_) => output::print(&format!("note {name} {word}\n"))?,
            Err(kube::Error::Api(status)) if status.is_not_found() => {
                let error = anyhow!("{}", cluster.not_found::<AetherNote>(name).await);
                failed.get_or_insert(error);
            }
            Err(error) => {
                failed.get_or_insert(explain(error, &format!("change note {name}")));
            }
        }
    }
    failed.map_or(Ok(()), |error| Err(error).context("not all notes were changed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_says_where_lines_are_now() {
        let note = |name: &str, resolved| {
            let lines = Some(Lines { from: 2, to: 4 });
            let spec =
                AetherNoteSpec { path: "a".into(), lines, text: "one\ntwo".into(), resolved, ..Default::default() };
            AetherNote::new(name, spec)
        };
        let placed = |note: &str, state: &str, from| Placed {
            note: note.into(),
            state: state.into(),
            from,
            to: from,
            reason: Some("no head".into()),
        };
        let placed = [placed("n1", "Moved", Some(9)), placed("n2", "Gone", None), placed("n3", "Unknown", None)];
        let text = listing(&[note("n1", false), note("n2", true), note("n3", false)], &placed, "", false);
        let rows: Vec<&str> = text.lines().collect();
        assert!(rows[1].contains("a:2-4") && rows[1].contains("line 9") && rows[1].ends_with("one"), "{text}");
        assert!(rows[2].contains("gone") && rows[2].contains("resolved"), "{text}");
        assert!(rows[3].contains("unknown: no head"), "{text}");
    }
}
