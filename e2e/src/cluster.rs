//! The cluster as a whole: brought up, found again, taken down.
//!
//! There is one per machine. Its record and the pids of its programs lie in the cluster's folder, so any later command or test
//! finds it, and what a killed run left behind is recognised and removed.

use std::{
    fs::{self, File},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{self as core, NodeCondition as Condition};
use kube::{
    Api, Client, Config,
    api::{Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    control_plane::{self, SERVER},
    images::{self, Image},
    kernel, network,
    node::Node,
    options::Options,
    paths::Paths,
    pki::{Pki, Subject, write_private},
    process::Processes,
    third_party::Programs,
    wait,
};

/// A running cluster.
#[derive(Clone)]
pub struct Cluster {
    /// Where its files are.
    pub paths: Paths,
    /// What was chosen when it was brought up.
    pub options: Options,
    /// kubectl, helm and the server programs.
    pub programs: Programs,
    /// A client with all rights.
    pub client: Client,
}

/// What is written once a cluster is up.
#[derive(Serialize, Deserialize)]
struct Record {
    options: Options,
    programs: Programs,
}

/// Reports progress on standard error, with the time since the beginning.
struct Progress(Instant);

impl Progress {
    fn say(&self, what: &str) {
        eprintln!("{:>7.1} s  {what}", self.0.elapsed().as_secs_f64());
    }
}

impl Cluster {
    /// The running cluster; an error that says how to start it when there is none.
    pub async fn connect() -> Result<Self> {
        Self::connect_at(&Paths::from_environment()?).await
    }

    async fn connect_at(paths: &Paths) -> Result<Self> {
        let record = fs::read(paths.record()).context("no test cluster is up; start one with `make cluster-up`")?;
        let Record { options, programs } = serde_json::from_slice(&record)?;
        let client = client(Kubeconfig::read_from(paths.kubeconfig())?).await?;
        let cluster = Self { paths: paths.clone(), options, programs, client };
        if let Some(dead) = cluster.dead() {
            bail!("the test cluster is broken: {dead} has ended; `make cluster-down` removes it");
        }
        Ok(cluster)
    }

    /// Brings the cluster up, unless it is up with these options. `harness` is the `aether-cluster` program, which nodes run.
    pub async fn up(options: &Options, harness: &std::path::Path) -> Result<Self> {
        let progress = Progress(Instant::now());
        let paths = Paths::from_environment()?;
        let _lock = lock(&paths)?;
        if paths.cluster().exists() {
            match Self::connect_at(&paths).await {
                Ok(cluster) if cluster.options == *options && cluster.mend().await.is_ok() => {
                    progress.say("the cluster is up already");
                    return Ok(cluster);
                }
                Ok(_) => progress.say("a cluster with other options, or not ready, is there: removing it"),
                Err(_) => progress.say("removing what an unfinished run left behind"),
            }
            remove(&paths).await?;
        }
        let started = Self::start(&paths, options, harness, &progress).await;
        if started.is_err() {
            let kept = keep_logs(&paths);
            remove(&paths).await?;
            return started.with_context(|| format!("the cluster did not start; its logs are in {}", kept.display()));
        }
        started
    }

    async fn start(paths: &Paths, options: &Options, harness: &std::path::Path, progress: &Progress) -> Result<Self> {
        let programs = Programs::provide().await?;
        progress.say("programs are there");
        fs::create_dir_all(paths.cluster())?;
        kernel::keep_settings(&paths.cluster().join("kernel-settings.json"))?;
        network::create().await?;
        let pki = Pki::at(paths.pki());
        let processes = Processes::new(paths.processes(), paths.logs());
        control_plane::configure(paths, &pki)?;
        let client = client(Kubeconfig::read_from(paths.kubeconfig())?).await?;
        let cluster = Self { paths: paths.clone(), options: options.clone(), programs, client };

        let control_plane = async {
            control_plane::start(paths, &pki, &cluster.programs, options, &processes).await?;
            wait::until("the API server is ready", Duration::from_secs(60), async || {
                cluster.api_ready().await.map(Some)
            })
            .await?;
            progress.say("the control plane is ready");
            Ok(())
        };
        // A kubelet looks for Docker for five seconds before anything else; the API server starts meanwhile.
        let sandbox = images::sandbox(paths, &cluster.programs)?;
        let start = |node: Node| {
            let (cluster, pki, sandbox) = (&cluster, &pki, &sandbox);
            async move {
                node.configure(pki, SERVER, &cluster.programs, options, harness)?;
                node.start(options.nodes).await?;
                images::load(&cluster.paths, &node, std::slice::from_ref(sandbox)).await?;
                cluster.assign_pods(&node).await
            }
        };
        tokio::try_join!(control_plane, futures::future::try_join_all(cluster.nodes().into_iter().map(start)))?;
        wait::until("all nodes are Ready", Duration::from_secs(90), async || cluster.ready().await.map(Some)).await?;
        let record = Record { options: options.clone(), programs: cluster.programs.clone() };
        fs::write(paths.record(), serde_json::to_vec_pretty(&record)?)?;
        progress.say(&format!("{} nodes are Ready", options.nodes));
        Ok(cluster)
    }

    /// Takes the cluster down, whatever state it is in.
    pub async fn down() -> Result<()> {
        let paths = Paths::from_environment()?;
        let _lock = lock(&paths)?;
        remove(&paths).await
    }

    /// Its nodes.
    pub fn nodes(&self) -> Vec<Node> {
        (1..=self.options.nodes).map(|number| Node::new(number, &self.paths)).collect()
    }

    /// A node by its name.
    pub fn node(&self, name: &str) -> Result<Node> {
        self.nodes().into_iter().find(|node| node.name() == name).with_context(|| {
            let known: Vec<String> = self.nodes().iter().map(Node::name).collect();
            format!("there is no node {name}; there are {}", known.join(", "))
        })
    }

    /// Starts a killed node again, with the disk it had, and waits until it is Ready.
    pub async fn start_node(&self, name: &str) -> Result<()> {
        let node = self.node(name)?;
        // What its object says may be of the time before it ended; reports tell time in whole seconds.
        let reported_since = node.process().is_none().then(|| Timestamp::now() - jiff::SignedDuration::from_secs(1));
        node.start(self.options.nodes).await?;
        let ready = async || self.node_ready(name, reported_since).await.map(Some);
        wait::until(&format!("{name} is Ready"), Duration::from_secs(90), ready).await
    }

    /// An error that says what is not ready yet.
    pub async fn ready(&self) -> Result<()> {
        self.api_ready().await?;
        for node in self.nodes() {
            self.node_ready(&node.name(), None).await?;
        }
        Ok(())
    }

    /// Makes images of what `make build` has built, and loads them into every node; gives all of them.
    pub async fn load_images(&self) -> Result<Vec<Image>> {
        let progress = Progress(Instant::now());
        let mut all = images::product(&self.paths).await?;
        all.push(images::tools(&self.paths).await?);
        progress.say("images are made");
        for node in self.nodes() {
            let loaded = images::load(&self.paths, &node, &all).await?;
            progress.say(&format!(
                "{}: {}",
                node.name(),
                if loaded.is_empty() { "has all images".into() } else { format!("loaded {}", loaded.join(", ")) }
            ));
        }
        Ok(all)
    }

    /// Loads the image of agents' pods alone; enough for tests of the cluster itself.
    pub async fn load_tools(&self) -> Result<()> {
        let tools = images::tools(&self.paths).await?;
        for node in self.nodes() {
            images::load(&self.paths, &node, std::slice::from_ref(&tools)).await?;
        }
        Ok(())
    }

    /// Makes the image of a developer's pod and loads it into one node; its name.
    pub async fn load_developer(&self, node: &str) -> Result<&'static str> {
        let image = images::developer(&self.paths).await?;
        images::load(&self.paths, &self.node(node)?, std::slice::from_ref(&image)).await?;
        Ok(images::DEVELOPER)
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.paths.kubeconfig()
    }

    /// Shell lines that make kubectl, helm and `kubectl aether` use the cluster.
    pub fn environment(&self) -> String {
        let programs = [self.programs.bin().to_owned(), images::target_folder().join("debug")];
        let path: Vec<String> = programs.iter().map(|folder| folder.display().to_string()).collect();
        format!("export KUBECONFIG={}\nexport PATH={}:\"$PATH\"", self.kubeconfig().display(), path.join(":"))
    }

    /// A kubeconfig for a user of that name and group, whose commands are about this namespace unless they say another; its path.
    pub fn kubeconfig_for(&self, user: &str, group: Option<&str>, namespace: &str) -> Result<PathBuf> {
        let path = self.paths.pki().join(format!("user-{}.kubeconfig", user.replace([':', '/'], "-")));
        write_private(&path, &Pki::at(self.paths.pki()).kubeconfig(SERVER, Subject::user(user, group), namespace)?)?;
        Ok(path)
    }

    /// A client that is a user of that name and group.
    pub async fn client_for(&self, user: &str, group: Option<&str>) -> Result<Client> {
        client(Kubeconfig::read_from(self.kubeconfig_for(user, group, "default")?)?).await
    }

    /// Tells a node's object the addresses of its pods: a kubelet that sees them becomes Ready at once, and without them with
    /// its next report, ten seconds later.
    async fn assign_pods(&self, node: &Node) -> Result<()> {
        let pods = node.network().pods();
        let patch = Patch::Merge(json!({"spec": {"podCIDR": pods, "podCIDRs": [pods]}}));
        let api = Api::<core::Node>::all(self.client.clone());
        wait::until(&format!("{} registers", node.name()), Duration::from_secs(60), async || {
            Ok(Some(api.patch(&node.name(), &PatchParams::default(), &patch).await?))
        })
        .await
        .map(drop)
    }

    /// The program of the control plane that has ended, if any.
    fn dead(&self) -> Option<&'static str> {
        let processes = Processes::new(self.paths.processes(), self.paths.logs());
        control_plane::PROGRAMS.into_iter().find(|name| processes.get(name).is_none())
    }

    /// Puts every node back that a test has killed or cut off.
    async fn mend(&self) -> Result<()> {
        for node in self.nodes() {
            node.network().heal().await.or_else(|error| if node.process().is_some() { Err(error) } else { Ok(()) })?;
            self.start_node(&node.name()).await?;
        }
        Ok(())
    }

    async fn api_ready(&self) -> Result<()> {
        self.client.request_text(http::Request::get("/readyz").body(Vec::new())?).await?;
        Ok(())
    }

    async fn node_ready(&self, name: &str, reported_since: Option<Timestamp>) -> Result<()> {
        let node = Api::<core::Node>::all(self.client.clone()).get(name).await?;
        let conditions = node.status.unwrap_or_default().conditions.unwrap_or_default();
        match conditions.iter().find(|condition| condition.type_ == "Ready") {
            Some(Condition { last_heartbeat_time, .. })
                if reported_since
                    .is_some_and(|since| last_heartbeat_time.as_ref().is_none_or(|time| time.0 < since)) =>
            {
                bail!("{name} has not reported since it was started")
            }
            Some(condition) if condition.status == "True" => Ok(()),
            Some(condition) => {
                bail!("{name} is not Ready: {}", condition.message.as_deref().unwrap_or("no reason given"))
            }
            None => bail!("{name} has said nothing yet"),
        }
    }
}

async fn client(kubeconfig: Kubeconfig) -> Result<Client> {
    Ok(Client::try_from(Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?)?)
}

/// Held by whoever changes the cluster; waits for its turn.
fn lock(paths: &Paths) -> Result<File> {
    fs::create_dir_all(paths.cache())?;
    let lock = File::create(paths.lock())?;
    if lock.try_lock().is_err() {
        eprintln!("another command is changing the cluster: waiting");
        lock.lock()?;
    }
    Ok(lock)
}

/// Logs of a cluster that is about to be removed.
fn keep_logs(paths: &Paths) -> PathBuf {
    let kept = paths.cache().join("last-failure");
    let _ = fs::remove_dir_all(&kept);
    let _ = fs::rename(paths.logs(), &kept);
    kept
}

/// Ends and removes everything, in an order in which nothing can leave the machine and nothing stays busy.
async fn remove(paths: &Paths) -> Result<()> {
    let processes = Processes::new(paths.processes(), paths.logs());
    let nodes = fs::read_dir(paths.cluster().join("nodes")).map_or(0, Iterator::count);
    let nodes = u8::try_from(nodes)?;
    let ended = futures::future::join_all((1..=nodes).map(|number| {
        let node = Node::new(number, paths);
        async move { node.kill().await }
    }));
    for result in ended.await {
        result?;
    }
    for name in processes.names() {
        // The etcd of a test has nothing to save.
        processes.stop(&name, Duration::ZERO).await?;
    }
    network::remove().await?;
    kernel::restore_settings(&paths.cluster().join("kernel-settings.json"))?;
    match fs::remove_dir_all(paths.cluster()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", paths.cluster().display()))
        }
        _ => Ok(()),
    }
}
