//! Running git: its environment, its progress, and what it says when it fails.

use std::path::Path;
use std::process::Stdio;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};

use super::access::Access;
use crate::failure::{Failure, classify, way_out};
use crate::report::{Phase, Reporter};

/// How much of git's words is kept: its last ones.
const LAST_WORDS: usize = 16 * 1024;

/// Git, as this import runs it.
pub(super) struct Program<'a> {
    access: &'a Access,
    home: &'a Path,
    reporter: &'a Reporter,
}

impl<'a> Program<'a> {
    pub(super) fn new(access: &'a Access, home: &'a Path, reporter: &'a Reporter) -> Self {
        Self { access, home, reporter }
    }

    /// Runs git in `directory`.
    pub(super) async fn run(&self, directory: &Path, arguments: &[&str]) -> Result<(), Failure> {
        self.output(directory, arguments).await.map(drop)
    }

    /// Runs git in `directory` and returns what it printed.
    pub(super) async fn output(&self, directory: &Path, arguments: &[&str]) -> Result<String, Failure> {
        let what = format!("git {}", arguments.first().unwrap_or(&""));
        tracing::info!(command = self.access.redact(&arguments.join(" ")), "git");
        let mut child = self
            .command(directory)
            .args(arguments)
            .spawn()
            .map_err(|error| Failure::other("run git, which must be installed", error))?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (Some(mut stdout), Some(stderr)) = (stdout, stderr) else {
            return Err(Failure::other("run git", "it has no output"));
        };
        let mut printed = Vec::new();
        let (read, words) = tokio::join!(stdout.read_to_end(&mut printed), self.listen(stderr));
        read.map_err(|error| Failure::other("read what git printed", error))?;
        let status = child.wait().await.map_err(|error| Failure::other("wait for git", error))?;
        if status.success() {
            return String::from_utf8(printed).map_err(|error| Failure::other("read what git printed", error));
        }
        let reason = classify(&words);
        let way_out = way_out(reason, &words, self.access.secret_name.as_deref());
        let words = self.access.redact(&telling(&words));
        let message = match way_out {
            Some(way_out) => format!("{what} failed: {words} ({way_out})"),
            None => format!("{what} failed ({status}): {words}"),
        };
        Err(Failure::new(reason, message))
    }

    /// Starts git in `directory`, to be asked and read by the caller; what it complains of goes to our own stderr.
    pub(super) fn start(&self, directory: &Path, arguments: &[&str]) -> Result<Child, Failure> {
        let mut command = self.command(directory);
        command.args(arguments).stdin(Stdio::piped()).stderr(Stdio::inherit());
        command.spawn().map_err(|error| Failure::other("run git, which must be installed", error))
    }

    fn command(&self, directory: &Path) -> Command {
        let mut command = Command::new("git");
        // Nothing of ours leaks in but what programs need to be found and to reach the network.
        command.env_clear();
        for name in [
            "PATH",
            "TMPDIR",
            "LD_LIBRARY_PATH",
            "http_proxy",
            "https_proxy",
            "no_proxy",
            "HTTPS_PROXY",
            "NO_PROXY",
            "SSL_CERT_FILE",
            "SSL_CERT_DIR",
        ] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        let fixed = [
            ("GIT_CONFIG_NOSYSTEM", "1"),
            ("GIT_CONFIG_GLOBAL", "/dev/null"),
            ("GIT_ATTR_NOSYSTEM", "1"),
            ("GIT_TERMINAL_PROMPT", "0"),
            ("GIT_LFS_SKIP_SMUDGE", "1"),
            // Its words are read by a program.
            ("LC_ALL", "C"),
        ];
        command.env("HOME", self.home).env("GIT_SSH_COMMAND", &self.access.ssh);
        command.envs(fixed).envs(self.access.environment.iter().cloned());
        let common = [
            ("safe.directory", "*"),
            ("core.hooksPath", "/dev/null"),
            ("core.fsmonitor", "false"),
            ("core.logAllRefUpdates", "false"),
            ("advice.detachedHead", "false"),
            ("init.defaultBranch", "main"),
            ("gc.auto", "0"),
            ("maintenance.auto", "false"),
        ];
        let settings = common.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let settings: Vec<_> = settings.into_iter().chain(self.access.settings.iter().cloned()).collect();
        command.env("GIT_CONFIG_COUNT", settings.len().to_string());
        for (index, (key, value)) in settings.iter().enumerate() {
            command.env(format!("GIT_CONFIG_KEY_{index}"), key).env(format!("GIT_CONFIG_VALUE_{index}"), value);
        }
        command
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    /// Reads stderr to its end. What a carriage return lets be written over is progress; lines are kept. ssh ends its
    /// lines with both.
    async fn listen(&self, mut stderr: impl AsyncRead + Unpin) -> String {
        let mut words = Vec::new();
        let mut line = Vec::new();
        let mut returned = false;
        let mut buffer = [0; 8192];
        while let Ok(read @ 1..) = stderr.read(&mut buffer).await {
            for byte in &buffer[..read] {
                if !matches!(byte, b'\r' | b'\n') {
                    if std::mem::take(&mut returned) {
                        line.clear();
                    }
                    line.push(*byte);
                    continue;
                }
                let text = String::from_utf8_lossy(&line);
                let progress = progress(&text);
                if let Some((done, all)) = progress {
                    self.reporter.progress(Phase::Cloning, done, Some(all), received(&text));
                }
                if *byte == b'\r' {
                    returned = true;
                    continue;
                }
                if progress.is_none() {
                    words.append(&mut line);
                    words.push(b'\n');
                    let excess = words.len().saturating_sub(LAST_WORDS);
                    words.drain(..excess);
                }
                line.clear();
                returned = false;
            }
        }
        words.extend_from_slice(&line);
        String::from_utf8_lossy(&words).into_owned()
    }
}

/// `Receiving objects:  45% (10/22), 1.20 MiB | …` says that 10 of 22 are done.
fn progress(line: &str) -> Option<(u64, u64)> {
    let (_, rest) = line.split_once("% (")?;
    let (done, all) = rest.split_once(')')?.0.split_once('/')?;
    Some((done.parse().ok()?, all.parse().ok()?))
}

/// The bytes in such a line; 0 when it has none.
fn received(line: &str) -> u64 {
    let amount = || {
        let (_, rest) = line.split_once("), ")?;
        let mut words = rest.split_whitespace();
        let (number, unit) = (words.next()?.parse::<f64>().ok()?, words.next()?.trim_end_matches(','));
        let scale = match unit {
            "bytes" => 1.0,
            "KiB" => 1024.0,
            "MiB" => 1024.0 * 1024.0,
            "GiB" => 1024.0 * 1024.0 * 1024.0,
            _ => return None,
        };
        Some((number * scale) as u64)
    };
    amount().unwrap_or(0)
}

/// The lines that tell what is wrong; all of them when none does.
fn telling(words: &str) -> String {
    let telling = |line: &&str| {
        let line = line.to_lowercase();
        ["fatal:", "error:", "remote:", "permission denied", "host key", "load key"]
            .iter()
            .any(|mark| line.contains(mark))
    };
    let lines: Vec<&str> = words.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let chosen: Vec<&str> = lines.iter().copied().filter(telling).collect();
    let chosen = if chosen.is_empty() { lines } else { chosen };
    let last = chosen.len().saturating_sub(6);
    chosen[last..].join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read_from_what_git_shows_to_people() {
        let line = "Receiving objects:  45% (10/22), 1.50 MiB | 3.00 MiB/s";
        assert_eq!((progress(line), received(line)), (Some((10, 22)), 1_572_864));
        assert_eq!(progress("remote: Counting objects: 100% (3/3), done."), Some((3, 3)));
        assert_eq!(progress("fatal: repository not found"), None);
        assert_eq!(received("Updating files: 100% (22/22), done."), 0);
    }

    #[tokio::test]
    async fn lines_of_ssh_are_kept_and_what_is_written_over_is_not() {
        let (access, reporter) = (Access::default(), Reporter::to(Box::new(std::io::sink())));
        let program = Program::new(&access, Path::new("/"), &reporter);
        let said =
            b"x:  1% (1/9)\rx: 99% (9/9)\rx: 100% (9/9), done.\nwritten over\rh: Permission denied.\r\nfatal: no\r";
        assert_eq!(program.listen(&said[..]).await, "h: Permission denied.\nfatal: no");
    }

    #[test]
    fn only_telling_lines_are_told() {
        let words = "Cloning into 'x'...\nremote: Repository not found.\nfatal: repository 'u' not found\n";
        assert_eq!(telling(words), "remote: Repository not found.; fatal: repository 'u' not found");
        assert_eq!(telling("something odd\n"), "something odd");
    }
}
