//! `show`: all that a reviewer wants to know of a commit, in the order in which they ask.

use aether_api::{AetherApproval, AetherCheckpoint, AetherCommand, AetherCommit, AetherNote, conditions};
use anyhow::Result;
use kube::ResourceExt;
use kube::api::ListParams;

use crate::cli::Show;
use crate::cluster::Cluster;
use crate::describe::{Fields, commit, words};
use crate::diff;
use crate::output::{age, first_line, or_dash, print, printable, table};
use crate::wait::{Deadline, in_words};

use super::{note, root_of, session_of, session_of_checkpoint, short, undecided};

/// How long the files may take to come.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

pub(crate) async fn show(cluster: &Cluster, args: &Show) -> Result<()> {
    let it: AetherCommit = cluster.find(&args.commit).await?;
    let everything = ListParams::default();
    let (approvals, commands, checkpoints, notes) = (
        cluster.api::<AetherApproval>(),
        cluster.api::<AetherCommand>(),
        cluster.api::<AetherCheckpoint>(),
        cluster.api::<AetherNote>(),
    );
    let (approvals, commands, checkpoints, notes) = tokio::join!(
        approvals.list(&everything),
        commands.list(&everything),
        checkpoints.list(&everything),
        notes.list(&everything)
    );
    // What one may not list is left out.
    let approvals = approvals.map(|list| list.items).unwrap_or_default();
    let commands = commands.map(|list| list.items).unwrap_or_default();
    let checkpoints = checkpoints.map(|list| list.items).unwrap_or_default();
    let notes = notes.map(|list| list.items).unwrap_or_default();

    let mut out = Fields::of(&it.metadata);
    commit(&it, &mut out);
    let mut text = out.0;
    let conditions = it.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    for failed in
        conditions.iter().filter(|condition| condition.type_ == conditions::FAILED && condition.status == "True")
    {
        text += &format!("Failed:\n  {}\n", printable(&in_words(failed)));
    }
    text += &decisions(&it, &approvals);
    text += &checks(&it, &commands, &checkpoints);
    if let Some(session) = session_of(&it) {
        let mut notes: Vec<AetherNote> = notes;
        notes.retain(|note| session_of_checkpoint(&note.spec.checkpoint, &checkpoints) == Some(session));
        let places =
            if notes.is_empty() { Vec::new() } else { note::places(cluster, session).await.unwrap_or_default() };
        let listed = note::listing(&notes, &places, "  ", false);
        if !listed.is_empty() {
            text += &format!("\nNotes:\n{listed}");
        }
    }
    if !args.no_files {
        let color = if args.color.wanted() { "--color=always" } else { "--color=never" };
        text += &match files(cluster, &args.commit, color).await {
            Ok(files) if files.is_empty() => "\nFiles: nothing changed\n".into(),
            Ok(files) => format!("\nFiles:\n{files}"),
            Err(error) => format!("\nFiles: not shown: {error:#}\n"),
        };
    }
    if undecided(&it) && root_of(&it).is_some() {
        let name = &args.commit;
        text += &format!(
            "\n`kubectl aether diff commit/{name}` shows the lines; `kubectl aether approve {name}` or `reject {name} -m WHY` decides\n"
        );
    }
    print(&text)
}

async fn files(cluster: &Cluster, name: &str, color: &str) -> Result<String> {
    let repository = diff::of_commit(cluster, name, Deadline::after(PATIENCE)).await?;
    repository.text(&["--stat=100", "--summary", color]).await
}

/// What was said of the commit, and whether it counts.
fn decisions(it: &AetherCommit, approvals: &[AetherApproval]) -> String {
    let name = it.name_any();
    let rows: Vec<_> = approvals
        .iter()
        .filter(|approval| approval.spec.commit == name)
        .map(|approval| {
            let status = approval.status.clone();
            vec![
                format!("  {}", or_dash(approval.spec.reviewer.as_ref().map(|by| printable(&by.username)))),
                format!("{:?}", approval.spec.decision),
                match &status {
                    None => "not yet counted".into(),
                    Some(status) if status.counts => "yes".into(),
                    Some(status) => {
                        format!("no: {}", printable(status.reason.as_deref().unwrap_or("it does not say why")))
                    }
                },
                short(&approval.spec.root),
                age(approval.metadata.creation_timestamp.as_ref()),
                or_dash(approval.spec.text.as_deref().map(first_line)),
            ]
        })
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    format!("\nDecisions:\n{}", table(&["  REVIEWER", "DECISION", "COUNTS", "TREE", "AGE", "TEXT"], &rows))
}

/// Commands that left exactly the commit's tree.
fn checks(it: &AetherCommit, commands: &[AetherCommand], checkpoints: &[AetherCheckpoint]) -> String {
    let Some(root) = root_of(it) else { return String::new() };
    let left = |command: &AetherCommand| {
        let name = command.status.as_ref()?.checkpoint.as_deref()?;
        let checkpoint = checkpoints.iter().find(|checkpoint| checkpoint.name_any() == name)?;
        checkpoint.status.as_ref()?.root.clone()
    };
    let rows: Vec<_> = commands
        .iter()
        .filter(|command| left(command).as_deref() == Some(root))
        .map(|command| {
            let status = command.status.clone().unwrap_or_default();
            vec![
                format!("  {}", command.name_any()),
                or_dash(status.phase),
                or_dash(status.exit_code),
                age(command.metadata.creation_timestamp.as_ref()),
                printable(&words(&command.spec.command)),
            ]
        })
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    format!("\nCommands that left exactly this tree:\n{}", table(&["  NAME", "PHASE", "EXIT", "AGE", "COMMAND"], &rows))
}
