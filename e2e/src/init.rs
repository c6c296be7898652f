//! The first process of a node: process 1 of its own pid namespace, in a mount namespace of its own.
//!
//! It lays out the node's file system, starts containerd, kubelet and kube-proxy, starts again what ends, and reaps. When it
//! ends, the kernel ends every process of the node, and with the last one every mount and automatic loop device.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::{self, File},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount},
    process::{WaitOptions, wait},
    system::sethostname,
};
use serde::{Deserialize, Serialize};

/// What a node is made of; written by the harness, read by the node's first process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeSpec {
    /// The node's host name.
    pub name: String,
    /// Where this process writes its pid as the machine sees it.
    pub pid_file: PathBuf,
    /// Folders of the machine, and where the node sees them.
    pub binds: Vec<(PathBuf, PathBuf)>,
    /// Folders that start empty, as after a reboot.
    pub empty: Vec<PathBuf>,
    /// Mounts below or above these are kept; others of the machine are not the node's business.
    pub keep: Vec<PathBuf>,
    /// In the order of their start.
    pub programs: Vec<Program>,
}

/// A daemon of a node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Program {
    /// Its name in messages.
    pub name: String,
    /// Its command line.
    pub argv: Vec<String>,
    /// Where its output is appended.
    pub log: PathBuf,
    /// The next program starts when this socket answers.
    pub socket: Option<PathBuf>,
}

/// Runs as process 1 until it is killed.
pub fn run(spec: &Path) -> Result<()> {
    let spec: NodeSpec =
        serde_json::from_slice(&fs::read(spec).with_context(|| format!("cannot read {}", spec.display()))?)?;
    if std::process::id() != 1 {
        bail!("this is the first process of a node's namespace; `aether-cluster up` starts it");
    }
    // /proc is still the machine's, so it tells our pid there.
    let pid = fs::read_link("/proc/self")?;
    lay_out(&spec)?;
    sethostname(spec.name.as_bytes())?;
    let mut running = BTreeMap::new();
    for program in &spec.programs {
        running.insert(start(program)?, program);
        if let Some(socket) = &program.socket {
            answers(program, socket)?;
        }
    }
    // Atomically, because it is the sign that the node is up.
    let part = spec.pid_file.with_extension("part");
    fs::write(&part, pid.as_os_str().as_encoded_bytes())?;
    fs::rename(&part, &spec.pid_file)?;
    supervise(running)
}

fn lay_out(spec: &NodeSpec) -> Result<()> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    // A copy of another program's mount would keep its file system and loop device busy after that program let go.
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    for at in mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)) {
        let at = PathBuf::from(at.replace("\\040", " "));
        let system = ["/proc", "/sys", "/dev"].iter().any(|kept| at.starts_with(kept));
        if !system && !spec.keep.iter().any(|kept| kept.starts_with(&at)) {
            let _ = unmount(&at, UnmountFlags::DETACH);
        }
    }
    for (from, to) in &spec.binds {
        fs::create_dir_all(from)?;
        fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
        mount_bind(from, to).with_context(|| format!("cannot bind {} to {}", from.display(), to.display()))?;
    }
    let mode = CString::new("mode=0755")?;
    for folder in &spec.empty {
        fs::create_dir_all(folder)?;
        mount("tmpfs", folder, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(mode.as_c_str()))
            .with_context(|| format!("cannot mount {}", folder.display()))?;
    }
    mount("proc", "/proc", "proc", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, None)?;
    fs::create_dir_all("/run/lock")?;
    // What the driver mounts in its container must appear in pods: two-way propagation, inside this namespace only.
    Ok(mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC)?)
}

fn start(program: &Program) -> Result<i32> {
    let log = File::options().create(true).append(true).open(&program.log)?;
    let (file, args) = program.argv.split_first().context("an empty command line")?;
    let child = Command::new(file)
        .args(args)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {}", program.name))?;
    Ok(i32::try_from(child.id())?)
}

fn answers(program: &Program, socket: &Path) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(30);
    while UnixStream::connect(socket).is_err() {
        if Instant::now() > until {
            bail!("{} does not answer at {}; its log is {}", program.name, socket.display(), program.log.display());
        }
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Reaps every orphan of the node and starts its daemons again when they end.
fn supervise(mut running: BTreeMap<i32, &Program>) -> Result<()> {
    loop {
        let Some((pid, status)) = wait(WaitOptions::empty())? else { continue };
        if let Some(program) = running.remove(&pid.as_raw_pid()) {
            eprintln!("{} ended ({status:?}); starting it again", program.name);
            sleep(Duration::from_secs(1));
            running.insert(start(program)?, program);
        }
    }
}
