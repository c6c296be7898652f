//! `describe`: all about one object, in the order in which a person asks.

use std::fmt::{Debug, Write};

use aether_api::{
    AetherApproval, AetherCheckpoint, AetherCommand, AetherCommit, AetherNote, AetherRestore, AetherSession,
    AetherSource,
};
use anyhow::{Result, bail};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta, Time};
use kube::api::ListParams;
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;

use crate::cli::Describe;
use crate::cluster::{Cluster, explain};
use crate::kinds::{Kind, objects};
use crate::lineage::{Item, Style, lines, parent};
use crate::output::{age, bytes, frozen, or_dash, print, printable, table};

/// Events that are shown, the newest.
const EVENTS: usize = 20;
/// Commands that are shown with a session, the newest.
const COMMANDS: usize = 10;

pub(crate) async fn describe(cluster: &Cluster, args: &Describe) -> Result<()> {
    let objects = objects(&args.object)?;
    let [(kind, name)] = objects.as_slice() else { bail!("one object at a time: say NAME, KIND/NAME or KIND NAME") };
    let text = match kind {
        Kind::Session => session(cluster, name).await?,
        Kind::Checkpoint => {
            plain(cluster, name, checkpoint, |it| it.status.as_ref().map(|status| &status.conditions)).await?
        }
        Kind::Source => plain(cluster, name, source, |it| it.status.as_ref().map(|status| &status.conditions)).await?,
        Kind::Restore => {
            plain(cluster, name, restore, |it| it.status.as_ref().map(|status| &status.conditions)).await?
        }
        Kind::Command => {
            plain(cluster, name, command, |it| it.status.as_ref().map(|status| &status.conditions)).await?
        }
        Kind::Commit => plain(cluster, name, commit, |it| it.status.as_ref().map(|status| &status.conditions)).await?,
        Kind::Approval => plain(cluster, name, approval, |_| None).await?,
        Kind::Note => plain(cluster, name, note, |_| None).await?,
    };
    print(&text)
}

/// An object without relatives: its fields, conditions and events.
async fn plain<K>(
    cluster: &Cluster,
    name: &str,
    fields: impl Fn(&K, &mut Fields),
    conditions: impl Fn(&K) -> Option<&Vec<Condition>>,
) -> Result<String>
where
    K: Resource<Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
    K::DynamicType: Default,
{
    let object: K = cluster.find(name).await?;
    let mut out = Fields::of(object.meta());
    fields(&object, &mut out);
    let mut text = out.0;
    text += &conditions_table(conditions(&object).map(Vec::as_slice).unwrap_or_default());
    text += &events(cluster, object.meta()).await;
    Ok(text)
}

async fn session(cluster: &Cluster, name: &str) -> Result<String> {
    let it: AetherSession = cluster.find(name).await?;
    let everything = ListParams::default();
    let (sessions, checkpoints, commands) =
        (cluster.api::<AetherSession>(), cluster.api::<AetherCheckpoint>(), cluster.api::<AetherCommand>());
    let (sessions, checkpoints, commands) =
        tokio::join!(sessions.list(&everything), checkpoints.list(&everything), commands.list(&everything));
    let sessions = sessions.map_err(|error| explain(error, "list sessions"))?.items;
    // What one may not list is left out.
    let checkpoints = checkpoints.map(|list| list.items).unwrap_or_default();
    let mut commands = commands.map(|list| list.items).unwrap_or_default();

    let status = it.status.clone().unwrap_or_default();
    let mut out = Fields::of(&it.metadata);
    out.field("State", crate::get::state(&it));
    out.field("Started from", crate::get::origin(&it, parent(&it, &sessions, &checkpoints).is_none()));
    if let Some(base) = &status.base {
        out.field("Owner", format!("{}:{}", base.owner.uid, base.owner.gid));
        out.maybe("Base", base.root.as_ref());
    }
    if let Some(forked) = &status.forked_from {
        let at = forked.node.as_ref().map(|node| format!(" on node {node}")).unwrap_or_default();
        out.field(
            "Forked",
            format!("from {}{at}, {} ago, {:?}", forked.session, age(Some(&forked.time)), forked.consistency),
        );
        out.maybe("Parent stood still", forked.frozen_microseconds.map(frozen));
        out.field("Fork in the store", forked.durable);
    }
    if let Some(head) = &status.head {
        out.field("Head", format!("{} ({:?}, {} ago)", head.root, head.durability, age(Some(&head.time))));
    }
    match &status.attachment {
        Some(attachment) => match &attachment.node {
            Some(node) => out.field(
                "Mounted on",
                format!("{node}, for {} (epoch {})", age(attachment.since.as_ref()), attachment.epoch),
            ),
            None => out.field("Mounted on", format!("no node (epoch {})", attachment.epoch)),
        },
        None => out.field("Mounted on", "no node yet"),
    }
    out.maybe("Claim", status.claim_name.as_ref());
    out.maybe("Changed files", status.changed_files);
    out.maybe("Own bytes", status.own_bytes.map(bytes));
    out.maybe("Shared bytes", status.shared_bytes.map(bytes));
    out.maybe(
        "Automatic checkpoints",
        it.spec.checkpoints.as_ref().map(|auto| format!("every {:?}, the last {}", auto.interval, auto.keep)),
    );
    out.maybe("Time to live", it.spec.time_to_live.map(|ttl| format!("{ttl:?}")));
    let mut text = out.0;
    text += &conditions_table(&status.conditions);

    let below = lines(&sessions, &checkpoints, true, Some(name), Style::of_locale());
    if below.len() > 1 {
        text += "\nLineage:\n";
        for line in below {
            let _ = match line.item {
                Item::Session(session) => {
                    writeln!(text, "  {}{}  {}", line.branches, session.name_any(), crate::get::state(session))
                }
                Item::Checkpoint(checkpoint) => {
                    let message = checkpoint.spec.message.as_deref().unwrap_or_default();
                    writeln!(text, "  {}* {}  {message}", line.branches, checkpoint.name_any())
                }
            };
        }
    }

    commands.retain(|command| command.spec.session == name);
    commands.sort_by_key(|command| std::cmp::Reverse(command.metadata.creation_timestamp.clone().map(|time| time.0)));
    let rows: Vec<_> = commands
        .iter()
        .take(COMMANDS)
        .map(|command| {
            let status = command.status.clone().unwrap_or_default();
            vec![
                format!("  {}", command.name_any()),
                or_dash(status.phase),
                or_dash(status.exit_code),
                age(command.metadata.creation_timestamp.as_ref()),
                words(&command.spec.command),
            ]
        })
        .collect();
    if !rows.is_empty() {
        text += &format!("\nCommands:\n{}", table(&["  NAME", "PHASE", "EXIT", "AGE", "COMMAND"], &rows));
    }
    text += &events(cluster, &it.metadata).await;
    Ok(text)
}

fn checkpoint(it: &AetherCheckpoint, out: &mut Fields) {
    let status = it.status.clone().unwrap_or_default();
    out.field("Session", &it.spec.session);
    out.maybe("Message", it.spec.message.as_ref());
    out.field("When its session is deleted", format!("{:?}", it.spec.deletion_policy));
    out.maybe("Durability", status.durability.map(|durability| format!("{durability:?}")));
    out.maybe("Taken", status.local_time.as_ref().map(ago));
    out.maybe("In the store", status.durable_time.as_ref().map(ago));
    out.maybe("Consistency", status.consistency.map(|consistency| format!("{consistency:?}")));
    out.maybe("Pods stood still", status.frozen_microseconds.map(frozen));
    out.maybe("Node", status.node.as_ref());
    out.maybe("Changed files", status.changed_files);
    out.maybe("Own bytes", status.own_bytes.map(bytes));
    out.maybe("Tree", status.root.as_ref());
    out.maybe("Parent", status.parent.as_ref());
}

fn source(it: &AetherSource, out: &mut Fields) {
    let status = it.status.clone().unwrap_or_default();
    if let Some(git) = &it.spec.git {
        out.field("Git", &git.url);
        out.maybe("Ref", git.reference.as_ref());
        out.maybe("Secret", git.secret_ref.as_ref().map(|secret| &secret.name));
    }
    if let Some(s3) = &it.spec.s3 {
        let prefix = s3.prefix.as_deref().unwrap_or_default().trim_matches('/');
        out.field("S3", format!("s3://{}/{prefix}", s3.bucket));
        out.maybe("Endpoint", s3.endpoint.as_ref());
        out.maybe("Region", s3.region.as_ref());
        out.maybe("Secret", s3.secret_ref.as_ref().map(|secret| &secret.name));
    }
    out.maybe(
        "Claim",
        it.spec.claim.as_ref().map(|claim| format!("{} {}", claim.claim_name, claim.path.as_deref().unwrap_or("/"))),
    );
    out.maybe("Empty", it.spec.empty.as_ref().map(|_| "yes"));
    out.maybe("Refresh", it.spec.refresh.map(|refresh| format!("every {refresh:?}")));
    if !it.spec.allowed_namespaces.is_empty() {
        out.field("Allowed namespaces", it.spec.allowed_namespaces.join(", "));
    }
    out.maybe("Phase", status.phase);
    if let Some(import) = status.import {
        let progress = format!(
            "{} ({} files, {}), job {}, begun {}",
            import.phase,
            import.files,
            bytes(import.bytes),
            import.job,
            ago(&import.started)
        );
        out.field("Import", progress);
    }
    let rows: Vec<_> = status
        .revisions
        .iter()
        .map(|revision| {
            let name = if status.latest.as_ref() == Some(&revision.name) {
                format!("  {} (latest)", revision.name)
            } else {
                format!("  {}", revision.name)
            };
            let commit = revision.commit.as_ref().map(|commit| commit.chars().take(12).collect::<String>());
            let took = format!("{:.1}s", revision.milliseconds as f64 / 1000.0);
            vec![
                name,
                revision.files.to_string(),
                bytes(revision.bytes),
                or_dash(commit),
                age(Some(&revision.time)),
                took,
            ]
        })
        .collect();
    if !rows.is_empty() {
        out.0 += &format!("Revisions:\n{}", table(&["  NAME", "FILES", "BYTES", "COMMIT", "AGE", "IMPORT"], &rows));
    }
}

fn restore(it: &AetherRestore, out: &mut Fields) {
    let status = it.status.clone().unwrap_or_default();
    out.field("Session", &it.spec.session);
    out.field("Checkpoint", &it.spec.checkpoint);
    out.maybe("Phase", status.phase);
    out.maybe("Safety checkpoint", status.safety_checkpoint);
    out.maybe("Changed paths", status.changed_paths);
    out.maybe("Node", status.node);
    out.maybe("Begun", status.started.as_ref().map(ago));
    out.maybe("Ended", status.finished.as_ref().map(ago));
}

fn command(it: &AetherCommand, out: &mut Fields) {
    let status = it.status.clone().unwrap_or_default();
    out.field("Session", &it.spec.session);
    out.field("Command", words(&it.spec.command));
    out.maybe("Directory", it.spec.working_dir.as_ref());
    out.maybe("Image", it.spec.image.as_ref());
    for variable in &it.spec.env {
        out.field("Environment", format!("{}={}", variable.name, variable.value));
    }
    out.maybe("Time limit", it.spec.timeout.map(|timeout| format!("{timeout:?}")));
    out.maybe("Phase", status.phase);
    out.maybe("Exit code", status.exit_code);
    out.maybe("Pod", status.pod_name);
    out.maybe("Begun", status.started.as_ref().map(ago));
    out.maybe("Ended", status.finished.as_ref().map(ago));
    out.maybe("Checkpoint", status.checkpoint);
}

pub(crate) fn commit(it: &AetherCommit, out: &mut Fields) {
    let status = it.status.clone().unwrap_or_default();
    out.maybe("Asked for by", it.spec.requested_by.as_ref().map(|by| &by.username));
    out.maybe("Session", status.session.as_ref().or(it.spec.session.as_ref()));
    out.maybe("Checkpoint", status.checkpoint.as_ref().or(it.spec.checkpoint.as_ref()));
    out.maybe("Source", status.source.as_ref().map(|source| format!("{}/{}", source.namespace, source.name)));
    out.field("To", crate::review::target(&it.spec.target));
    if it.spec.target.promote.is_some() {
        out.field("Not shown", "what is called .git: no diff shows it, and it becomes part of the revision");
    }
    if let Some(git) = &it.spec.target.git {
        out.maybe("Author", git.author.as_ref().map(|author| format!("{} <{}>", author.name, author.email)));
        out.field("Message", git.message.trim_end());
    }
    out.field("Phase", crate::review::phase(it));
    out.maybe("Tree", status.root.as_ref());
    if let Some(base) = &status.base {
        let of = [base.revision.as_ref(), base.commit.as_ref()].into_iter().flatten().cloned().collect::<Vec<_>>();
        out.field(
            "Base",
            format!("{}{}", base.root, if of.is_empty() { String::new() } else { format!(" ({})", of.join(", ")) }),
        );
    }
    if let Some(approvals) = &status.approvals {
        let by = if approvals.by.is_empty() { String::new() } else { format!(": {}", approvals.by.join(", ")) };
        out.field("Approvals", format!("{} of {}{by}", approvals.have, approvals.need));
        for who in &approvals.rejected {
            out.field("Rejected by", who);
        }
        for missing in &approvals.missing {
            out.field("Missing", missing);
        }
        for stale in &approvals.stale {
            out.field("Of another tree", stale);
        }
    }
    out.maybe("Released", status.started.as_ref().map(ago));
    out.maybe("Ended", status.finished.as_ref().map(ago));
    out.maybe("Git commit", status.commit);
    out.maybe("Revision", status.revision);
    out.maybe("Place", status.place);
    for path in &status.conflicts {
        out.field("Conflict", path);
    }
    for warning in &status.warnings {
        out.field("Warning", warning);
    }
}

fn approval(it: &AetherApproval, out: &mut Fields) {
    let status = it.status.clone().unwrap_or_default();
    out.field("Commit", &it.spec.commit);
    out.field("Decision", format!("{:?}", it.spec.decision));
    out.field("Tree", &it.spec.root);
    out.maybe("Reviewer", it.spec.reviewer.as_ref().map(|by| &by.username));
    out.maybe("Text", it.spec.text.as_ref());
    out.field("Counts", if status.counts { "yes" } else { "no" });
    out.maybe("Why not", status.reason);
}

fn note(it: &AetherNote, out: &mut Fields) {
    out.field("Checkpoint", &it.spec.checkpoint);
    out.field("Place", crate::review::place(&it.spec));
    out.maybe("Digest of the file", it.spec.digest.as_ref());
    out.maybe("Author", it.spec.author.as_ref().map(|by| &by.username));
    out.field("Resolved", if it.spec.resolved { "yes" } else { "no" });
    out.field("Text", &it.spec.text);
}

/// Lines of a name and a value.
pub(crate) struct Fields(pub(crate) String);

impl Fields {
    pub(crate) fn of(meta: &ObjectMeta) -> Self {
        let mut out = Self(String::new());
        out.field("Name", meta.name.as_deref().unwrap_or_default());
        out.field("Namespace", meta.namespace.as_deref().unwrap_or_default());
        out.maybe("Created", meta.creation_timestamp.as_ref().map(ago));
        out.maybe("Being deleted since", meta.deletion_timestamp.as_ref().map(|time| age(Some(time))));
        let labels =
            meta.labels.iter().flatten().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(", ");
        out.maybe("Labels", Some(labels).filter(|labels| !labels.is_empty()));
        out
    }

    pub(crate) fn field(&mut self, name: &str, value: impl ToString) {
        // A message may have several lines, which must not look like fields.
        let value = printable(&value.to_string()).replace('\n', "\n    ");
        self.0 += &format!("{:<24}{value}\n", format!("{name}:"));
    }

    pub(crate) fn maybe(&mut self, name: &str, value: Option<impl ToString>) {
        if let Some(value) = value {
            self.field(name, value);
        }
    }
}

pub(crate) fn ago(time: &Time) -> String {
    format!("{} ({} ago)", time.0.strftime("%Y-%m-%d %H:%M:%SZ"), age(Some(time)))
}

/// Words as one would type them in a shell.
pub(crate) fn words(words: &[String]) -> String {
    let plain = |word: &str| {
        !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./=:,+@%".contains(&byte))
    };
    let quoted =
        words.iter().map(|word| if plain(word) { word.clone() } else { format!("'{}'", word.replace('\'', r"'\''")) });
    quoted.collect::<Vec<_>>().join(" ")
}

fn conditions_table(conditions: &[Condition]) -> String {
    let rows: Vec<_> = conditions
        .iter()
        .map(|condition| {
            vec![
                format!("  {}", condition.type_),
                condition.status.clone(),
                condition.reason.clone(),
                age(Some(&condition.last_transition_time)),
                condition.message.replace('\n', " "),
            ]
        })
        .collect();
    if rows.is_empty() {
        String::new()
    } else {
        format!("\nConditions:\n{}", table(&["  TYPE", "STATUS", "REASON", "SINCE", "MESSAGE"], &rows))
    }
}

/// The newest events of the object; a note where they may not be read.
async fn events(cluster: &Cluster, meta: &ObjectMeta) -> String {
    let Some(uid) = &meta.uid else { return String::new() };
    let query = ListParams::default().fields(&format!("involvedObject.uid={uid}"));
    let mut events = match cluster.api::<Event>().list(&query).await {
        Ok(list) => list.items,
        Err(error) => return format!("\nEvents: {:#}\n", explain(error, "list events")),
    };
    let time = |event: &Event| {
        let micro = event.event_time.as_ref().map(|time| time.0);
        event.last_timestamp.as_ref().map(|time| time.0).or(micro).or(event
            .metadata
            .creation_timestamp
            .as_ref()
            .map(|time| time.0))
    };
    events.sort_by_key(|event| std::cmp::Reverse(time(event)));
    let rows: Vec<_> = events
        .iter()
        .take(EVENTS)
        .map(|event| {
            vec![
                format!("  {}", age(time(event).map(Time).as_ref())),
                or_dash(event.type_.clone()),
                or_dash(event.reason.clone()),
                or_dash(
                    event
                        .reporting_component
                        .clone()
                        .filter(|name| !name.is_empty())
                        .or_else(|| event.source.clone()?.component),
                ),
                event.message.clone().unwrap_or_default().replace('\n', " "),
            ]
        })
        .collect();
    if rows.is_empty() {
        String::new()
    } else {
        format!("\nEvents:\n{}", table(&["  AGE", "TYPE", "REASON", "FROM", "MESSAGE"], &rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_shown_as_one_types_them() {
        assert_eq!(words(&["sh".into(), "-c".into(), "echo it's".into()]), r"sh -c 'echo it'\''s'");
        assert_eq!(words(&[String::new()]), "''");
    }

    #[test]
    fn a_value_of_several_lines_stays_one_field() {
        let mut fields = Fields(String::new());
        fields.field("Message", "one\nName: fake");
        assert_eq!(fields.0, "Message:                one\n    Name: fake\n");
    }
}
