//! The program in a process of its own.
#![allow(dead_code, reason = "each test program uses its part")]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use aether_cas::{RemoteStore, remote::RemoteConfig};
use rustix::process::{Pid, Signal, kill_process};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_aether-store-node");

pub(crate) struct Process {
    child: Child,
    pub(crate) address: SocketAddr,
    http: SocketAddr,
}

impl Process {
    pub(crate) fn start(folder: &Path) -> Self {
        Self::start_with(folder, &[], None)
    }

    /// With more options, and ending itself at a crash point.
    pub(crate) fn start_with(folder: &Path, options: &[&str], crash_at: Option<&str>) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data-dir"]).arg(folder).args(options);
        command.env_remove("AETHER_LOG").envs(crash_at.map(|point| ("AETHER_CRASH_AT", point)));
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (mut address, mut http) = (None, None);
        let mut log = Vec::new();
        while address.is_none() || http.is_none() {
            let line = lines.next().unwrap_or_else(|| panic!("it ended: {log:#?}")).unwrap();
            let value = || line.split_once("\"address\":\"")?.1.split_once('"')?.0.parse().ok();
            if line.contains("serving the store") {
                address = value();
            } else if line.contains("health") {
                http = http.or_else(value);
            }
            log.push(line);
        }
        // Or the program would wait for a reader of its log.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address: address.unwrap(), http: http.unwrap() }
    }

    pub(crate) fn uri(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn remote(&self) -> RemoteStore {
        let mut config = RemoteConfig::new(self.uri());
        // It comes back under another port.
        config.patience = Duration::ZERO;
        RemoteStore::lazy(&config).unwrap()
    }

    pub(crate) fn get(&self, path: &str) -> String {
        let mut connection = TcpStream::connect(self.http).unwrap();
        write!(connection, "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Whether it has ended by itself.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Most memory that it ever had.
    pub(crate) fn peak(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
    }

    pub(crate) fn end(mut self, signal: Signal) -> ExitStatus {
        // It may have ended by itself, and nobody else waits for it.
        if !self.has_ended() {
            kill_process(Pid::from_child(&self.child), signal).unwrap();
        }
        self.child.wait().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // When a test fails half-way.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
