//! The program as a test starts, kills and ends it.

// Each test file uses a part of it.
#![allow(dead_code)]

use std::fs;
use std::path::Path;
use std::process::{Child, Command};

use aether_cas::lazy::Places;
use aether_engine::mount;
use rustix::process::{Pid, Signal, kill_process};

use crate::support::wait_for;

/// The program for the engine directory `root`; killed with the test if that fails.
pub(crate) struct Program {
    child: Child,
    killed: Option<Pid>,
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program with everything that it must be told.
pub(crate) fn command(root: &Path, uri: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_aether-lazy"));
    command.arg("--state-dir").arg(root).args(["--store", uri]);
    command
}

impl Program {
    /// Starts it, and waits until the layer is mounted.
    pub(crate) fn start(root: &Path, uri: &str, arguments: &[&str]) -> Self {
        let child = command(root, uri).args(arguments).spawn().unwrap();
        let program = Self { child, killed: None };
        let mountpoint = Places::new(root).mountpoint();
        wait_for("the layer is mounted", || mount::find_mount(&mountpoint).unwrap().is_some());
        program
    }

    /// The child that serves, if there is one now that was not killed yet.
    pub(crate) fn server(&self) -> Option<Pid> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).ok()?;
        let children = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok());
        let all: Vec<i32> =
            children.flat_map(|line| line.split(' ').filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect();
        all.first().copied().and_then(Pid::from_raw).filter(|pid| Some(*pid) != self.killed)
    }

    /// Kills the child that serves, and says whether there was one.
    pub(crate) fn kill_server(&mut self) -> bool {
        let server = self.server();
        self.killed = server.or(self.killed);
        server.is_some_and(|server| kill_process(server, Signal::KILL).is_ok())
    }

    /// Asks it to end.
    pub(crate) fn terminate(&self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
    }

    /// Waits for its end, which is to be a good one.
    pub(crate) fn join(mut self) {
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
    }

    /// Asks it to end, and sees that it does.
    pub(crate) fn end(self) {
        self.terminate();
        self.join();
    }
}
