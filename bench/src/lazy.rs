//! The `lazy-*` cases: a node that has never seen the source, and a store some way off.
//!
//! Time starts when the node is asked for a session and runs until the first file has been read, and on until the first
//! `git status` is through. What stands on the node anyway (engine, lazy server) is there before. As in the driver,
//! contents come in the background meanwhile. Beside it stands `git clone` of one commit from a git server as far off.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aether_cas::lazy::Places;
use aether_engine::pool::PoolConfig;
use aether_engine::{Config, Engine, mount};
use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use crate::cases::say;
use crate::report::Measurements;
use crate::stage::{free_address, go_on, run, wait_until};
use crate::subject::{OWNER, Source, connect, is_ours};
use crate::workload::{self, drop_caches};

/// Added to each way, and the ends of the cases' names.
const DELAYS: [(&str, Duration); 2] = [("", Duration::ZERO), ("-20ms", Duration::from_millis(10))];
/// What is read first.
const FIRST: &str = "README.md";
/// Size of the pool of a node that is thrown away.
pub(crate) const POOL_GIB: u64 = 2;

/// What the cases need.
pub(crate) struct Far<'a> {
    pub(crate) runtime: Arc<Runtime>,
    pub(crate) work: &'a Path,
    pub(crate) source: &'a Source,
    pub(crate) repository: &'a Path,
    pub(crate) rounds: usize,
    pub(crate) wanted: &'a [&'static str],
    pub(crate) subjects: &'a [&'static str],
}

impl Far<'_> {
    pub(crate) fn run(&self, measured: &mut Measurements) -> Result<()> {
        let cases: Vec<_> = self.wanted.iter().copied().filter(|case| case.starts_with("lazy-")).collect();
        if cases.is_empty() {
            return Ok(());
        }
        for subject in self.subjects.iter().filter(|subject| **subject != "copy" && !is_ours(subject)) {
            for case in &cases {
                measured.missing(
                    case,
                    subject,
                    "the whole tree must be on the node first: see copy, which is `git clone` here",
                );
            }
        }
        let git = GitServer::start(self.repository)?;
        for round in 0..=self.rounds {
            for (end, delay) in DELAYS {
                let names = [format!("lazy-first-file{end}"), format!("lazy-usable{end}")];
                if !names.iter().any(|name| cases.contains(&name.as_str())) {
                    continue;
                }
                for subject in self.subjects.iter().filter(|subject| matches!(**subject, "aether" | "copy")) {
                    go_on()?;
                    say(&format!("round {round} of {}: a source never seen{end} by {subject}", self.rounds));
                    let took = match *subject {
                        "aether" => self.session(&format!("{round}{end}"), delay).context("a lazy session")?,
                        _ => self.clone_from(git.address, delay).context("clone from a git server")?,
                    };
                    for (name, took) in names.iter().zip(took) {
                        if let Some(case) = cases.iter().find(|case| *case == name) {
                            measured.add(case, subject, "ms", took);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// One node from its birth to its end.
    fn session(&self, name: &str, delay: Duration) -> Result<[f64; 2]> {
        let home = self.work.join(format!("lazy{name}"));
        fs::create_dir(&home)?;
        let store = self.source.address.strip_prefix("http://").context("an address")?.parse()?;
        let proxy = Proxy::start(&self.runtime, store, delay)?;
        let address = format!("http://{}", proxy.address);
        let root = home.join("node");
        let config = Config { lazy: true, pool: PoolConfig::Image { bytes: POOL_GIB << 30 }, ..Config::new(&root) };
        let engine = self.runtime.block_on(Engine::open(config))?;
        let server = LazyServer::start(&root, &address)?;
        let store = self.runtime.block_on(connect(&address))?;
        let target = home.join("target");
        drop_caches()?;

        let began = Instant::now();
        self.runtime.block_on(async {
            let image = engine.ensure_image_lazily(self.source.root, OWNER, Some("bench"), &store, &|_| ()).await?;
            engine.create_session("s", &image).await?;
            engine.publish("s", &target, false).await
        })?;
        let behind = self.runtime.spawn({
            let (engine, store, tree) = (engine.clone(), store.clone(), self.source.root);
            async move { engine.hydrate(tree, &store, &|_| ()).await }
        });
        ensure!(workload::read_all(&target.join(FIRST))? > 0, "{FIRST} is empty");
        let first = began.elapsed().as_secs_f64() * 1e3;
        workload::git_status(&target)?;
        let usable = began.elapsed().as_secs_f64() * 1e3;

        self.runtime.block_on(async {
            behind.await??;
            engine.unpublish(&target).await?;
            engine.delete_session("s").await?;
            Ok::<_, anyhow::Error>(())
        })?;
        server.end()?;
        drop(engine);
        mount::unmount_below(&home)?;
        fs::remove_dir_all(&home).with_context(|| format!("remove {}", home.display()))?;
        Ok([first, usable])
    }

    fn clone_from(&self, server: SocketAddr, delay: Duration) -> Result<[f64; 2]> {
        let proxy = Proxy::start(&self.runtime, server, delay)?;
        let to = self.work.join("ext4/lazy-copy");
        drop_caches()?;
        let began = Instant::now();
        let url = format!("git://{}/", proxy.address);
        run(Command::new("git").args(["clone", "--quiet", "--depth", "1", &url]).arg(&to))?;
        workload::read_all(&to.join(FIRST))?;
        let first = began.elapsed().as_secs_f64() * 1e3;
        workload::git_status(&to)?;
        let usable = began.elapsed().as_secs_f64() * 1e3;
        fs::remove_dir_all(&to)?;
        Ok([first, usable])
    }
}

/// The lazy server of a node.
struct LazyServer(Child);

impl LazyServer {
    fn start(root: &Path, store: &str) -> Result<Self> {
        let program = std::env::current_exe()?.with_file_name("aether-lazy");
        let server = Command::new(&program)
            .arg("--state-dir")
            .arg(root)
            .args(["--store", store, "--grace", "0"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(root.join("lazy.log"))?)
            .spawn()
            .with_context(|| format!("start {}; `make build` builds it", program.display()))?;
        let mut server = Self(server);
        let mountpoint = Places::new(root).mountpoint();
        let said = || fs::read_to_string(root.join("lazy.log")).unwrap_or_default();
        wait_until("the lazy layer", || {
            ensure!(server.0.try_wait()?.is_none(), "it ended");
            Ok(mount::find_mount(&mountpoint)?.is_some())
        })
        .with_context(|| format!("{}: {}", program.display(), said()))?;
        Ok(server)
    }

    fn end(mut self) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for LazyServer {
    fn drop(&mut self) {
        // Ended already where all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `git daemon` on the loopback. Ends when dropped.
struct GitServer {
    address: SocketAddr,
    child: Child,
}

impl GitServer {
    fn start(repository: &Path) -> Result<Self> {
        let address = free_address()?;
        // By its own name: `git` would start it as a child, which nobody would end.
        let programs = String::from_utf8(run(Command::new("git").arg("--exec-path"))?)?;
        let child = Command::new(Path::new(programs.trim()).join("git-daemon"))
            .args(["--reuseaddr", "--export-all", "--listen=127.0.0.1"])
            .arg(format!("--port={}", address.port()))
            .arg(format!("--base-path={}", repository.display()))
            .arg(repository)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start git daemon")?;
        let server = Self { address, child };
        wait_until("git daemon", || Ok(std::net::TcpStream::connect(address).is_ok()))?;
        Ok(server)
    }
}

impl Drop for GitServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Stands in for a way: every byte arrives at the other end so much later. Ends when dropped.
struct Proxy {
    address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    fn start(runtime: &Runtime, to: SocketAddr, delay: Duration) -> Result<Self> {
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
        let address = listener.local_addr()?;
        let task = runtime.spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let Ok(far) = TcpStream::connect(to).await else { return };
                    let _ = (near.set_nodelay(true), far.set_nodelay(true));
                    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                    tokio::join!(carry(near_in, far_out, delay), carry(far_in, near_out, delay));
                });
            }
        });
        Ok(Self { address, task })
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn carry(mut from: impl AsyncReadExt + Unpin, mut to: impl AsyncWriteExt + Unpin, delay: Duration) {
    let (sender, mut receiver) = mpsc::channel::<(tokio::time::Instant, Vec<u8>)>(4096);
    let read = async move {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(n @ 1..) = from.read(&mut buffer).await {
            if sender.send((tokio::time::Instant::now() + delay, buffer[..n].to_vec())).await.is_err() {
                break;
            }
        }
    };
    let write = async move {
        while let Some((due, bytes)) = receiver.recv().await {
            tokio::time::sleep_until(due).await;
            if to.write_all(&bytes).await.is_err() {
                break;
            }
        }
        // The other end learns that there is no more; it may be gone already.
        let _ = to.shutdown().await;
    };
    tokio::join!(read, write);
}
