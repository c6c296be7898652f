//! Running git: its environment, its progress, and what it says when it fails.

use std::path::Path;
use std::process::{ExitStatus, Stdio};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use crate::access::Access;
use crate::failure::{Failure, classify, way_out};

/// How much of git's words is kept: its last ones.
const LAST_WORDS: usize = 16 * 1024;

/// Hears how many things are done, of how many, and how many bytes were received.
type OnProgress<'a> = &'a (dyn Fn(u64, u64, u64) + Send + Sync);

/// Git, as it is run for one repository.
#[derive(Clone, Copy)]
pub struct Program<'a> {
    access: &'a Access,
    home: &'a Path,
    progress: OnProgress<'a>,
}

/// What git is asked beside its arguments.
#[derive(Clone, Copy, Default)]
pub struct Call<'a> {
    /// What it reads.
    pub input: &'a [u8],
    /// Environment, in which no secret has a place either.
    pub environment: &'a [(&'a str, &'a str)],
}

/// How git ended.
pub struct Output {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it printed.
    pub printed: Vec<u8>,
    /// What it complained of.
    pub words: String,
}

impl<'a> Program<'a> {
    /// Git with this access. `home` is where programs that it runs may leave things.
    pub fn new(access: &'a Access, home: &'a Path, progress: OnProgress<'a>) -> Self {
        Self { access, home, progress }
    }

    /// Runs git in `directory`.
    ///
    /// # Errors
    /// Git's own words, and what they mean.
    pub async fn run(&self, directory: &Path, arguments: &[&str]) -> Result<(), Failure> {
        self.output(directory, arguments).await.map(drop)
    }

    /// Runs git in `directory` and returns what it printed.
    ///
    /// # Errors
    /// Git's own words, and what they mean.
    pub async fn output(&self, directory: &Path, arguments: &[&str]) -> Result<String, Failure> {
        let printed = self.ask(directory, arguments, Call::default()).await?;
        String::from_utf8(printed).map_err(|error| Failure::other("read what git printed", error))
    }

    /// Runs git in `directory` with input or environment, and returns what it printed.
    ///
    /// # Errors
    /// Git's own words, and what they mean.
    pub async fn ask(&self, directory: &Path, arguments: &[&str], call: Call<'_>) -> Result<Vec<u8>, Failure> {
        let output = self.call(directory, arguments, call).await?;
        if output.status.success() { Ok(output.printed) } else { Err(self.failure(arguments, &output)) }
    }

    /// Runs git in `directory`; it may end as it likes.
    ///
    /// # Errors
    /// Git cannot be run.
    pub async fn call(&self, directory: &Path, arguments: &[&str], call: Call<'_>) -> Result<Output, Failure> {
        tracing::info!(command = self.access.redact(&arguments.join(" ")), "git");
        let mut command = self.command(directory);
        if !call.input.is_empty() {
            command.stdin(Stdio::piped());
        }
        let mut child = command
            .args(arguments)
            .envs(call.environment.iter().copied())
            .spawn()
            .map_err(|error| Failure::other("run git, which must be installed", error))?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(mut stdout), Some(stderr)) = (stdout, stderr) else {
            return Err(Failure::other("run git", "it has no output"));
        };
        let tell = async {
            if let Some(mut stdin) = stdin {
                // What git says tells more than that it no longer listens.
                let _ = stdin.write_all(call.input).await;
            }
        };
        let mut printed = Vec::new();
        let ((), read, words) = tokio::join!(tell, stdout.read_to_end(&mut printed), self.listen(stderr));
        read.map_err(|error| Failure::other("read what git printed", error))?;
        let status = child.wait().await.map_err(|error| Failure::other("wait for git", error))?;
        Ok(Output { status, printed, words })
    }

    /// Why git failed, when it ended so.
    pub fn failure(&self, arguments: &[&str], output: &Output) -> Failure {
        let what = format!("git {}", arguments.first().unwrap_or(&""));
        let reason = classify(&output.words);
        let way_out = way_out(reason, &output.words, &self.access.named_secret());
        let words = self.access.redact(&telling(&output.words));
        let message = match way_out {
            Some(way_out) => format!("{what} failed: {words} ({way_out})"),
            None => format!("{what} failed ({}): {words}", output.status),
        };
        Failure::new(reason, message)
    }

    /// Starts git in `directory`, to be asked and read by the caller; what it complains of goes to our own stderr.
    ///
    /// # Errors
    /// Git cannot be run.
    pub fn start(&self, directory: &Path, arguments: &[&str]) -> Result<Child, Failure> {
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
                    (self.progress)(done, all, received(&text));
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
        let access = Access::default();
        let program = Program::new(&access, Path::new("/"), &|_, _, _| {});
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
