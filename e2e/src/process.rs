//! Programs that outlive the command that starts them: started with a log file, recorded by pid *and* start time, so that
//! a pid that was given to somebody else meanwhile is never signalled.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

/// A process, told from a later one of the same pid by its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// As seen from the machine's own namespace.
    pub pid: i32,
    /// Clock ticks since boot: field 22 of `/proc/PID/stat`.
    pub started: u64,
}

impl Process {
    /// The process that has this pid now, unless it has ended.
    pub fn find(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, may hold anything; what follows the last one is fields 3 and on.
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
        let alive = !matches!(*fields.first()?, "Z" | "X");
        alive.then_some(Self { pid, started: fields.get(19)?.parse().ok()? })
    }

    /// Whether it is still there (a zombie is not).
    pub fn alive(self) -> bool {
        Self::find(self.pid) == Some(self)
    }

    /// Sends a signal, unless it has ended.
    pub fn signal(self, signal: Signal) {
        if let (true, Some(pid)) = (self.alive(), Pid::from_raw(self.pid)) {
            // It may end between the look and the call: nothing is left to do then.
            let _ = kill_process(pid, signal);
        }
    }

    /// Waits until it has ended.
    pub async fn ended(self, limit: Duration) -> bool {
        let until = tokio::time::Instant::now() + limit;
        while self.alive() {
            if tokio::time::Instant::now() > until {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        true
    }
}

/// The recorded programs of a cluster.
#[derive(Debug, Clone)]
pub struct Processes {
    records: PathBuf,
    logs: PathBuf,
}

impl Processes {
    /// Records in one folder, logs in another.
    pub fn new(records: PathBuf, logs: PathBuf) -> Self {
        Self { records, logs }
    }

    /// Starts a program in a process group of its own, so that Ctrl-C on the terminal does not reach it.
    pub fn start(&self, name: &str, argv: &[String]) -> Result<Process> {
        fs::create_dir_all(&self.records)?;
        fs::create_dir_all(&self.logs)?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log(name))
            .with_context(|| format!("cannot open the log of {name}"))?;
        let (program, args) = argv.split_first().context("an empty command line")?;
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .current_dir("/")
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {name} ({program})"))?;
        let pid = i32::try_from(child.id())?;
        self.record(name, pid)
    }

    /// Records a process under a name.
    pub fn record(&self, name: &str, pid: i32) -> Result<Process> {
        let Some(process) = Process::find(pid) else { bail!("{name} ended at once\n{}", self.log_tail(name)) };
        fs::write(self.records.join(format!("{name}.json")), serde_json::to_vec(&process)?)?;
        Ok(process)
    }

    /// The recorded process of that name, if it is alive.
    pub fn get(&self, name: &str) -> Option<Process> {
        let record = fs::read(self.records.join(format!("{name}.json"))).ok()?;
        serde_json::from_slice::<Process>(&record).ok().filter(|process| process.alive())
    }

    /// All recorded names, alive or not.
    pub fn names(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.records) else { return Vec::new() };
        let mut names: Vec<String> = entries
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.strip_suffix(".json").map(str::to_owned))
            .collect();
        names.sort();
        names
    }

    /// Ends a program: asks, waits that long, then kills. Forgets it.
    pub async fn stop(&self, name: &str, grace: Duration) -> Result<()> {
        if let Some(process) = self.get(name) {
            if !grace.is_zero() {
                process.signal(Signal::TERM);
            }
            if grace.is_zero() || !process.ended(grace).await {
                process.signal(Signal::KILL);
                if !process.ended(Duration::from_secs(10)).await {
                    bail!("{name} (pid {}) does not end, even killed", process.pid);
                }
            }
        }
        match fs::remove_file(self.records.join(format!("{name}.json"))) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Where a program's output goes.
    pub fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// The last lines of a program's log, for an error message.
    pub fn log_tail(&self, name: &str) -> String {
        let text = fs::read(self.log(name)).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = &lines[lines.len().saturating_sub(15)..];
        format!("the log is {}; its last lines:\n{}", self.log(name).display(), tail.join("\n"))
    }
}
