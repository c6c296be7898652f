//! The command line, parsed once into typed values.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use aether_cas::LocalConfig;
use clap::{Args, Parser, Subcommand};

use crate::{
    access::Grant,
    commands::{gc, gc::GcArgs, integrity, integrity::IntegrityArgs},
    tiered::options::TierArgs,
    upkeep::UpkeepArgs,
};

const EXAMPLES: &str = "Examples:
  Serve a store on this machine:
    aether-store-node --data-dir /var/lib/aether-store --listen 127.0.0.1:8980

  Serve service accounts of a cluster only:
    aether-store-node --listen 0.0.0.0:8980 --tls-cert tls.crt --tls-key tls.key \
      --allow system:serviceaccount:aether-system:aether-driver=read,write

  Serve a bucket, with the disk as its cache of up to 50 GiB:
    AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... aether-store-node --listen 127.0.0.1:8980 \
      --s3-bucket aether --s3-region eu-central-1 --cache-limit 50Gi

  Check the contents of a store that is not running, and drop what is damaged:
    aether-store-node fsck --data-dir /var/lib/aether-store --repair

  What would be deleted from a node that runs, and what has it found damaged?
    aether-store-node gc --dry-run --address http://127.0.0.1:8980
    aether-store-node integrity --address http://127.0.0.1:8980

Any client of Bazel's Remote Execution API can use the store, by BLAKE3 or SHA-256, for example BuildGrid's:
    bgd cas --remote http://127.0.0.1:8980 upload-dir some/folder";

/// The content-addressed store of a cluster: contents and directory trees, named by their BLAKE3 digests.
#[derive(Debug, Parser)]
#[command(name = "aether-store-node", version, after_long_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// What to do instead of serving.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to serve.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// What the program can do besides serving.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Read everything the store holds and compare it with its digests.
    ///
    /// The store node must not be running on the folder; ask a running one through its administration service.
    /// Exits with 1 when something is damaged or a pinned tree is incomplete.
    Fsck(FsckArgs),
    /// Delete what neither a pin nor a lease keeps, of a folder or a node that runs, or say why each blob stays.
    ///
    /// A node does this by itself (--gc-interval). Exits with 1 when incomplete pins keep everything.
    #[command(after_long_help = gc::EXAMPLES)]
    Gc(GcArgs),
    /// Say where the scrub is, which blobs are lost, and which pinned trees name them under which paths.
    ///
    /// Exits with 1 when something is lost.
    #[command(after_long_help = integrity::EXAMPLES)]
    Integrity(IntegrityArgs),
}

/// Options of `fsck`.
#[derive(Debug, Args)]
pub struct FsckArgs {
    /// Where the store is, and what it keeps where.
    #[command(flatten)]
    pub data: DataArgs,
    /// Set damaged copies aside, so that clients upload them again, and remove stray files.
    #[arg(long)]
    pub repair: bool,
}

/// Options of the server.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Where the store is, and what it keeps where.
    #[command(flatten)]
    pub data: DataArgs,
    /// The bucket behind it, if any.
    #[command(flatten)]
    pub tier: TierArgs,
    /// Address for gRPC; port 0 takes a free one, which is logged.
    #[arg(long, env = "AETHER_LISTEN", default_value = "127.0.0.1:8980", value_name = "IP:PORT")]
    pub listen: SocketAddr,
    /// Who may call and how; everybody in the clear without it.
    #[command(flatten)]
    pub guard: GuardArgs,
    /// How it looks after itself.
    #[command(flatten)]
    pub upkeep: UpkeepArgs,
    /// Address for /healthz, /readyz and /metrics.
    #[arg(long, env = "AETHER_HTTP", default_value = "127.0.0.1:9812", value_name = "IP:PORT")]
    pub http: SocketAddr,
    /// Time for calls to end after SIGTERM, in seconds.
    #[arg(long, env = "AETHER_GRACE", default_value = "20", value_name = "SECONDS", value_parser = seconds)]
    pub grace: Duration,
}

/// Who may call the store, and how.
#[derive(Debug, Args)]
pub struct GuardArgs {
    /// File of the certificate (PEM) to serve gRPC by, in TLS; read again as it changes. In the clear without it.
    #[arg(long, env = "AETHER_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// File of the certificate's key (PEM).
    #[arg(long, env = "AETHER_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// What a service account may do, as system:serviceaccount:NAMESPACE:NAME=read,write,pin,admin; the namespace may be *.
    /// Repeat it for each account. Tokens are checked by the Kubernetes API. Without any, nobody is asked for a token.
    #[arg(
        long,
        env = "AETHER_ALLOW",
        value_name = "ACCOUNT=PERMISSIONS",
        value_delimiter = ';',
        requires = "tls_cert"
    )]
    pub allow: Vec<Grant>,
}

/// Where a store is, and what it keeps where.
#[derive(Clone, Debug, Args)]
pub struct DataArgs {
    /// Folder of the store, made if it is not there. One process at a time may use it.
    #[arg(long, env = "AETHER_DATA_DIR", default_value = "/var/lib/aether-store", value_name = "FOLDER")]
    pub data_dir: PathBuf,
    /// Blobs of up to this many bytes are kept in the index, larger ones as files: 0 to 1048576.
    #[arg(long, env = "AETHER_INLINE_LIMIT", default_value_t = 16 << 10, value_name = "BYTES",
          value_parser = clap::value_parser!(u64).range(0..=1 << 20))]
    pub inline_limit: u64,
}

impl DataArgs {
    /// The folder, if there is a store in it: a mistyped one must not become an empty store that is found healthy.
    ///
    /// # Errors
    /// When there is none.
    pub fn existing(&self) -> anyhow::Result<std::path::Display<'_>> {
        let folder = self.data_dir.display();
        anyhow::ensure!(self.data_dir.join("index").is_dir(), "there is no store in {folder} (--data-dir)");
        Ok(folder)
    }

    /// The layout of the data folder.
    pub fn store(&self) -> LocalConfig {
        LocalConfig {
            objects: self.data_dir.join("objects"),
            index: self.data_dir.join("index"),
            inline_limit: self.inline_limit,
        }
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<u64>() {
        Ok(seconds) if (1..=3600).contains(&seconds) => Ok(Duration::from_secs(seconds)),
        _ => Err("a number of seconds from 1 to 3600 is expected".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn bad_values_are_refused_with_the_option_and_the_reason() {
        for (args, words) in [
            (&["--listen", "store:8980"][..], "--listen"),
            (&["--grace", "0"], "1 to 3600"),
            (&["--inline-limit", "9999999"], "--inline-limit"),
            (&["fsck", "--fix"], "--fix"),
            (&["gc", "--blobs"], "--dry-run"),
            (&["--gc-interval", "6"], "6h"),
            (&["--gc-rate", "0"], "--gc-rate"),
            (&["--cache-limit", "1Gi"], "--s3-bucket"),
            (&["--s3-bucket", "b", "--durability", "maybe"], "through"),
            (&["--tls-cert", "/c"], "--tls-key"),
            (&["--allow", "system:serviceaccount:a:b=read"], "--tls-cert"),
            (&["--tls-cert", "/c", "--tls-key", "/k", "--allow", "alice=read"], "alice=read"),
        ] {
            let error = Cli::try_parse_from([&["aether-store-node"], args].concat()).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn fsck_takes_its_own_folder() {
        let cli = Cli::try_parse_from(["aether-store-node", "fsck", "--data-dir", "/x", "--repair"]).unwrap();
        let Some(Command::Fsck(args)) = cli.command else { panic!("{cli:?}") };
        assert!(args.repair);
        assert_eq!(args.data.store().index, PathBuf::from("/x/index"));
    }
}
