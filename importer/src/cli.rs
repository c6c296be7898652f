//! Arguments.

use std::path::PathBuf;

use aether_credentials::Credentials;
use clap::{Args, Parser, Subcommand};

/// Imports a source into the store and reports the tree.
#[derive(Parser, Debug)]
#[command(name = "aether-importer", version, after_help = EXAMPLES)]
pub struct Cli {
    /// Where from.
    #[command(subcommand)]
    pub source: Source,
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
Progress is printed to stdout as lines of JSON, then the result:
  {\"ok\":true,\"root\":\"<hex>/<size>\",\"files\":N,\"bytes\":N,\"commit\":\"<id>\",\"milliseconds\":N}
  {\"ok\":false,\"reason\":\"RefNotFound\",\"message\":\"...\"}

Examples:
  aether-importer git --url https://github.com/kubernetes/kubernetes --ref v1.30.0 --depth 1 --store http://127.0.0.1:8980
  aether-importer git --url git@example.org:team/app.git --ref main --secret-dir /var/run/aether/secret --store http://127.0.0.1:8980
  aether-importer s3 --bucket models --prefix team/a --endpoint https://s3.example.com --secret-dir /var/run/aether/secret --store http://127.0.0.1:8980
  aether-importer claim --path /source/tree --store http://127.0.0.1:8980
  aether-importer empty --store http://127.0.0.1:8980";

/// Where from.
#[derive(Subcommand, Debug)]
pub enum Source {
    /// A git repository, with its history.
    Git(Git),
    /// The objects of an S3 bucket, as files.
    S3(S3),
    /// A directory.
    Claim {
        /// The directory.
        #[arg(long)]
        path: PathBuf,
    },
    /// Nothing: an empty directory.
    Empty,
}

/// The objects of an S3 bucket.
#[derive(Args, Clone, Debug, Default)]
pub struct S3 {
    /// The bucket.
    #[arg(long)]
    pub bucket: String,
    /// A folder in it. All of it when not given.
    #[arg(long)]
    pub prefix: Option<String>,
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
    /// Read nothing, and say so, if the bucket's listing still has this digest.
    #[arg(long)]
    pub unless_listing: Option<String>,
}

/// A git repository.
#[derive(Args, Clone, Debug, Default)]
pub struct Git {
    /// https://, http://, ssh://, git://, file:// or user@host:path.
    #[arg(long)]
    pub url: String,
    /// A branch, a tag, a full ref or a commit id. The remote's HEAD when not given.
    #[arg(long = "ref")]
    pub reference: Option<String>,
    /// How many commits of history. All of them when not given.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub depth: Option<u32>,
    /// Fetch submodules too, recursively.
    #[arg(long)]
    pub submodules: bool,
    /// Fetch Git LFS contents too.
    #[arg(long)]
    pub lfs: bool,
    /// Directory with the keys of a Secret as files: username and password, or ssh-privatekey and known_hosts; ca.crt with either.
    #[arg(long)]
    pub secret_dir: Option<PathBuf>,
    /// What the Secret is called, as NAMESPACE/NAME: for messages.
    #[arg(long)]
    pub secret_name: Option<String>,
    /// Import nothing, and say so, if the ref still means this commit.
    #[arg(long)]
    pub unless_commit: Option<String>,
}
