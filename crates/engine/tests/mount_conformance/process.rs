//! Programs that a test starts: where the public ones are, and how they are held still and ended.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

/// The folder of the public test programs; installs them on a machine that has not got them.
pub(crate) fn programs() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../e2e/third-party/file-system-tests.sh");
    let output = Command::new(&script).output().unwrap();
    assert!(output.status.success(), "{}: {}", script.display(), String::from_utf8_lossy(&output.stderr));
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

/// A process that ends with the test, also when that fails.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A cgroup of our own, in the v1 freezer or in v2.
pub(crate) struct Cgroup(pub(crate) PathBuf);

impl Cgroup {
    /// An empty one.
    pub(crate) fn new(name: &str) -> Self {
        let hierarchy = aether_engine::freeze::hierarchy().unwrap();
        let path = hierarchy.join(format!("aether-test-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// Puts a process into it.
    pub(crate) fn add(&self, process: &Running) {
        fs::write(self.0.join("cgroup.procs"), process.0.id().to_string()).unwrap();
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Empty as soon as the kernel has let go of its last process.
        for _ in 0..200 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        eprintln!("{} is left", self.0.display());
    }
}
