//! `aether-node`: for a person on a node. Shows what the driver has there, checks it, frees what nothing needs.

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use aether_proto::node::v1::node_admin_client::NodeAdminClient;
use aether_proto::node::v1::{FsckRequest, GcRequest, ListSessionsRequest, StatsRequest};
use anyhow::Context as _;
use clap::{Parser, Subcommand, ValueEnum};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tonic::transport::{Channel, Endpoint};

const EXAMPLES: &str = "\
Examples:
  aether-node list                       # sessions on this node, where they are mounted, what they take
  aether-node list -o json | jq '.[] | select(.mounted)'
  aether-node fsck                       # exit code 1 when something is wrong
  aether-node fsck --contents            # also reads and hashes every object
  aether-node gc                         # says what would go
  aether-node gc --yes                   # removes it
  kubectl -n aether-system exec ds/aether-driver -- aether-node stats";

/// Shows and checks what the Aether driver has on this node.
#[derive(Parser)]
#[command(name = "aether-node", version, after_help = EXAMPLES)]
struct Arguments {
    /// The driver's directory
    #[arg(long, env = "AETHER_STATE_DIR", default_value = "/var/lib/aether", global = true)]
    state_dir: PathBuf,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Output::Table, global = true)]
    output: Output,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

#[derive(Subcommand)]
enum Command {
    /// Sessions on this node
    List,
    /// Compare records, pool, images, objects and mounts; changes nothing unless --repair is given
    Fsck {
        /// Also read and hash every object
        #[arg(long)]
        contents: bool,
        /// Drop objects that are damaged, so that they are fetched again
        #[arg(long, requires = "contents")]
        repair: bool,
    },
    /// Free what no session, snapshot or mount needs; without --yes it only says what would go
    Gc {
        /// Do it
        #[arg(long)]
        yes: bool,
    },
    /// How full the pool is, and of what
    Stats,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let mut client = connect(arguments.state_dir.join("admin.sock")).await?;
    let (value, table, code) = match arguments.command {
        Command::List => list(&mut client).await?,
        Command::Fsck { contents, repair } => fsck(&mut client, contents, repair).await?,
        Command::Gc { yes } => gc(&mut client, !yes).await?,
        Command::Stats => stats(&mut client).await?,
    };
    let text = match arguments.output {
        Output::Json => serde_json::to_string_pretty(&value)?,
        Output::Table => table,
    };
    match writeln!(io::stdout().lock(), "{}", text.trim_end()) {
        // The reader had enough, as with `| head`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        other => other?,
    }
    Ok(code)
}

async fn connect(path: PathBuf) -> anyhow::Result<NodeAdminClient<Channel>> {
    let socket = path.clone();
    // The address is never used: the connector knows where to go.
    let channel = Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
        .await
        .with_context(|| {
            format!("the driver does not answer at {}: does it run, and are you root? (--state-dir)", path.display())
        })?;
    Ok(NodeAdminClient::new(channel))
}

type Answer = anyhow::Result<(Value, String, ExitCode)>;

async fn list(client: &mut NodeAdminClient<Channel>) -> Answer {
    let sessions = client.list_sessions(ListSessionsRequest {}).await.map_err(said)?.into_inner().sessions;
    let mut rows =
        vec![["NAMESPACE", "NAME", "STATE", "EPOCH", "OWN", "SNAPSHOTS", "MOUNTS", "ID"].map(str::to_owned).to_vec()];
    let mut values = Vec::new();
    for session in sessions {
        let state = match (session.epoch, session.mounted) {
            (0, false) => "copy",
            (0, true) => "view",
            (_, true) => "mounted",
            (_, false) => "held",
        };
        rows.push(vec![
            session.namespace.clone(),
            session.name.clone(),
            state.to_owned(),
            session.epoch.to_string(),
            bytes(session.own_bytes),
            session.snapshots.to_string(),
            session.targets.len().to_string(),
            session.id.clone(),
        ]);
        let targets: Vec<_> =
            session.targets.iter().map(|target| json!({"path": target.path, "readOnly": target.read_only})).collect();
        values.push(json!({
            "id": session.id,
            "namespace": session.namespace,
            "name": session.name,
            "base": session.base,
            "mounted": session.mounted,
            "targets": targets,
            "epoch": session.epoch,
            "ownBytes": session.own_bytes,
            "snapshots": session.snapshots,
            "createdSeconds": session.created.map(|time| time.seconds),
        }));
    }
    let table = if rows.len() == 1 { "no sessions on this node".to_owned() } else { align(&rows) };
    Ok((Value::Array(values), table, ExitCode::SUCCESS))
}

async fn fsck(client: &mut NodeAdminClient<Channel>, contents: bool, repair: bool) -> Answer {
    let request = FsckRequest { repair, verify_contents: contents };
    let answer = client.fsck(request).await.map_err(said)?.into_inner();
    let unrepaired = answer.problems.iter().any(|problem| !problem.repaired);
    let mut text = String::new();
    let mut values = Vec::new();
    for problem in &answer.problems {
        let mark = if problem.repaired { " (repaired)" } else { "" };
        let subject = if problem.subject.is_empty() { String::new() } else { format!("{}: ", problem.subject) };
        text.push_str(&format!("{subject}{}{mark}\n", problem.message));
        values.push(json!({"subject": problem.subject, "message": problem.message, "repaired": problem.repaired}));
    }
    text.push_str(&format!(
        "{} sessions, {} objects, {} problems",
        answer.sessions,
        answer.objects,
        answer.problems.len()
    ));
    let value = json!({"sessions": answer.sessions, "objects": answer.objects, "problems": values});
    Ok((value, text, if unrepaired { ExitCode::FAILURE } else { ExitCode::SUCCESS }))
}

async fn gc(client: &mut NodeAdminClient<Channel>, dry_run: bool) -> Answer {
    let answer = client.gc(GcRequest { dry_run }).await.map_err(said)?.into_inner();
    let mut text: String = answer.removed.iter().map(|line| format!("{line}\n")).collect();
    text.push_str(&match (answer.removed.len(), dry_run) {
        (0, _) => "nothing to free".to_owned(),
        (count, true) => format!("{count} would go; say --yes to remove them"),
        (count, false) => format!("{count} removed"),
    });
    let value = json!({"dryRun": dry_run, "removed": answer.removed});
    Ok((value, text, ExitCode::SUCCESS))
}

async fn stats(client: &mut NodeAdminClient<Channel>) -> Answer {
    let answer = client.stats(StatsRequest {}).await.map_err(said)?.into_inner();
    let rows = [
        ("pool", answer.pool.clone()),
        ("size", bytes(answer.pool_bytes)),
        ("used", bytes(answer.pool_bytes_used)),
        ("objects", format!("{} ({})", answer.cache_objects, bytes(answer.cache_bytes))),
        ("images", answer.images.to_string()),
        ("sessions", format!("{} ({} mounted)", answer.sessions, answer.sessions_mounted)),
    ];
    let rows: Vec<_> = rows.into_iter().map(|(name, value)| vec![name.to_owned(), value]).collect();
    let value = json!({
        "pool": answer.pool,
        "poolBytes": answer.pool_bytes,
        "poolBytesUsed": answer.pool_bytes_used,
        "objects": answer.cache_objects,
        "objectBytes": answer.cache_bytes,
        "images": answer.images,
        "sessions": answer.sessions,
        "sessionsMounted": answer.sessions_mounted,
    });
    Ok((value, align(&rows), ExitCode::SUCCESS))
}

/// What the driver said, without gRPC's wrapping.
fn said(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("the driver says: {}", status.message())
}

/// Columns as wide as their widest cell, two spaces between them.
fn align(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let line: String = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}  ")).collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Bytes for people, in powers of 1024.
fn bytes(count: u64) -> String {
    let mut unit = 0;
    let mut rest = count;
    let mut before = 0;
    while rest >= 1024 && unit < 4 {
        before = rest % 1024;
        rest /= 1024;
        unit += 1;
    }
    let name = ["B", "KiB", "MiB", "GiB", "TiB"][unit];
    if unit == 0 || rest >= 100 { format!("{rest} {name}") } else { format!("{rest}.{} {name}", before * 10 / 1024) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(300 << 20), "300 MiB");
        assert_eq!(bytes(5 << 40), "5.0 TiB");
    }

    #[test]
    fn tables_line_up() {
        let rows = vec![vec!["A".to_owned(), "LONG".to_owned()], vec!["wide".to_owned(), "x".to_owned()]];
        assert_eq!(align(&rows), "A     LONG\nwide  x\n");
    }
}
