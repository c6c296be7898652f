//! Arguments.

use std::path::PathBuf;

use aether_cas::Blob;
use aether_credentials::Credentials;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Carries a reviewed tree out of the store, and reports what became of it.
#[derive(Parser, Debug)]
#[command(name = "aether-committer", version, after_help = EXAMPLES)]
pub struct Cli {
    /// Where to.
    #[command(subcommand)]
    pub target: Target,
    /// Address of the store, such as https://aether-store.aether-system.svc:8980.
    #[arg(long, env = "AETHER_STORE", global = true)]
    pub store: Option<String>,
    /// How to know the store, and what to show to it.
    #[command(flatten)]
    pub credentials: Credentials,
    /// File that receives the result as JSON. When not given: /dev/termination-log, if there is one. It also goes to stdout.
    #[arg(long, global = true)]
    pub result: Option<PathBuf>,
}

const EXAMPLES: &str = "\
The last line on stdout is the result; the exit code is 0 when it was carried out, 1 when it was not, 2 for arguments that make no sense:
  {\"ok\":true,\"commit\":\"<id>\",\"tree\":\"<id>\",\"branch\":\"main\",\"parent\":\"<id>\",\"files\":N,\"warnings\":[\"...\"],\"milliseconds\":N}
  {\"ok\":true,\"root\":\"<hex>/<size>\",\"place\":\"s3://bucket/folder/\",\"files\":N,\"written\":N,\"bytes\":N,\"milliseconds\":N}
  {\"ok\":false,\"reason\":\"Conflict\",\"kind\":\"Permanent\",\"message\":\"...\",\"tip\":\"<id>\",\"conflicts\":[\"src/main.rs\"]}
\"found\":true says that an earlier run had done it, \"rebased\":true that the branch had moved. Of kind \"Temporary\" is what may succeed when it is tried again.

Examples:
  aether-committer git --url https://example.org/team/app.git --branch main --secret-dir /var/run/aether/secret \\
    --base-commit 3f5d…  --base-root 9c1e…/212 --root 77ab…/212 --commit-uid 5d3c2b1a-… \\
    --message 'Mend the parser' --author-name Ada --author-email ada@example.org \\
    --trailer Aether-Session=demo/fix-parser --trailer Approved-by=grace --rebase --store http://127.0.0.1:8980
  aether-committer git --url git@example.org:team/app.git --branch agent/fix --message-file /etc/message …
  aether-committer export folder --root 77ab…/212 --beneath /target --path results/one --store http://127.0.0.1:8980
  aether-committer export s3 --root 77ab…/212 --bucket results --prefix team/one --endpoint https://s3.example.com \\
    --secret-dir /var/run/aether/secret --store http://127.0.0.1:8980";

/// Where to.
#[derive(Subcommand, Debug)]
pub enum Target {
    /// A branch of a git repository: one commit of what changed, pushed.
    Git(Box<Git>),
    /// A copy of the tree.
    #[command(subcommand)]
    Export(Export),
}

/// Where a copy goes.
#[derive(Subcommand, Debug)]
pub enum Export {
    /// A directory that does not exist yet.
    Folder(Folder),
    /// A folder of an S3 bucket: an object for each file.
    S3(S3),
}

/// A directory that does not exist yet.
#[derive(Args, Clone, Debug)]
pub struct Folder {
    /// The tree.
    #[arg(long)]
    pub root: Blob,
    /// The directory below which everything happens, such as that of a mounted claim.
    #[arg(long)]
    pub beneath: PathBuf,
    /// The new directory in it, as a relative path. Until it is complete it is called PATH.partial.
    #[arg(long)]
    pub path: PathBuf,
    /// What the mounted claim is called: for messages and the result.
    #[arg(long)]
    pub claim: Option<String>,
}

/// A folder of an S3 bucket.
#[derive(Args, Clone, Debug)]
pub struct S3 {
    /// The tree.
    #[arg(long)]
    pub root: Blob,
    /// The bucket.
    #[arg(long)]
    pub bucket: String,
    /// The new folder in it. It is complete when it has an object .aether-export.json, which is written last.
    #[arg(long)]
    pub prefix: String,
    /// The service, where it is not AWS.
    #[arg(long)]
    pub endpoint: Option<String>,
    /// The region. us-east-1 when not given.
    #[arg(long)]
    pub region: Option<String>,
    /// Directory with the keys of a Secret as files: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where there is one,
    /// AWS_SESSION_TOKEN; ca.crt for a private authority. Requests are not signed when not given.
    #[arg(long)]
    pub secret_dir: Option<PathBuf>,
    /// What the Secret is called, as NAMESPACE/NAME: for messages.
    #[arg(long)]
    pub secret_name: Option<String>,
}

/// A commit, and where it goes.
#[derive(Args, Clone, Debug)]
pub struct Git {
    /// https://, http://, ssh://, git://, file:// or user@host:path.
    #[arg(long)]
    pub url: String,
    /// Directory with the keys of a Secret as files: username and password, or ssh-privatekey and known_hosts; ca.crt with either.
    #[arg(long)]
    pub secret_dir: Option<PathBuf>,
    /// What the Secret is called, as NAMESPACE/NAME: for messages.
    #[arg(long)]
    pub secret_name: Option<String>,
    /// The branch, by its short name. Made when it is not there.
    #[arg(long)]
    pub branch: String,
    /// The commit that the session started from, by its full id.
    #[arg(long)]
    pub base_commit: String,
    /// The tree that was imported of that commit.
    #[arg(long)]
    pub base_root: Blob,
    /// The tree that was reviewed.
    #[arg(long)]
    pub root: Blob,
    /// The UID of the request. A commit of the branch that has it in its trailer is this one, and is not made again.
    #[arg(long)]
    pub commit_uid: String,
    /// What the commit says.
    #[arg(long, required_unless_present = "message_file", conflicts_with = "message_file")]
    pub message: Option<String>,
    /// File of what the commit says.
    #[arg(long)]
    pub message_file: Option<PathBuf>,
    /// Who wrote it. The committer when not given.
    #[arg(long, requires = "author_email")]
    pub author_name: Option<String>,
    /// Their address.
    #[arg(long, requires = "author_name")]
    pub author_email: Option<String>,
    /// Who commits it.
    #[arg(long, default_value = "Aether")]
    pub committer_name: String,
    /// Their address.
    #[arg(long, default_value = "aether@aether.dev")]
    pub committer_email: String,
    /// When it was asked for, as 2026-01-31T12:00:00Z: the commit's date. Now when not given.
    #[arg(long)]
    pub date: Option<jiff::Timestamp>,
    /// A line at the end of the message, beside Aether-Root and Aether-Commit, which are always there. May be given many times.
    #[arg(long = "trailer", value_name = "KEY=VALUE", value_parser = trailer)]
    pub trailers: Vec<(String, String)>,
    /// If the branch has moved, put the change on top of it where nothing conflicts.
    #[arg(long)]
    pub rebase: bool,
    /// What becomes of commits that were made in the session.
    #[arg(long, value_enum, default_value = "squash")]
    pub history: History,
    /// Files that .gitattributes gives to Git LFS are kept there; for sources that were imported with their contents.
    #[arg(long)]
    pub lfs: bool,
}

/// What becomes of commits that were made in the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum History {
    /// One commit says it all.
    Squash,
    /// They are kept, if they are one straight line from the base commit on; what is not in them becomes one more.
    Keep,
}

fn trailer(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("it is not KEY=VALUE")?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if key.is_empty() || !key.bytes().all(plain) {
        return Err(format!("{key:?} is not a key: letters, digits and dashes only"));
    }
    if value.trim().is_empty() || value.contains(char::is_control) {
        return Err(format!("the value of {key} is empty, or more than a line"));
    }
    Ok((key.to_owned(), value.trim().to_owned()))
}
