//! `juicefs`: one volume with Redis for metadata and files for contents, copies by `juicefs clone`.
//!
//! Set up in its favour: everything on this machine, uploads behind the writer's back (`--writeback`), no trash.

use std::fs::{self, File};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use aether_engine::mount::find_mount;
use anyhow::{Context, Result};

use super::{Idle, Subject, clone_tree, directory};
use crate::stage::{Storage, free_address, run, wait_until};

pub(crate) struct JuiceFs {
    program: PathBuf,
    storage: Storage,
    mount: PathBuf,
    server: Child,
    /// Both end with the namespace, as every process does.
    redis: Child,
}

impl JuiceFs {
    pub(crate) fn new(program: &Path, storage: &Storage, repository: &Path) -> Result<Self> {
        let home = directory(storage, "juicefs")?;
        for name in ["redis", "objects", "cache", "mount"] {
            fs::create_dir(home.join(name))?;
        }
        let redis_at = free_address()?;
        let log = File::create(home.join("log"))?;
        let redis = Command::new("redis-server")
            .args(["--port", &redis_at.port().to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes"])
            .arg("--dir")
            .arg(home.join("redis"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .spawn()
            .context("start redis-server")?;
        wait_until("redis", || Ok(TcpStream::connect(redis_at).is_ok()))?;
        let address = format!("redis://{redis_at}/1");
        run(Command::new(program)
            .args(["format", "--storage", "file", "--trash-days", "0", "--bucket"])
            .arg(format!("{}/", home.join("objects").display()))
            .args([&address, "bench"]))
        .context("format a JuiceFS volume")?;
        let mount = home.join("mount");
        let server = Command::new(program)
            .args(["mount", "--no-usage-report", "--no-syslog", "--writeback", "--cache-dir"])
            .arg(home.join("cache"))
            .arg(&address)
            .arg(&mount)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start juicefs")?;
        wait_until("the mount of juicefs", || Ok(find_mount(&mount)?.is_some()))?;
        let this = Self { program: program.to_owned(), storage: storage.clone(), mount, server, redis };
        clone_tree(repository, &this.mount.join("base"))?;
        Ok(this)
    }
}

impl Subject for JuiceFs {
    fn name(&self) -> &'static str {
        "juicefs"
    }

    fn create(&mut self, copy: &str) -> Result<PathBuf> {
        self.fork("base", copy)
    }

    fn fork(&mut self, from: &str, copy: &str) -> Result<PathBuf> {
        let path = self.mount.join(copy);
        run(Command::new(&self.program)
            .args(["clone", "--preserve", "--quiet"])
            .arg(self.mount.join(from))
            .arg(&path))?;
        Ok(path)
    }

    fn checkpoint(&mut self, from: &str, name: &str) -> Result<()> {
        self.fork(from, name).map(|_| ())
    }

    fn remove(&mut self, copy: &str) -> Result<()> {
        let path = self.mount.join(copy);
        if path.exists() {
            run(Command::new(&self.program).args(["rmr", "--quiet"]).arg(&path))?;
        }
        Ok(())
    }

    fn drop_checkpoint(&mut self, name: &str) -> Result<()> {
        self.remove(name)
    }

    fn file_system(&self) -> PathBuf {
        self.storage.path.clone()
    }

    fn idle(&self) -> Idle {
        Idle::Processes(3, vec![self.server.id(), self.redis.id()])
    }
}
