//! Processes that are held still while a snapshot is taken.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::process::Running;

/// A cgroup of our own, in the v1 freezer or in v2. Whatever is in it ends with it, also when the test fails.
pub(crate) struct Cgroup(pub(crate) PathBuf);

impl Cgroup {
    /// An empty one, where the engine would look for those of pods.
    pub(crate) fn new(name: &str) -> Self {
        Self::below(&aether_engine::freeze::hierarchy().unwrap(), name)
    }

    /// An empty one in a certain hierarchy.
    pub(crate) fn below(hierarchy: &Path, name: &str) -> Self {
        let path = hierarchy.join(format!("aether-test-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// Puts a process into it; what that starts from then on is in it too.
    pub(crate) fn add(&self, process: &Running) {
        fs::write(self.0.join("cgroup.procs"), process.0.id().to_string()).unwrap();
    }

    /// Starts a shell script with one argument in it.
    #[allow(dead_code, reason = "not every test of several files asks")]
    pub(crate) fn shell(&self, script: &str, argument: &Path) -> Running {
        // It waits until it is in its cgroup, so that whatever it starts is in it too.
        let script = format!("read go && {script}");
        let mut command = Command::new("sh");
        command.args(["-c", &script, "sh"]).arg(argument).stdin(Stdio::piped());
        let mut shell = Running(command.spawn().unwrap());
        self.add(&shell);
        shell.0.stdin.take().unwrap().write_all(b"go\n").unwrap();
        shell
    }

    /// Ends what is in it.
    fn kill(&self) {
        let pids = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        for pid in pids.lines().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)) {
            // It may have ended by itself.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Again and again: what is killed may just have started another. Empty as soon as the kernel has let go of the last.
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            self.kill();
            match fs::remove_dir(&self.0) {
                Ok(()) => return,
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                Err(error) if std::thread::panicking() => return eprintln!("{} is left: {error}", self.0.display()),
                Err(error) => panic!("{} is left: {error}", self.0.display()),
            }
        }
    }
}
