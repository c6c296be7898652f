//! `get` and `checkpoints`: lists.

use aether_api::session::Durability;
use aether_api::{AetherCheckpoint, AetherSession, conditions, names};
use anyhow::Result;
use kube::ResourceExt;
use kube::api::{Api, ListParams};

use crate::cli::{Checkpoints, Format, Get};
use crate::cluster::{Cluster, explain};
use crate::lineage::{Item, Line, Style, lines, parent};
use crate::output::{self, age, bytes, or_dash};

pub(crate) async fn sessions(cluster: &Cluster, args: &Get) -> Result<()> {
    if let (Some(name), Some(format)) = (&args.name, args.print.output.and_then(Format::of_objects)) {
        return output::object(&cluster.find::<AetherSession>(name).await?, format);
    }
    let (sessions, checkpoints): (Api<AetherSession>, Api<AetherCheckpoint>) = if args.all_namespaces {
        (Api::all(cluster.client.clone()), Api::all(cluster.client.clone()))
    } else {
        (cluster.api(), cluster.api())
    };
    let mut query = ListParams::default();
    if let Some(selector) = &args.selector {
        query = query.labels(selector);
    }
    let sessions = sessions.list(&query).await.map_err(|error| explain(error, "list sessions"))?.items;
    if let Some(format) = args.print.output.and_then(Format::of_objects) {
        return output::objects(&sessions, format);
    }
    // Checkpoints tell where sessions that began at one belong. Who may not list them gets a flatter tree.
    let checkpoints = match checkpoints.list(&ListParams::default()).await {
        Ok(list) => list.items,
        Err(error) if args.checkpoints => return Err(explain(error, "list checkpoints")),
        Err(_) => Vec::new(),
    };
    if let Some(name) = &args.name
        && !sessions.iter().any(|session| session.name_any() == *name)
    {
        // Fails with what there is instead.
        cluster.find::<AetherSession>(name).await?;
    }
    let lines = lines(&sessions, &checkpoints, args.checkpoints, args.name.as_deref(), Style::of_locale());
    if lines.is_empty() {
        let place =
            if args.all_namespaces { "any namespace".into() } else { format!("namespace {}", cluster.namespace) };
        eprintln!("no sessions in {place}: `kubectl aether create NAME --source SOURCE` makes one");
        return Ok(());
    }
    let wide = args.print.output == Some(Format::Wide);
    let rows: Vec<_> = lines.iter().map(|line| row(line, &sessions, &checkpoints, args.all_namespaces, wide)).collect();
    let mut header = vec!["NAME", "STATE", "NODE", "CHANGED", "OWN", "HEAD", "AGE"];
    if wide {
        header.extend(["SHARED", "FROM", "CLAIM", "OWNER", "EPOCH", "MESSAGE"]);
    }
    if args.all_namespaces {
        header.insert(0, "NAMESPACE");
    }
    output::print(&output::table(&header, &rows))
}

fn row(
    line: &Line<'_>,
    sessions: &[AetherSession],
    checkpoints: &[AetherCheckpoint],
    namespaces: bool,
    wide: bool,
) -> Vec<String> {
    let (namespace, mut row) = match line.item {
        Item::Session(session) => (session.namespace(), session_row(line, session, sessions, checkpoints)),
        Item::Checkpoint(checkpoint) => (checkpoint.namespace(), checkpoint_row(line, checkpoint)),
    };
    if !wide {
        row.truncate(7);
    }
    if namespaces {
        row.insert(0, namespace.unwrap_or_default());
    }
    row
}

fn session_row(
    line: &Line<'_>,
    session: &AetherSession,
    sessions: &[AetherSession],
    checkpoints: &[AetherCheckpoint],
) -> Vec<String> {
    let status = session.status.clone().unwrap_or_default();
    let ready = conditions::get(&status.conditions, conditions::READY);
    let owner = status.base.as_ref().map(|base| format!("{}:{}", base.owner.uid, base.owner.gid));
    let message = ready.filter(|ready| ready.status != "True").map(|ready| ready.message.clone());
    vec![
        format!("{}{}", line.branches, session.name_any()),
        state(session),
        or_dash(session.holder()),
        or_dash(status.changed_files),
        or_dash(status.own_bytes.map(bytes)),
        or_dash(status.head.as_ref().map(|head| durability(head.durability))),
        age(session.metadata.creation_timestamp.as_ref()),
        or_dash(status.shared_bytes.map(bytes)),
        origin(session, parent(session, sessions, checkpoints).is_none()),
        or_dash(status.claim_name),
        or_dash(owner),
        or_dash(status.attachment.map(|attachment| attachment.epoch)),
        or_dash(message),
    ]
}

fn checkpoint_row(line: &Line<'_>, checkpoint: &AetherCheckpoint) -> Vec<String> {
    let status = checkpoint.status.clone().unwrap_or_default();
    vec![
        format!("{}* {}", line.branches, checkpoint.name_any()),
        "Checkpoint".into(),
        or_dash(status.node),
        or_dash(status.changed_files),
        or_dash(status.own_bytes.map(bytes)),
        or_dash(status.durability.map(durability)),
        age(checkpoint.metadata.creation_timestamp.as_ref()),
        "-".into(),
        checkpoint.spec.session.clone(),
        "-".into(),
        "-".into(),
        "-".into(),
        or_dash(checkpoint.spec.message.clone()),
    ]
}

/// A session's state in a word, with the reason when it is not as it should be.
pub(crate) fn state(session: &AetherSession) -> String {
    if session.metadata.deletion_timestamp.is_some() {
        return "Terminating".into();
    }
    let Some(status) = &session.status else { return "Pending".into() };
    let ready = conditions::get(&status.conditions, conditions::READY);
    match (&status.phase, ready) {
        (Some(phase), Some(ready)) if ready.status != "True" => format!("{phase}/{}", ready.reason),
        (Some(phase), _) => phase.clone(),
        (None, Some(ready)) => ready.reason.clone(),
        (None, None) => "Pending".into(),
    }
}

fn durability(durability: Durability) -> &'static str {
    match durability {
        Durability::Local => "Local",
        Durability::Durable => "Durable",
    }
}

/// What a session started from. `orphan` says that the session it was forked from is gone.
pub(crate) fn origin(session: &AetherSession, orphan: bool) -> String {
    let base = session.status.as_ref().and_then(|status| status.base.as_ref());
    if let Some(parent) = &session.spec.session {
        return format!("session {parent}{}", if orphan { " (deleted)" } else { "" });
    }
    if let Some(checkpoint) = &session.spec.checkpoint {
        return format!("checkpoint {checkpoint}");
    }
    let Some(source) = &session.spec.source else { return "-".into() };
    let namespace = source.namespace.clone().or_else(|| session.namespace()).unwrap_or_default();
    let revision = base.and_then(|base| base.revision.as_ref()).or(source.revision.as_ref());
    format!("{namespace}/{}{}", source.name, revision.map(|revision| format!("@{revision}")).unwrap_or_default())
}

pub(crate) async fn checkpoints(cluster: &Cluster, args: &Checkpoints) -> Result<()> {
    let mut list = cluster
        .api::<AetherCheckpoint>()
        .list(&ListParams::default())
        .await
        .map_err(|error| explain(error, "list checkpoints"))?
        .items;
    if let Some(session) = &args.session {
        list.retain(|checkpoint| checkpoint.spec.session == *session);
    }
    list.sort_by_key(|checkpoint| {
        (checkpoint.metadata.creation_timestamp.clone().map(|time| time.0), checkpoint.name_any())
    });
    if let Some(format) = args.print.output.and_then(Format::of_objects) {
        return output::objects(&list, format);
    }
    if list.is_empty() {
        match &args.session {
            Some(session) => {
                // Checkpoints outlive sessions; without either, the name is wrong.
                cluster.find::<AetherSession>(session).await?;
                eprintln!("session {session} has no checkpoints: `kubectl aether checkpoint {session}` takes one");
            }
            None => eprintln!("no checkpoints in namespace {}", cluster.namespace),
        }
        return Ok(());
    }
    let wide = args.print.output == Some(Format::Wide);
    let mut header = vec!["NAME", "SESSION", "STATE", "CHANGED", "OWN", "ORIGIN", "AGE", "MESSAGE"];
    if wide {
        header.extend(["CONSISTENCY", "FROZEN", "NODE", "ROOT"]);
    }
    let rows: Vec<_> = list
        .iter()
        .map(|checkpoint| {
            let status = checkpoint.status.clone().unwrap_or_default();
            let failed = conditions::is_true(&status.conditions, conditions::FAILED);
            let mut row = vec![
                checkpoint.name_any(),
                checkpoint.spec.session.clone(),
                if failed { "Failed".into() } else { status.durability.map_or("Pending", durability).into() },
                or_dash(status.changed_files),
                or_dash(status.own_bytes.map(bytes)),
                or_dash(checkpoint.labels().get(names::ORIGIN_LABEL)),
                age(checkpoint.metadata.creation_timestamp.as_ref()),
                or_dash(
                    checkpoint
                        .spec
                        .message
                        .as_ref()
                        .map(|message| message.lines().next().unwrap_or_default().to_owned()),
                ),
            ];
            if wide {
                row.extend([
                    or_dash(status.consistency.map(|consistency| format!("{consistency:?}"))),
                    or_dash(status.frozen_microseconds.map(output::frozen)),
                    or_dash(status.node),
                    or_dash(status.root),
                ]);
            }
            row
        })
        .collect();
    output::print(&output::table(&header, &rows))
}
