//! `aether`: the engine as the node's driver uses it, with a store node on the loopback.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aether_cas::tree::Owner;
use aether_cas::{Blob, RemoteStore};
use aether_engine::pool::PoolConfig;
use aether_engine::{Config, Engine, Image};
use aether_importer::cli::Git;
use aether_importer::git::Imported;
use aether_importer::report::Reporter;
use anyhow::{Context, Result, anyhow, bail};
use tokio::runtime::Runtime;

use super::{Idle, Subject};
use crate::stage::free_address;

/// Files of a session belong to whoever works in it; here that is who runs the benchmark.
pub(crate) const OWNER: Owner = Owner { uid: 0, gid: 0 };

/// A store node with the tree in it.
pub(crate) struct Source {
    pub(crate) address: String,
    pub(crate) root: Blob,
    pub(crate) files: u64,
    pub(crate) bytes: u64,
    /// Ends with the namespace.
    _server: Child,
}

impl Source {
    /// Starts the store node in `home` and imports the repository, as a source of the cluster is imported.
    pub(crate) fn start(runtime: &Runtime, home: &Path, repository: &Path) -> Result<Self> {
        let (address, server) = start_store(home)?;
        let asked = Git { url: format!("file://{}", repository.display()), ..Git::default() };
        runtime.block_on(async {
            let store = connect(&address).await?;
            let reporter = Arc::new(Reporter::to(Box::new(std::io::sink())));
            let (worktree, scratch) = (home.join("worktree"), home.join("home"));
            fs::create_dir(&scratch)?;
            let imported = aether_importer::git::import(&asked, &worktree, &scratch, &store, reporter)
                .await
                .map_err(|error| anyhow!("import the tree: {error}"))?;
            let Imported::Commit(_, stored) = imported else { bail!("nothing was imported") };
            fs::remove_dir_all(&worktree)?;
            Ok(Self {
                address: address.clone(),
                root: stored.root,
                files: stored.counts.files,
                bytes: stored.counts.bytes,
                _server: server,
            })
        })
    }
}

/// Starts a store node with its data in `home`, and says where it will answer.
pub(crate) fn start_store(home: &Path) -> Result<(String, Child)> {
    fs::create_dir_all(home)?;
    let program = std::env::current_exe()?.with_file_name("aether-store-node");
    let (listen, http) = (free_address()?, free_address()?);
    let server = Command::new(&program)
        .args(["--listen", &listen.to_string(), "--http", &http.to_string(), "--data-dir"])
        .arg(home.join("data"))
        .stdin(Stdio::null())
        .stdout(File::create(home.join("log"))?)
        .stderr(File::create(home.join("errors"))?)
        .spawn()
        .with_context(|| format!("start {}; build it with `cargo build -p aether-store-node`", program.display()))?;
    Ok((format!("http://{listen}"), server))
}

/// Connects once the store answers.
pub(crate) async fn connect(address: &str) -> Result<RemoteStore> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match RemoteStore::connect(address).await {
            Ok(store) => return Ok(store),
            Err(error) if Instant::now() > deadline => bail!("the store at {address} does not answer: {error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

pub(crate) struct Aether {
    runtime: Arc<Runtime>,
    engine: Engine,
    image: Image,
    targets: PathBuf,
}

impl Aether {
    /// An engine in `home` with a pool of `gib` GiB, and the tree on this node.
    pub(crate) fn new(runtime: Arc<Runtime>, home: &Path, gib: u64, source: &Source) -> Result<Self> {
        let config = Config { pool: PoolConfig::Image { bytes: gib << 30 }, ..Config::new(home.join("node")) };
        let (engine, image) = runtime.block_on(async {
            let engine = Engine::open(config).await?;
            let store = connect(&source.address).await?;
            let image = engine.ensure_image(source.root, OWNER, &store, &|_| ()).await?;
            Ok::<_, anyhow::Error>((engine, image))
        })?;
        let targets = home.join("targets");
        fs::create_dir_all(&targets)?;
        Ok(Self { runtime, engine, image, targets })
    }

    /// Where its pool is mounted.
    pub(crate) fn pool(&self) -> PathBuf {
        self.engine.config().root.join("pool")
    }

    /// The tree of the image, which is the lower layer of its sessions.
    pub(crate) fn lower(&self) -> PathBuf {
        let mountpoint = self.engine.config().root.join("mnt/image").join(self.image.id().to_string());
        mountpoint.join(aether_engine::image::TREE)
    }

    fn target(&self, copy: &str) -> PathBuf {
        self.targets.join(copy)
    }
}

fn snapshot_of(copy: &str) -> String {
    format!("for-{copy}")
}

impl Subject for Aether {
    fn name(&self) -> &'static str {
        "aether"
    }

    fn create(&mut self, copy: &str) -> Result<PathBuf> {
        let target = self.target(copy);
        self.runtime.block_on(async {
            self.engine.create_session(copy, &self.image).await?;
            self.engine.publish(copy, &target, false).await
        })?;
        Ok(target)
    }

    fn fork(&mut self, from: &str, copy: &str) -> Result<PathBuf> {
        let (target, snapshot) = (self.target(copy), snapshot_of(copy));
        self.runtime.block_on(async {
            self.engine.snapshot(from, &snapshot, &[], None).await?;
            self.engine.fork_session(copy, &snapshot).await?;
            self.engine.publish(copy, &target, false).await
        })?;
        Ok(target)
    }

    fn checkpoint(&mut self, from: &str, name: &str) -> Result<()> {
        self.runtime.block_on(self.engine.snapshot(from, name, &[], None))?;
        Ok(())
    }

    fn remove(&mut self, copy: &str) -> Result<()> {
        let (target, snapshot) = (self.target(copy), snapshot_of(copy));
        self.runtime.block_on(async {
            self.engine.unpublish(&target).await?;
            self.engine.delete_session(copy).await?;
            self.engine.delete_snapshot(&snapshot).await
        })?;
        Ok(())
    }

    fn drop_checkpoint(&mut self, name: &str) -> Result<()> {
        Ok(self.runtime.block_on(self.engine.delete_snapshot(name))?)
    }

    fn file_system(&self) -> PathBuf {
        self.pool()
    }

    fn idle(&self) -> Idle {
        Idle::Kernel(300)
    }
}
