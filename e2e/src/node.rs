//! A node: a network, mount, pid, host name and IPC namespace with a containerd, a kubelet and a kube-proxy of its own.
//!
//! Inside it the usual paths (`/var/lib/kubelet`, `/var/lib/aether`, `/run/containerd` …) are the node's own, so a chart's
//! defaults hold on every node of one machine.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use serde_json::json;
use tokio::process::Command;

use crate::{
    command::{self, command, expect_success},
    init::{NodeSpec, Program},
    kernel,
    network::{NodeNetwork, PODS},
    options::Options,
    paths::Paths,
    pki::{Pki, Subject},
    process::{Process, Processes},
    third_party::Programs,
    wait,
};

/// One node of the cluster.
#[derive(Debug, Clone)]
pub struct Node {
    number: u8,
    paths: Paths,
    processes: Processes,
}

impl Node {
    /// The node of that number, counted from 1, running or not.
    pub fn new(number: u8, paths: &Paths) -> Self {
        Self { number, paths: paths.clone(), processes: Processes::new(paths.processes(), paths.logs()) }
    }

    /// `node-1`, `node-2`, …
    pub fn name(&self) -> String {
        format!("node-{}", self.number)
    }

    /// Its addresses and network namespace.
    pub fn network(&self) -> NodeNetwork {
        NodeNetwork(self.number)
    }

    /// Its disk, as the machine sees it: holds `kubelet`, `aether` and so on.
    pub fn disk(&self) -> PathBuf {
        self.paths.node(&self.name())
    }

    /// Its first process, if it is running.
    pub fn process(&self) -> Option<Process> {
        self.processes.get(&self.name())
    }

    /// Writes configuration and certificates. Once per cluster.
    pub fn configure(
        &self,
        pki: &Pki,
        server: &str,
        programs: &Programs,
        options: &Options,
        harness: &Path,
    ) -> Result<()> {
        let name = self.name();
        let disk = self.disk();
        for folder in ["config/cni", "kubelet", "aether", "logs/pods", "logs/containers"] {
            fs::create_dir_all(disk.join(folder))?;
        }
        let config = |file: &str| disk.join("config").join(file).display().to_string();
        let user = format!("system:node:{name}");
        pki.issue(
            "ca",
            &name,
            Subject { name: &name, group: None, names: &[&name], addresses: &[self.network().ip()] },
        )?;
        let kubelet = pki.component(server, Subject::user(&user, Some("system:nodes")))?;
        let proxy = pki.component(server, Subject::user("system:kube-proxy", None))?;

        fs::write(config("containerd.toml"), containerd_config())?;
        fs::write(config("cni/10-aether.conflist"), serde_json::to_vec_pretty(&self.cni_config())?)?;
        fs::write(config("kubelet.json"), serde_json::to_vec_pretty(&self.kubelet_config(pki, options))?)?;
        fs::write(config("proxy.json"), serde_json::to_vec_pretty(&self.proxy_config(&proxy))?)?;
        // There is no name server: a look-up must fail at once.
        fs::write(config("resolv.conf"), "nameserver 127.0.0.1\n")?;

        let containerd_socket = PathBuf::from("/run/containerd/containerd.sock");
        let spec = NodeSpec {
            pid_file: disk.join("pid"),
            binds: [
                ("kubelet", "/var/lib/kubelet"),
                ("aether", "/var/lib/aether"),
                ("aether-store", "/var/lib/aether-store"),
                ("config/cni", "/etc/cni/net.d"),
                ("logs/pods", "/var/log/pods"),
                ("logs/containers", "/var/log/containers"),
            ]
            .map(|(from, to)| (disk.join(from), PathBuf::from(to)))
            .into_iter()
            .chain([(self.paths.image_store(&name), PathBuf::from("/var/lib/containerd"))])
            .collect(),
            empty: ["/run", "/var/lib/cni"].map(PathBuf::from).to_vec(),
            keep: vec![
                self.paths.cache().to_owned(),
                PathBuf::from("/usr/bin"),
                PathBuf::from("/usr/lib"),
                PathBuf::from("/etc"),
            ],
            programs: vec![
                self.program(
                    "containerd",
                    &["containerd", "--config", &config("containerd.toml")],
                    Some(containerd_socket.clone()),
                ),
                self.program(
                    "kubelet",
                    &[
                        // Its client for a cloud's registry would ask a metadata server for five seconds.
                        "env",
                        "AWS_EC2_METADATA_DISABLED=true",
                        &programs.kubernetes("kubelet"),
                        "--config",
                        &config("kubelet.json"),
                        "--kubeconfig",
                        &kubelet,
                        "--hostname-override",
                        &name,
                        "--node-ip",
                        &self.network().address(),
                        "--container-runtime=remote",
                        &format!("--container-runtime-endpoint=unix://{}", containerd_socket.display()),
                        "--volume-plugin-dir=/var/lib/kubelet/volume-plugins",
                        "--v=2",
                    ],
                    None,
                ),
                self.program(
                    "kube-proxy",
                    &[&programs.kubernetes("kube-proxy"), "--config", &config("proxy.json"), "--v=1"],
                    None,
                ),
            ],
            name,
        };
        fs::write(self.fresh_mark(), "")?;
        fs::copy(harness, self.harness()).with_context(|| format!("cannot copy {}", harness.display()))?;
        Ok(fs::write(config("node.json"), serde_json::to_vec_pretty(&spec)?)?)
    }

    /// Starts the node with the disk it has, as if its power were switched on. `nodes` is how many the cluster has.
    pub async fn start(&self, nodes: u8) -> Result<()> {
        if self.process().is_some() {
            return Ok(());
        }
        let name = self.name();
        let launcher = format!("{name}-launcher");
        let _ = fs::remove_file(self.disk().join("pid"));
        if self.fresh_mark().exists() {
            self.forget_containers().await?;
            fs::remove_file(self.fresh_mark())?;
        }
        self.network().create(nodes).await?;
        kernel::create_cgroup(&self.cgroup())?;
        let argv = [
            "nsenter".to_owned(),
            format!("--net={}", self.network().namespace_file()),
            "unshare".into(),
            "--mount".into(),
            "--propagation=private".into(),
            "--pid".into(),
            "--fork".into(),
            "--kill-child".into(),
            "--uts".into(),
            "--ipc".into(),
            "--".into(),
            self.harness().display().to_string(),
            "node-init".into(),
            self.disk().join("config/node.json").display().to_string(),
        ];
        let started = self.processes.start(&launcher, &argv)?;
        let until = tokio::time::Instant::now() + Duration::from_secs(40);
        loop {
            if let Ok(pid) = fs::read_to_string(self.disk().join("pid")) {
                self.processes.record(&name, pid.trim().parse()?)?;
                return Ok(());
            }
            if !started.alive() || tokio::time::Instant::now() > until {
                bail!("{name} does not start: {}", self.processes.log_tail(&launcher));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Ends every process of the node at once and takes it off the network, as if its power were cut. Its disk stays.
    pub async fn kill(&self) -> Result<()> {
        let name = self.name();
        // A half-started node has a launcher whose end takes its first process with it.
        self.processes.stop(&format!("{name}-launcher"), Duration::ZERO).await?;
        kernel::thaw(&self.cgroup())?;
        self.processes.stop(&name, Duration::ZERO).await?;
        self.network().remove().await?;
        kernel::remove_cgroup(&self.cgroup()).await?;
        kernel::detach_loops(&self.disk()).await
    }

    /// A command that runs inside the node: its file system, its network, its processes.
    pub fn command(&self, argv: &[&str]) -> Result<Command> {
        let process = self.process().with_context(|| format!("{} is not running", self.name()))?;
        let target = process.pid.to_string();
        let enter = ["--target", &target, "--mount", "--net", "--pid", "--uts", "--ipc", "--"];
        Ok(command("nsenter", enter.iter().chain(argv)))
    }

    /// Runs a command inside the node to its end and gives its output.
    pub async fn run(&self, argv: &[&str]) -> Result<String> {
        Ok(expect_success(&mut self.command(argv)?).await?.stdout)
    }

    /// As [`Node::run`], without judging the exit code.
    pub async fn output(&self, argv: &[&str]) -> Result<command::Output> {
        command::output(&mut self.command(argv)?, None).await
    }

    /// The cgroup below which its kubelet keeps all pods.
    pub fn cgroup(&self) -> String {
        format!("aether-{}", self.name())
    }

    /// There until the node has started once in this cluster.
    fn fresh_mark(&self) -> PathBuf {
        self.disk().join("config/fresh")
    }

    /// Removes the containers of an earlier cluster from the image store, whose images are used again. A store that a killed run
    /// left unusable is dropped.
    async fn forget_containers(&self) -> Result<()> {
        let store = self.paths.image_store(&self.name());
        fs::create_dir_all(&store)?;
        if fs::read_dir(&store)?.next().is_none() {
            return Ok(());
        }
        let state = tempfile::tempdir()?;
        let (config, socket) = (state.path().join("config.toml"), state.path().join("socket"));
        let text = format!(
            "version = 2\nroot = {store:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {socket:?}\n",
            state.path().join("state")
        );
        fs::write(&config, text)?;
        let mut daemon = command("containerd", [Path::new("--config"), &config])
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        let address = socket.display().to_string();
        let ctr = async |args: &[&str]| {
            command::run("ctr", ["--address", &address, "--namespace", "k8s.io", "containers"].iter().chain(args)).await
        };
        let forgotten = async {
            let names = wait::until("containerd answers", Duration::from_secs(10), async || {
                ctr(&["list", "--quiet"]).await.map(Some)
            })
            .await?;
            let names: Vec<&str> = names.lines().collect();
            if !names.is_empty() {
                ctr(&[&["delete"], &names[..]].concat()).await?;
            }
            anyhow::Ok(())
        };
        let forgotten = forgotten.await;
        // Asked, so that it closes its database.
        if let Some(process) = daemon.id().and_then(|pid| Process::find(pid.cast_signed())) {
            process.signal(Signal::TERM);
        }
        daemon.wait().await?;
        if let Err(error) = forgotten {
            eprintln!("{}: dropping its image store: {error:#}", self.name());
            fs::remove_dir_all(&store)?;
            fs::create_dir_all(&store)?;
        }
        Ok(())
    }

    /// The copy of this program on its disk, which it runs.
    pub fn harness(&self) -> PathBuf {
        self.disk().join("aether-cluster")
    }

    fn program(&self, name: &str, argv: &[&str], socket: Option<PathBuf>) -> Program {
        Program {
            name: name.to_owned(),
            argv: argv.iter().map(|arg| (*arg).to_owned()).collect(),
            log: self.processes.log(&format!("{}-{name}", self.name())),
            socket,
        }
    }

    fn cni_config(&self) -> serde_json::Value {
        json!({
            "cniVersion": "0.4.0",
            "name": "aether",
            "plugins": [
                {
                    "type": "ptp",
                    "ipMasq": false,
                    "ipam": {
                        "type": "host-local",
                        "ranges": [[{"subnet": self.network().pods()}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                        // Below /run, so that addresses of pods that a power cut ended are free again.
                        "dataDir": "/run/cni-addresses",
                    },
                },
                {"type": "portmap", "capabilities": {"portMappings": true}},
            ],
        })
    }

    fn kubelet_config(&self, pki: &Pki, options: &Options) -> serde_json::Value {
        json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {"x509": {"clientCAFile": pki.path("ca.crt")}, "anonymous": {"enabled": false}},
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": pki.path(&format!("{}.crt", self.name())),
            "tlsPrivateKeyFile": pki.path(&format!("{}.key", self.name())),
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": format!("/{}", self.cgroup()),
            "enforceNodeAllocatable": [],
            "failSwapOn": false,
            "oomScoreAdj": 0,
            "maxPods": 250,
            "kubeAPIQPS": options.kubelet_qps,
            "kubeAPIBurst": 2 * options.kubelet_qps,
            "nodeLeaseDurationSeconds": options.node_lease_seconds,
            // Looks often, so that a node is Ready soon; writes only what changed.
            "nodeStatusUpdateFrequency": "2s",
            "nodeStatusReportFrequency": "1m",
            "serializeImagePulls": false,
            "imageGCHighThresholdPercent": 100,
            // Not in percent: one of a large disk is gigabytes, which other work on the machine may take for a while.
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "500Mi", "nodefs.inodesFree": "1%", "imagefs.available": "500Mi"},
            "evictionPressureTransitionPeriod": "10s",
            "resolvConf": self.disk().join("config/resolv.conf"),
            "healthzBindAddress": "127.0.0.1",
        })
    }

    fn proxy_config(&self, kubeconfig: &str) -> serde_json::Value {
        json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": kubeconfig},
            "hostnameOverride": self.name(),
            "mode": "iptables",
            "clusterCIDR": PODS,
            "iptables": {"minSyncPeriod": "100ms", "syncPeriod": "30s"},
            // Zero leaves the machine's connection tracking as it is.
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
            "oomScoreAdj": 0,
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": "127.0.0.1:10249",
        })
    }
}

/// The name of the image of every pod's sandbox.
pub const SANDBOX_IMAGE: &str = "docker.io/aether/pause:v3.2";

fn containerd_config() -> String {
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
  address = "/run/containerd/containerd.sock"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{SANDBOX_IMAGE}"
  # The machine may lack CAP_SYS_RESOURCE and AppArmor.
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
"#
    )
}
