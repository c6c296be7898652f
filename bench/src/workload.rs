//! What is done in a copy of the tree, the same for every subject, and how it is timed.

use std::fs::{self, File};
use std::io::{IoSliceMut, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use crate::stage::run;

/// Milliseconds that `work` takes.
pub(crate) fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(f64, T)> {
    let began = Instant::now();
    let value = work()?;
    Ok((began.elapsed().as_secs_f64() * 1e3, value))
}

/// Empties the kernel's caches of pages, directory entries and inodes.
pub(crate) fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("drop the kernel's caches")
}

/// Whether dropping caches works here: a file that was just written must be read from disk again.
pub(crate) fn check_drop_caches(directory: &Path) -> Result<()> {
    let mut file = tempfile::tempfile_in(directory)?;
    file.write_all(&[1; 1 << 16])?;
    file.sync_all()?;
    // Only what needs no disk is read.
    let is_cached = || {
        let mut byte = [0];
        match preadv2(&file, &mut [IoSliceMut::new(&mut byte)], 0, ReadWriteFlags::NOWAIT) {
            Ok(_) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(error) => Err(error).context("ask whether a file is cached"),
        }
    };
    ensure!(is_cached()?, "a file that was just written is not cached");
    drop_caches()?;
    ensure!(!is_cached()?, "a file is cached after the caches were dropped");
    Ok(())
}

/// A field of `/proc/meminfo`, in bytes.
pub(crate) fn meminfo(field: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kilobytes =
        line.and_then(|line| line.split_whitespace().next()).with_context(|| format!("no {field} in /proc/meminfo"))?;
    Ok(kilobytes.parse::<u64>()? * 1024)
}

/// Memory that the kernel uses for itself.
pub(crate) fn kernel_memory() -> Result<u64> {
    ["Slab", "Percpu", "PageTables", "KernelStack"].iter().map(|field| meminfo(field)).sum()
}

/// Resident memory of a process, in bytes.
pub(crate) fn resident(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse::<u64>()? * 1024)
}

fn git(path: &Path) -> Command {
    let mut command = Command::new("git");
    command.arg("-C").arg(path);
    command
}

pub(crate) fn git_status(path: &Path) -> Result<()> {
    let out = run(git(path).args(["status", "--porcelain"]))?;
    ensure!(
        out.is_empty(),
        "git status of an untouched copy says: {}",
        String::from_utf8_lossy(&out[..out.len().min(200)])
    );
    Ok(())
}

/// A walk that looks at every inode.
pub(crate) fn find(path: &Path) -> Result<()> {
    let out = run(Command::new("find").arg(path).args(["-type", "f", "-size", "+100k"]))?;
    ensure!(!out.is_empty(), "find found no file of more than 100 kB");
    Ok(())
}

/// A walk that reads every content.
pub(crate) fn grep(path: &Path) -> Result<()> {
    let out = run(Command::new("grep").args(["-rlI", "--exclude-dir=.git", "leaderElection"]).arg(path))?;
    ensure!(!out.is_empty(), "grep found nothing");
    Ok(())
}

pub(crate) fn untar(archive: &Path, path: &Path) -> Result<()> {
    let into = path.join("bench-untar");
    fs::create_dir(&into)?;
    run(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(&into))?;
    Ok(())
}

pub(crate) fn rm_rf(path: &Path) -> Result<()> {
    run(Command::new("rm").arg("-rf").arg(path.join("bench-untar")))?;
    Ok(())
}

/// 2,000 new files of 4 kB in twenty directories.
pub(crate) fn small_writes(path: &Path) -> Result<()> {
    let contents = [b'x'; 4096];
    for directory in 0..20 {
        let directory = path.join(format!("bench-small-{directory}"));
        fs::create_dir(&directory)?;
        for file in 0..100 {
            fs::write(directory.join(format!("file-{file}")), contents)?;
        }
    }
    Ok(())
}

/// Appends a line to files of the tree.
pub(crate) fn append(path: &Path, files: &[PathBuf]) -> Result<()> {
    for file in files {
        let path = path.join(file);
        let mut file = File::options().append(true).open(&path).with_context(|| format!("open {}", path.display()))?;
        file.write_all(b"\n// changed\n")?;
    }
    Ok(())
}

/// Installs the packages of `e2e/third-party/npm-tree` from the cache.
pub(crate) fn npm_install(manifest: &Path, cache: &Path, path: &Path) -> Result<()> {
    let into = path.join("bench-npm");
    fs::create_dir(&into)?;
    for name in ["package.json", "package-lock.json"] {
        fs::copy(manifest.join(name), into.join(name))?;
    }
    run(Command::new("npm")
        .args(["ci", "--offline", "--ignore-scripts", "--no-audit", "--no-fund", "--logs-max=0"])
        .arg("--cache")
        .arg(cache)
        .current_dir(&into))?;
    ensure!(into.join("node_modules/typescript/package.json").exists(), "npm installed nothing");
    Ok(())
}

/// Writes `megabytes` of bytes that do not compress, and leaves them to the kernel.
pub(crate) fn write_big(path: &Path, megabytes: u64) -> Result<()> {
    let mut file = File::create(path)?;
    let mut block = vec![0_u8; 1 << 20];
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    for _ in 0..megabytes {
        for word in block.chunks_exact_mut(8) {
            // xorshift64: cheap, and nothing below can fold it.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&block)?;
    }
    Ok(())
}

/// Reads a file from end to end.
pub(crate) fn read_all(path: &Path) -> Result<u64> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(total),
            n => total += n as u64,
        }
    }
}

/// Somebody who writes hard until dropped: a large file over and over, and small ones between.
pub(crate) struct Neighbour {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Neighbour {
    /// Returns once it has written 64 MB.
    pub(crate) fn start(path: &Path) -> Result<Self> {
        let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = std::thread::spawn({
            let (path, stop, written) = (path.to_owned(), stop.clone(), written.clone());
            move || write_hard(&path, &stop, &written)
        });
        let neighbour = Self { stop, thread: Some(thread) };
        let deadline = Instant::now() + Duration::from_secs(60);
        while written.load(Ordering::Relaxed) < 64 {
            ensure!(Instant::now() < deadline, "the neighbour wrote less than 64 MB in a minute");
            ensure!(!neighbour.thread.as_ref().is_some_and(JoinHandle::is_finished), "the neighbour cannot write");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(neighbour)
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(Err(error)) = self.thread.take().and_then(|thread| thread.join().ok()) {
            eprintln!("the neighbour stopped writing: {error:#}");
        }
    }
}

fn write_hard(path: &Path, stop: &AtomicBool, written: &AtomicU64) -> Result<()> {
    let block = vec![7_u8; 1 << 20];
    let mut round = 0_u64;
    loop {
        let mut file = File::create(path.join("bench-neighbour"))?;
        for _ in 0..256 {
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            file.write_all(&block)?;
            written.fetch_add(1, Ordering::Relaxed);
            round += 1;
            fs::write(path.join(format!("bench-neighbour-{}", round % 500)), &block[..4096])?;
        }
    }
}
