//! Where a run happens: a mount and process namespace of its own, with one file system of each kind on a loop device,
//! all on the same disk.
//!
//! Promises: when a run ends, however it ends, its processes, mounts, loop devices and files are gone. The program
//! calls itself inside `unshare`: the kernel ends every process of the namespace with its first one, mounts end with
//! the processes, and the outer program removes the files.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::FlockOperation;
use rustix::mount::MountFlags;

const INSIDE: &str = "AETHER_BENCH_STAGE";
const WORK: &str = "work-";
/// A file of this name in the stage asks the run to end with what it has.
const STOP: &str = "stop";
const GIB: u64 = 1 << 30;
/// `BTRFS_SUPER_MAGIC` (include/uapi/linux/magic.h).
const BTRFS_MAGIC: rustix::fs::FsWord = 0x9123_683E;

/// Runs `body` on a stage of its own. `needs` is how many bytes its file systems will take.
pub(crate) fn on_stage(cache: &Path, needs: u64, body: impl FnOnce(&Path) -> Result<()>) -> Result<ExitCode> {
    ensure!(rustix::process::geteuid().is_root(), "this program mounts file systems and must run as root");
    if let Some(work) = std::env::var_os(INSIDE) {
        let work = PathBuf::from(work);
        let _alive = lock(&work.join("lock"), FlockOperation::LockExclusive)?;
        body(&work)?;
        return Ok(ExitCode::SUCCESS);
    }
    let home = cache.join("bench");
    fs::create_dir_all(&home).with_context(|| format!("create {}", home.display()))?;
    let Ok(_only) = lock(&home.join("lock"), FlockOperation::NonBlockingLockExclusive) else {
        bail!("another benchmark is running; two at once would measure each other");
    };
    for entry in fs::read_dir(&home)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(WORK.as_bytes())) {
            clean(&path)?;
        }
    }
    let stat = rustix::fs::statvfs(&home)?;
    let free = stat.f_bavail * stat.f_frsize;
    ensure!(
        free > needs + GIB,
        "{} has {} GB free and {} GB are needed; set AETHER_CACHE to a directory with more",
        home.display(),
        free / 1_000_000_000,
        (needs + GIB) / 1_000_000_000
    );
    let work = tempfile::Builder::new().prefix(WORK).tempdir_in(&home)?.keep();
    let code = tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run_inside(&work));
    clean(&work)?;
    code
}

async fn run_inside(work: &Path) -> Result<ExitCode> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut child = tokio::process::Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private", "--pid", "--fork"])
        .args(["--kill-child=KILL", "--mount-proc", "--"])
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, work)
        .kill_on_drop(true)
        .spawn()
        .context("start unshare (package util-linux)")?;
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut stopping = false;
    loop {
        tokio::select! {
            status = child.wait() => return Ok(match status? {
                status if status.success() => ExitCode::SUCCESS,
                _ if stopping => ExitCode::from(130),
                _ => ExitCode::FAILURE,
            }),
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        if stopping {
            eprintln!("taking everything down");
            child.kill().await?;
            return Ok(ExitCode::from(130));
        }
        stopping = true;
        eprintln!("ending with what was measured, after the step that is under way; once more ends at once");
        File::create(work.join(STOP))?;
    }
}

/// Fails once the run was asked to end. Measurements ask between their steps.
pub(crate) fn go_on() -> Result<()> {
    let stop = std::env::var_os(INSIDE).map(|work| Path::new(&work).join(STOP));
    ensure!(!stop.is_some_and(|stop| stop.exists()), "it was interrupted");
    Ok(())
}

/// Waits until nobody uses a stage and removes it.
fn clean(work: &Path) -> Result<()> {
    // Held by the process inside until the kernel has ended it.
    let _ended = lock(&work.join("lock"), FlockOperation::LockExclusive)?;
    let images = walkdir::WalkDir::new(work).max_depth(2).into_iter().flatten();
    for image in images.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "img")) {
        let out = Command::new("losetup")
            .args(["--noheadings", "--output", "NAME", "--associated"])
            .arg(image.path())
            .output()?;
        for device in String::from_utf8_lossy(&out.stdout).split_whitespace() {
            // Gone by itself in between is as good.
            let _ = Command::new("losetup").args(["--detach", device]).stderr(Stdio::null()).status()?;
        }
    }
    fs::remove_dir_all(work).with_context(|| format!("remove {}", work.display()))
}

fn lock(path: &Path, how: FlockOperation) -> Result<File> {
    let file =
        File::options().create(true).append(true).open(path).with_context(|| format!("open {}", path.display()))?;
    rustix::fs::flock(&file, how).with_context(|| format!("lock {}", path.display()))?;
    Ok(file)
}

/// A file system on an image file.
#[derive(Debug, Clone)]
pub(crate) struct Storage {
    pub(crate) path: PathBuf,
}

impl Storage {
    /// Makes and mounts one of `gib` GiB. All are made alike: preallocated, direct I/O to the disk below, no access times.
    pub(crate) fn make(work: &Path, kind: &'static str, gib: u64) -> Result<Self> {
        let image = work.join(format!("{kind}.img"));
        let file = File::create_new(&image)?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, gib * GIB)
            .with_context(|| format!("allocate {}", image.display()))?;
        let options: &[&str] = match kind {
            "ext4" => &["-q", "-F", "-m", "0", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"],
            "xfs" => &["-q", "-f", "-K"],
            "btrfs" => &["-q", "--nodiscard", "--metadata", "single", "--data", "single"],
            other => bail!("no way to make {other}"),
        };
        run(Command::new(format!("mkfs.{kind}")).args(options).arg(&image))?;
        let out =
            Command::new("losetup").args(["--find", "--show", "--nooverlap", "--direct-io=on"]).arg(&image).output()?;
        ensure!(out.status.success(), "losetup: {}", String::from_utf8_lossy(&out.stderr).trim());
        let device = PathBuf::from(String::from_utf8(out.stdout)?.trim());
        let path = work.join(kind);
        fs::create_dir(&path)?;
        rustix::mount::mount(&device, &path, kind, MountFlags::NOATIME, None)
            .with_context(|| format!("mount {} as {kind}", device.display()))?;
        // From now on it frees itself with the mount.
        run(Command::new("losetup").arg("--detach").arg(&device))?;
        Ok(Self { path })
    }
}

/// Waits until nothing that was done before is still under way on the disk: what is pending anywhere is written, and what was
/// deleted on the file system mounted at `path` is gone. btrfs goes through deleted subvolumes behind the call.
pub(crate) fn settle(path: &Path) -> Result<()> {
    rustix::fs::sync();
    if rustix::fs::statfs(path)?.f_type == BTRFS_MAGIC {
        // The first wakes the kernel's cleaner, which otherwise comes every half a minute.
        for what in ["filesystem", "subvolume"] {
            run(Command::new("btrfs").args([what, "sync"]).arg(path))?;
        }
    }
    Ok(())
}

/// Bytes that the file system at `path` uses, its own structures included.
pub(crate) fn used_bytes(path: &Path) -> Result<u64> {
    let directory = File::open(path)?;
    rustix::fs::syncfs(directory.as_fd())?;
    if let Some(allocation) = btrfs_allocation(path)? {
        // statfs counts whole chunks of metadata.
        let mut used = 0;
        for part in ["data", "metadata", "system"] {
            used += fs::read_to_string(allocation.join(part).join("bytes_used"))?.trim().parse::<u64>()?;
        }
        return Ok(used);
    }
    let stat = rustix::fs::statvfs(path)?;
    Ok((stat.f_blocks - stat.f_bfree) * stat.f_frsize)
}

/// `/sys/fs/btrfs/<uuid>/allocation` of the file system mounted at `path`.
fn btrfs_allocation(path: &Path) -> Result<Option<PathBuf>> {
    let Some(entry) = aether_engine::mount::find_mount(path)? else { bail!("{} is no mount", path.display()) };
    if entry.fs_type != "btrfs" {
        return Ok(None);
    }
    let device = entry.source.file_name().context("a device")?.to_owned();
    for file_system in fs::read_dir("/sys/fs/btrfs")? {
        let path = file_system?.path();
        if path.join("devices").join(&device).exists() {
            return Ok(Some(path.join("allocation")));
        }
    }
    bail!("/sys/fs/btrfs does not list {}", device.display())
}

/// Waits half a minute at most until something is there; `what` is said if it is not.
pub(crate) fn wait_until(what: &str, mut ready: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !ready()? {
        ensure!(Instant::now() < deadline, "{what} is not there after 30 s");
        std::thread::sleep(Duration::from_micros(300));
    }
    Ok(())
}

/// A port of the loopback that was free a moment ago, for programs that cannot be asked to choose one. One that was taken
/// in between is said by the program.
pub(crate) fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// The cargo profile of this program, and so of the engine in it.
pub(crate) fn profile() -> String {
    if cfg!(debug_assertions) { "dev (opt-level 1)".into() } else { "release".into() }
}

/// Runs a command to its end; its complaint is the error.
pub(crate) fn run(command: &mut Command) -> Result<Vec<u8>> {
    let output = command
        .stdin(Stdio::null())
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .output()
        .with_context(|| format!("start {}", command.get_program().display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{:?} failed ({}): {}", command.get_program(), output.status, said.trim());
    }
    Ok(output.stdout)
}
