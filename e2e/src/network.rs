//! The network of the test cluster: a bridge without an uplink, one network namespace per node, and routes such that no
//! packet to a pod, a service or a node can ever leave the machine.
//!
//! The first thing made and the last thing removed is a blackhole for the whole range; what may be reached is more
//! specific than it. Nodes have no default route. On a node the service range points to a device that drops: the kernel wants a
//! route before kube-proxy's rules rewrite the address, and what they do not rewrite is dropped there.

use std::{fs, net::IpAddr, path::Path};

use anyhow::Result;

use crate::command::run;

/// The machine's end of the bridge: API server, git server.
pub const HOST: &str = "10.97.0.1";
/// Where Services get their addresses.
pub const SERVICES: &str = "10.96.0.0/16";
/// The API server's own Service.
pub const API_SERVICE: &str = "10.96.0.1";
/// Where pods get their addresses: one /24 per node.
pub const PODS: &str = "10.98.0.0/16";

const BRIDGE: &str = "aether0";
/// Services, nodes and pods: 10.96 to 10.99.
const EVERYTHING: &str = "10.96.0.0/14";

/// A node's place in the network; nodes are counted from 1.
#[derive(Debug, Clone, Copy)]
pub struct NodeNetwork(pub u8);

impl NodeNetwork {
    /// The node's address.
    pub fn address(self) -> String {
        format!("10.97.0.{}", 10 + self.0)
    }

    /// The same, parsed.
    pub fn ip(self) -> IpAddr {
        IpAddr::from([10, 97, 0, 10 + self.0])
    }

    /// The addresses of its pods.
    pub fn pods(self) -> String {
        format!("10.98.{}.0/24", self.0)
    }

    /// Its network namespace, as `ip netns` names it.
    pub fn namespace(self) -> String {
        format!("aether-node-{}", self.0)
    }

    /// The namespace's file.
    pub fn namespace_file(self) -> String {
        format!("/run/netns/{}", self.namespace())
    }

    fn link(self) -> String {
        format!("aether{}", self.0)
    }

    /// Makes the namespace and joins it to the bridge and to the other nodes' pods.
    pub async fn create(self, nodes: u8) -> Result<()> {
        self.remove().await?;
        let (namespace, link) = (self.namespace(), self.link());
        ip(&format!("netns add {namespace}")).await?;
        let inside = format!("-n {namespace}");
        ip(&format!("{inside} route add blackhole {EVERYTHING}")).await?;
        ip(&format!("link add {link} type veth peer name eth0 netns {namespace}")).await?;
        ip(&format!("link set {link} master {BRIDGE} up")).await?;
        ip(&format!("{inside} link set lo up")).await?;
        ip(&format!("{inside} addr add {}/24 dev eth0", self.address())).await?;
        ip(&format!("{inside} link set eth0 up")).await?;
        // An `ifb` device drops what is sent into it; the kernel may be built without `dummy`.
        ip(&format!("{inside} link add services type ifb")).await?;
        ip(&format!("{inside} link set services up")).await?;
        ip(&format!("{inside} route add {SERVICES} dev services src {}", self.address())).await?;
        for other in (1..=nodes).filter(|other| *other != self.0).map(NodeNetwork) {
            ip(&format!("{inside} route add {} via {}", other.pods(), other.address())).await?;
        }
        run("nsenter", [&format!("--net={}", self.namespace_file()), "sysctl", "-qw", "net.ipv4.ip_forward=1"]).await?;
        // The machine itself reaches pods for webhooks and aggregated APIs.
        ip(&format!("route replace {} via {} dev {BRIDGE}", self.pods(), self.address())).await
    }

    /// Takes the node off the network, as if its cable were pulled.
    pub async fn cut(self) -> Result<()> {
        ip(&format!("link set {} down", self.link())).await
    }

    /// Puts the cable back.
    pub async fn heal(self) -> Result<()> {
        ip(&format!("link set {} up", self.link())).await
    }

    /// Removes the namespace and everything in it.
    pub async fn remove(self) -> Result<()> {
        if Path::new(&self.namespace_file()).exists() {
            ip(&format!("netns del {}", self.namespace())).await?;
        }
        // The pair goes with the namespace, but only some time later.
        if link_exists(&self.link()) {
            let _ = ip(&format!("link del {}", self.link())).await;
        }
        Ok(())
    }
}

/// Makes the blackhole, then the bridge.
pub async fn create() -> Result<()> {
    ip(&format!("route replace blackhole {EVERYTHING}")).await?;
    if !link_exists(BRIDGE) {
        ip(&format!("link add {BRIDGE} type bridge")).await?;
    }
    ip(&format!("addr replace {HOST}/24 dev {BRIDGE}")).await?;
    ip(&format!("link set {BRIDGE} up")).await
}

/// Removes the bridge, then the blackhole.
pub async fn remove() -> Result<()> {
    if link_exists(BRIDGE) {
        ip(&format!("link del {BRIDGE}")).await?;
    }
    // `ip netns` keeps a mount for its names; ours were the last.
    if fs::read_dir("/run/netns").is_ok_and(|mut names| names.next().is_none())
        && run("umount", ["/run/netns"]).await.is_ok()
    {
        fs::remove_dir("/run/netns")?;
    }
    if !run("ip", ["route", "show", "type", "blackhole", EVERYTHING]).await?.trim().is_empty() {
        ip(&format!("route del blackhole {EVERYTHING}")).await?;
    }
    Ok(())
}

fn link_exists(name: &str) -> bool {
    Path::new("/sys/class/net").join(name).exists()
}

async fn ip(args: &str) -> Result<()> {
    run("ip", args.split(' ')).await.map(drop)
}
