//! What a full node costs its kubelet and containerd: their processor time beside as many more mounts as sessions make, and
//! without them.
//!
//! The mounts are what a node shows of its sessions: binds of an overlay with options as long as a session's. They lie outside
//! the folder of pods, whose content the kubelet would take for pods that it forgot.

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::node::Node;

/// Folder of the mounts, in the node.
const HOME: &str = "/run/aether-density";
/// Clock ticks in a second, as the kernel shows them on every architecture that we build for (proc_pid_stat(5)).
const USER_HZ: f64 = 100.0;
/// A session's image has a name of 70 characters; paths and options are as long as the engine's.
const LONG: &str = "4f9d2c1ba07e5583d6c1ea24987bb1d0f3527ad66ab1c4e8891f0d2733c05be9-1000-1000";

/// Processor time of one daemon, in percent of one processor.
#[derive(Debug)]
pub struct Cost {
    /// Its name.
    pub program: &'static str,
    /// Without the mounts.
    pub before: f64,
    /// Beside them.
    pub with: f64,
}

/// Measures kubelet and containerd of a node for `seconds` without and then beside `mounts` more mounts.
///
/// # Errors
/// When the node does not run, or the mounts cannot be made.
pub async fn measure(node: &Node, mounts: usize, seconds: u64) -> Result<Vec<Cost>> {
    let programs = ["kubelet", "containerd"];
    let first = node.process().with_context(|| format!("{} is not running", node.name()))?.pid;
    let namespace = mount_namespace(first)?;
    let pids: Vec<i32> = programs
        .iter()
        .map(|name| daemon(name, namespace).with_context(|| format!("find {name}")))
        .collect::<Result<_>>()?;
    let window = Duration::from_secs(seconds);
    let before = share(&pids, window).await?;

    let program = node.harness().display().to_string();
    let mut holder = node
        .command(&[&program, "hold-mounts", &mounts.to_string()])?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let said = holder.stdout.take().context("its output")?;
    if BufReader::new(said).lines().next_line().await?.is_none() {
        bail!("the mounts cannot be made in {}; see above", node.name());
    }
    let with = share(&pids, window).await;
    drop(holder.stdin.take());
    holder.wait().await?;
    let costs = programs.into_iter().zip(before).zip(with?);
    Ok(costs.map(|((program, before), with)| Cost { program, before, with }).collect())
}

/// Inside a node: makes the mounts, says so, and takes them away when its input ends.
pub fn hold(mounts: usize) -> Result<()> {
    let home = Path::new(HOME);
    let made = make(home, mounts);
    if made.is_ok() {
        println!("{mounts} mounts");
        std::io::stdin().read_to_end(&mut Vec::new())?;
    }
    for number in 0..mounts {
        // Those after the first that could not be made are not there.
        if unmount(home.join(number.to_string()), UnmountFlags::DETACH).is_err() {
            break;
        }
    }
    let _ = unmount(home.join("merged"), UnmountFlags::DETACH);
    fs::remove_dir_all(home)?;
    made
}

fn make(home: &Path, mounts: usize) -> Result<()> {
    let layer = |name: &str| home.join(LONG).join(name);
    for name in ["lower", "upper", "work"] {
        fs::create_dir_all(layer(name))?;
    }
    let merged = home.join("merged");
    fs::create_dir(&merged)?;
    let [lower, upper, work] = ["lower", "upper", "work"].map(|name| layer(name).display().to_string());
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    mount("overlay", &merged, "overlay", MountFlags::empty(), std::ffi::CString::new(options)?.as_c_str())
        .context("mount an overlay")?;
    for number in 0..mounts {
        let target = home.join(number.to_string());
        fs::create_dir(&target)?;
        mount_bind(&merged, &target).with_context(|| format!("make mount {number}"))?;
    }
    Ok(())
}

fn mount_namespace(pid: i32) -> Result<u64> {
    Ok(fs::metadata(format!("/proc/{pid}/ns/mnt"))?.ino())
}

/// The process of that name in a mount namespace.
fn daemon(name: &str, namespace: u64) -> Result<i32> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let same = fs::read_to_string(entry.path().join("comm")).is_ok_and(|comm| comm.trim() == name);
        if same && mount_namespace(pid).is_ok_and(|of| of == namespace) {
            return Ok(pid);
        }
    }
    bail!("no process of that name runs there")
}

/// Percent of one processor that each process takes over a while.
async fn share(pids: &[i32], window: Duration) -> Result<Vec<f64>> {
    let before: Vec<u64> = pids.iter().map(|pid| ticks(*pid)).collect::<Result<_>>()?;
    tokio::time::sleep(window).await;
    pids.iter()
        .zip(before)
        .map(|(pid, before)| Ok((ticks(*pid)? - before) as f64 / USER_HZ / window.as_secs_f64() * 100.0))
        .collect()
}

/// Clock ticks that a process ran, in user and kernel mode: fields 14 and 15 of `/proc/PID/stat`.
fn ticks(pid: i32) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("the process has ended")?;
    let fields: Vec<&str> = stat.rsplit_once(") ").context("a stat line")?.1.split(' ').collect();
    let field = |number: usize| fields.get(number - 3).context("a stat line")?.parse::<u64>().context("a number");
    Ok(field(14)? + field(15)?)
}
