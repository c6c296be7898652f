//! Help for tests that mount: each runs in a process and a mount namespace of its own, so that nothing it mounts is
//! seen outside or outlives it, whatever happens to it. And a place in memory for what a scan reads.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use aether_cas::{Blob, MemoryStore};
use bytes::Bytes;

use crate::error::{Context, Result};
use crate::scan::Sink;

const INSIDE: &str = "AETHER_TEST_ISOLATED";

/// As [`isolated`], for the `main` of a program that measures; it sees this process's arguments and terminal.
///
/// # Panics
/// When not root, or when the body panics.
pub fn isolated_main(body: impl FnOnce(&Path)) {
    assert!(rustix::process::geteuid().is_root(), "this program mounts file systems and must run as root");
    if std::env::var_os(INSIDE).is_some() {
        return inside(body);
    }
    let status = crate::sys::with_own_mounts(&mut Command::new(std::env::current_exe().expect("own path")))
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "main")
        .status()
        .expect("the program starts");
    assert!(status.success(), "failed inside its namespace ({status})");
}

fn inside(body: impl FnOnce(&Path)) {
    rustix::mount::mount_change(
        "/",
        rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC,
    )
    .expect("private mounts");
    let directory = tempfile::Builder::new().prefix("aether-").tempdir().expect("a temporary directory");
    // Before the directory is removed, also when the body panics: removing goes no further than a mount.
    let _mounts = Mounts(directory.path());
    body(directory.path());
}

/// Unmounts everything below a directory when dropped.
struct Mounts<'a>(&'a Path);

impl Drop for Mounts<'_> {
    fn drop(&mut self) {
        if let Err(error) = crate::mount::unmount_below(self.0) {
            eprintln!("a mount is left until this process ends: {error}");
        }
    }
}

/// Runs the body of the test `name` (the function's name within its test file) as root in its own process and mount
/// namespace, with a temporary directory that may be mounted under.
///
/// The test binary calls itself for it: a mount namespace belongs to a process, and other tests run in this one.
///
/// # Panics
/// When not root, when the body panics, or when no test of that name ran.
pub fn isolated(name: &str, body: impl FnOnce(&Path)) {
    assert!(
        rustix::process::geteuid().is_root(),
        "{name} mounts file systems and must run as root; `make check` runs every test that needs no root"
    );
    if std::env::var(INSIDE).as_deref() == Ok(name) {
        inside(body);
        println!("isolated test {name} done");
        return;
    }
    let output = crate::sys::with_own_mounts(&mut Command::new(std::env::current_exe().expect("own path")))
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(INSIDE, name)
        .stdin(Stdio::null())
        .output()
        .expect("the test binary starts");
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{out}");
    eprintln!("{error}");
    assert!(output.status.success(), "{name} failed inside its namespace ({})", output.status);
    assert!(out.contains(&format!("isolated test {name} done")), "no test is called {name}");
}

/// As [`isolated`], for a body that waits.
///
/// # Panics
/// As [`isolated`].
pub fn isolated_async(name: &str, body: impl AsyncFnOnce(&Path)) {
    isolated(name, |root| {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
        runtime.block_on(body(root));
    });
}

/// Keeps everything that a scan hands out, and panics if any of it is not what it was hashed to.
pub struct Keep<'a>(pub &'a MemoryStore);

impl Sink for Keep<'_> {
    fn content(&self, content: &Blob, path: &Path, file: &File) -> Result<()> {
        let mut data = vec![0; usize::try_from(content.size).expect("it fits in memory")];
        file.read_exact_at(&mut data, 0).at("read", path)?;
        assert_eq!(self.0.put(data), *content, "{}", path.display());
        Ok(())
    }

    fn directory(&self, blob: &Blob, message: Bytes) -> Result<()> {
        assert_eq!(self.0.put(message), *blob);
        Ok(())
    }
}
