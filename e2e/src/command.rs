//! Runs other programs and says, when one fails, which one, with which arguments, and what it printed.

use std::{ffi::OsStr, fmt::Write as _, process::Stdio, time::Duration};

use anyhow::{Context, Result, bail};
use tokio::{io::AsyncWriteExt, process::Command};

/// What a program printed and how it ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
    /// Its exit code, or 128 + the signal that ended it.
    pub code: i32,
    /// How long it ran.
    pub took: Duration,
}

/// A command line with everything piped, which ends with us.
pub fn command<S: AsRef<OsStr>>(program: impl AsRef<OsStr>, args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

/// Runs a program to its end. A failing exit code is an error that carries what it printed.
pub async fn run<S: AsRef<OsStr>>(program: impl AsRef<OsStr>, args: impl IntoIterator<Item = S>) -> Result<String> {
    expect_success(&mut command(program, args)).await.map(|output| output.stdout)
}

/// As [`run`], on a prepared command.
pub async fn expect_success(command: &mut Command) -> Result<Output> {
    let output = output(command, None).await?;
    if output.code != 0 {
        bail!("{} exited with {}: {}", describe(command), output.code, complaint(&output));
    }
    Ok(output)
}

/// Runs a prepared command to its end, whatever its exit code, feeding it `input`.
pub async fn output(command: &mut Command, input: Option<&[u8]>) -> Result<Output> {
    use std::os::unix::process::ExitStatusExt;
    if input.is_some() {
        command.stdin(Stdio::piped());
    }
    let begun = std::time::Instant::now();
    let mut child = command.spawn().with_context(|| format!("cannot start {}", describe(command)))?;
    let stdin = child.stdin.take();
    let feed = async {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            // A program that ends early closes the pipe; its exit code tells more than our EPIPE.
            let _ = stdin.write_all(input).await;
        }
    };
    let (output, ()) = tokio::join!(child.wait_with_output(), feed);
    let output = output.with_context(|| format!("cannot wait for {}", describe(command)))?;
    Ok(Output {
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        code: output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or_default()),
        took: begun.elapsed(),
    })
}

/// The command line as a person would type it.
pub fn describe(command: &Command) -> String {
    let command = command.as_std();
    let mut line = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        let _ = write!(line, " {}", arg.to_string_lossy());
    }
    line
}

fn complaint(output: &Output) -> &str {
    let text = if output.stderr.trim().is_empty() { &output.stdout } else { &output.stderr };
    let text = text.trim();
    // The end says why; the beginning of a long output is progress.
    let mut from = text.len().saturating_sub(4000);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    &text[from..]
}
