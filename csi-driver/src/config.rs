//! What the driver is told at its start, parsed once into typed values. A bad value stops the start with a message
//! that says which and why.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use aether_credentials::Credentials;
use anyhow::{Context as _, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};

const EXAMPLES: &str = "\
Examples:
  # On a node of a cluster, as the DaemonSet runs it
  aether-csi-driver --node-name=$(NODE_NAME) --store=https://aether-store.aether-system.svc:8980 \\
    --store-ca=/var/run/aether/store/ca.crt --store-token=/var/run/aether/store/token

  # Sessions on a disk of their own
  aether-csi-driver --node-name=node-1 --store=http://10.0.0.7:8980 --pool=btrfs-device --pool-device=/dev/nvme1n1

  # A kernel without btrfs: any file system will do, snapshots are slower
  aether-csi-driver --node-name=node-1 --store=http://10.0.0.7:8980 --pool=directory

  # The Controller service, beside the standard external-provisioner and external-snapshotter
  aether-csi-driver controller --csi-address=/csi/csi.sock";

/// The node driver of Aether: mounts sessions for pods, holds their writer's lease, takes checkpoints and forks.
#[derive(Parser, Debug)]
#[command(
    name = "aether-csi-driver",
    version,
    after_help = EXAMPLES,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
pub(crate) struct Arguments {
    /// What to be instead of a node's driver
    #[command(subcommand)]
    pub(crate) role: Option<Role>,
    /// Name of this node, as its Node object has it
    #[arg(long, env = "NODE_NAME", required = true)]
    node_name: Option<String>,
    /// Everything the node keeps: sessions, contents, images, mounts, records
    #[arg(long, env = "AETHER_STATE_DIR", default_value = "/var/lib/aether")]
    state_dir: PathBuf,
    /// Root directory of the kubelet
    #[arg(long, env = "AETHER_KUBELET_DIR", default_value = "/var/lib/kubelet")]
    kubelet_dir: PathBuf,
    /// The cluster's content store: https://HOST:PORT, or http://
    #[arg(long, env = "AETHER_STORE", required = true)]
    store: Option<String>,
    /// How to know the store, and what to show to it
    #[command(flatten)]
    credentials: Credentials,
    /// Where sessions are written
    #[arg(long, env = "AETHER_POOL", value_enum, default_value_t = PoolKind::BtrfsImage)]
    pool: PoolKind,
    /// Size of the image that --pool=btrfs-image makes at its first start, such as 20Gi
    #[arg(long, env = "AETHER_POOL_SIZE", default_value = "20Gi")]
    pool_size: Size,
    /// The block device of --pool=btrfs-device
    #[arg(long, env = "AETHER_POOL_DEVICE")]
    pool_device: Option<PathBuf>,
    /// Memory for sessions of medium Memory, such as 4Gi; none without it. When full they take twice that
    #[arg(long, env = "AETHER_MEMORY_SIZE")]
    memory_size: Option<Size>,
    /// What contents that nothing here uses may fill together with those in use, such as 100Gi; no limit without it
    #[arg(long, env = "AETHER_OBJECT_LIMIT")]
    object_limit: Option<Size>,
    /// Mount sessions before their contents are here, over the lazy layer that aether-lazy serves in the state directory.
    /// While it does not answer, contents are fetched before the mount
    #[arg(long, env = "AETHER_LAZY")]
    lazy: bool,
    /// What the background may fetch in a second while nobody waits for it, such as 64Mi; no limit without it
    #[arg(long, env = "AETHER_HYDRATION_BANDWIDTH")]
    hydration_bandwidth: Option<Size>,
    /// The cgroup below which the kubelet keeps its pods, as a directory, to hold them still during a snapshot; found
    /// by itself unless the node runs several kubelets
    #[arg(long, env = "AETHER_CGROUP_ROOT")]
    cgroup_root: Option<PathBuf>,
    /// Address of health (/healthz, /readyz) and metrics (/metrics)
    #[arg(long, env = "AETHER_HTTP", default_value = "127.0.0.1:9811")]
    http: SocketAddr,
    /// How many volumes the scheduler may place on this node
    #[arg(long, env = "AETHER_MAX_VOLUMES", default_value_t = 1000)]
    max_volumes: u32,
    /// How many digests and uploads run at a time
    #[arg(long, env = "AETHER_WORKERS", default_value_t = 4)]
    workers: u16,
}

/// What the program can be beside a node's driver.
#[derive(Subcommand, Debug)]
pub(crate) enum Role {
    /// Serve the CSI Controller service, for the standard sidecars: needs no node, no store and no privilege
    Controller(ControllerArguments),
}

/// How the Controller service is served.
#[derive(Args, Debug)]
pub(crate) struct ControllerArguments {
    /// The socket that the sidecars call: a path, or unix:// and a path
    #[arg(long, env = "CSI_ADDRESS", default_value = "/csi/csi.sock")]
    csi_address: String,
    /// Address of health (/healthz, /readyz) and metrics (/metrics)
    #[arg(long, env = "AETHER_HTTP", default_value = "127.0.0.1:9812")]
    pub(crate) http: SocketAddr,
}

impl ControllerArguments {
    /// Where to listen.
    pub(crate) fn socket(&self) -> PathBuf {
        self.csi_address.strip_prefix("unix://").unwrap_or(&self.csi_address).into()
    }
}

/// Where sessions are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PoolKind {
    /// A preallocated btrfs image in the state directory
    BtrfsImage,
    /// A block device, made btrfs at the first start when it is empty
    BtrfsDevice,
    /// A directory of whatever file system the state directory is on
    Directory,
}

/// A number of bytes with a unit, as Kubernetes writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        aether_api::quantity::parse(text).map(Self)
    }
}

/// Where sessions are written, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Pool {
    /// A preallocated image of so many bytes.
    BtrfsImage(u64),
    /// A block device.
    BtrfsDevice(PathBuf),
    /// A directory.
    Directory,
}

/// The configuration, checked.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub node: String,
    pub state_dir: PathBuf,
    pub kubelet_dir: PathBuf,
    pub store: String,
    pub credentials: Credentials,
    pub pool: Pool,
    /// Bytes for sessions in memory.
    pub memory: Option<u64>,
    /// Bytes for the object cache.
    pub object_limit: Option<u64>,
    /// Whether sessions may be mounted over the lazy layer.
    pub lazy: bool,
    /// Bytes a second for the background.
    pub hydration_bandwidth: Option<u64>,
    pub cgroup_root: Option<PathBuf>,
    pub http: SocketAddr,
    pub max_volumes: i64,
    pub workers: usize,
}

/// How long before the caller's deadline a waiting publish gives up, so that its answer still arrives.
const MARGIN: Duration = Duration::from_secs(10);
/// The kubelet's limit for a publish, when the call does not say.
const PUBLISH_LIMIT: Duration = Duration::from_secs(120);

impl Config {
    /// The configuration of the command line and the environment.
    ///
    /// # Errors
    /// Names the value that cannot be used, and why.
    pub(crate) fn new(arguments: Arguments) -> anyhow::Result<Self> {
        let pool = match (arguments.pool, arguments.pool_device) {
            (PoolKind::BtrfsDevice, None) => bail!("--pool=btrfs-device needs --pool-device=/dev/…"),
            (PoolKind::BtrfsDevice, Some(device)) => Pool::BtrfsDevice(device),
            (_, Some(device)) => bail!("--pool-device={} is for --pool=btrfs-device only", device.display()),
            (PoolKind::BtrfsImage, None) => {
                if arguments.pool_size.0 < 256 << 20 {
                    bail!("--pool-size={} is below the 256Mi that btrfs needs", arguments.pool_size.0);
                }
                Pool::BtrfsImage(arguments.pool_size.0)
            }
            (PoolKind::Directory, None) => Pool::Directory,
        };
        if let Some(size) = arguments.memory_size
            && size.0 < 256 << 20
        {
            bail!("--memory-size={} is below the 256Mi that btrfs needs", size.0);
        }
        if let Some(size) = arguments.hydration_bandwidth
            && size.0 < 1 << 20
        {
            bail!("--hydration-bandwidth={} is below 1Mi, with which contents never arrive", size.0);
        }
        let (node, store) = (arguments.node_name.unwrap_or_default(), arguments.store.unwrap_or_default());
        if node.is_empty() {
            bail!("--node-name is empty");
        }
        for (option, path) in [("--state-dir", &arguments.state_dir), ("--kubelet-dir", &arguments.kubelet_dir)] {
            if !path.is_absolute() {
                bail!("{option}={} is not an absolute path", path.display());
            }
        }
        if !store.starts_with("http://") && !store.starts_with("https://") {
            bail!("--store={store} is not of the form https://HOST:PORT or http://HOST:PORT");
        }
        std::fs::create_dir_all(&arguments.state_dir)
            .with_context(|| format!("cannot make --state-dir {}", arguments.state_dir.display()))?;
        Ok(Self {
            node,
            state_dir: arguments.state_dir,
            kubelet_dir: arguments.kubelet_dir,
            store,
            credentials: arguments.credentials,
            pool,
            memory: arguments.memory_size.map(|size| size.0),
            object_limit: arguments.object_limit.map(|size| size.0),
            lazy: arguments.lazy,
            hydration_bandwidth: arguments.hydration_bandwidth.map(|size| size.0),
            cgroup_root: arguments.cgroup_root,
            http: arguments.http,
            max_volumes: i64::from(arguments.max_volumes),
            workers: usize::from(arguments.workers.max(1)),
        })
    }

    /// The socket of `aether-node`.
    pub(crate) fn admin_socket(&self) -> PathBuf {
        admin_socket(&self.state_dir)
    }
}

/// The socket of `aether-node` for a state directory.
pub(crate) fn admin_socket(state_dir: &Path) -> PathBuf {
    state_dir.join("admin.sock")
}

/// How long a publish may wait, given the `grpc-timeout` header of its call: until 10 s before its end, or half of it
/// when it is short.
pub(crate) fn patience(grpc_timeout: Option<&str>) -> Duration {
    let limit = grpc_timeout.and_then(parse_grpc_timeout).unwrap_or(PUBLISH_LIMIT);
    if limit >= 2 * MARGIN { limit - MARGIN } else { limit / 2 }
}

/// `<digits><unit>` of the gRPC specification, unit one of H, M, S, m, u, n.
fn parse_grpc_timeout(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = number.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number.checked_mul(3600)?),
        "M" => Duration::from_secs(number.checked_mul(60)?),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiting_publish_answers_before_the_deadline_of_its_caller() {
        assert_eq!(patience(None), Duration::from_secs(110));
        assert_eq!(patience(Some("119999999u")), Duration::from_micros(109_999_999));
        assert_eq!(patience(Some("15S")), Duration::from_millis(7_500));
        assert_eq!(patience(Some("nonsense")), Duration::from_secs(110));
    }

    #[test]
    fn a_pool_that_contradicts_itself_stops_the_start() {
        let arguments = |extra: &[&str]| {
            let mut all =
                vec!["aether-csi-driver", "--node-name=n", "--store=http://s:1", "--state-dir=/nonexistent/aether"];
            all.extend(extra);
            Arguments::try_parse_from(all).expect("arguments parse")
        };
        let message = |extra: &[&str]| Config::new(arguments(extra)).expect_err("must not start").to_string();
        assert!(message(&["--pool=btrfs-device"]).contains("--pool-device"));
        assert!(message(&["--pool=directory", "--pool-device=/dev/x"]).contains("btrfs-device only"));
        assert!(message(&["--pool-size=1Mi"]).contains("256Mi"));
        assert!(message(&["--memory-size=1Mi"]).contains("256Mi"));
        assert!(message(&["--hydration-bandwidth=1Ki"]).contains("1Mi"));
    }

    #[test]
    fn the_controller_needs_no_node_and_a_node_driver_does() {
        let arguments =
            Arguments::try_parse_from(["aether-csi-driver", "controller", "--csi-address=unix:///run/x.sock"]).unwrap();
        let Some(Role::Controller(controller)) = arguments.role else { panic!("{arguments:?}") };
        assert_eq!(controller.socket(), Path::new("/run/x.sock"));
        for arguments in [&["aether-csi-driver"][..], &["aether-csi-driver", "--node-name=a"]] {
            assert!(Arguments::try_parse_from(arguments).is_err(), "{arguments:?}");
        }
    }
}
