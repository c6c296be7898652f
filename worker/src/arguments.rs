//! The command line: what may be said, and what it means.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

use crate::duration;

/// Printed by `--help`.
pub(crate) const HELP: &str = "\
Runs one command with a time limit, forwards signals to it and reaps what it leaves behind.

Usage:
  aether-worker [run] [--timeout DURATION] [--grace DURATION] [--] COMMAND [ARGUMENT]...
  aether-worker install DIRECTORY
  aether-worker pause

Modes:
  run       Runs COMMAND in a process group of its own (the default mode)
  install   Copies this program to DIRECTORY/worker, for an init container
  pause     Does nothing until SIGTERM, reaping orphans: the first process of a sandbox

Options of run:
  --timeout DURATION  Send SIGTERM to the whole process group after this time; 0 or nothing means no limit
  --grace DURATION    Send SIGKILL this long after a SIGTERM, whether from the limit or forwarded; 0 or nothing means never
  -h, --help          Print this help
  -V, --version       Print the version

DURATION is a number with a unit, ms, s, m, h or d, and may be composed: 500ms, 5s, 1.5h, 1m30s. Without a unit: seconds.
SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 are forwarded to the process group.

Exit code:
  that of COMMAND; 128+N if signal N ended it
  124  the limit was reached
  137  the limit was reached and COMMAND had to be killed
  125  aether-worker itself failed
  126  COMMAND was found but cannot be executed
  127  COMMAND was not found

Examples:
  aether-worker run --timeout 10m --grace 10s -- make test
  aether-worker --timeout 5s -- sh -c 'sleep 60'
  aether-worker install /aether && /aether/worker -- git status
";

/// What the program was asked to do.
#[derive(Debug, PartialEq)]
pub(crate) enum Mode {
    Help,
    Version,
    Install { directory: PathBuf },
    Pause,
    Run(Command),
}

/// A command with its limits.
#[derive(Debug, PartialEq)]
pub(crate) struct Command {
    /// Never empty.
    pub(crate) argv: Vec<OsString>,
    /// When to ask the process group to end.
    pub(crate) timeout: Option<Duration>,
    /// How long after asking to kill it.
    pub(crate) grace: Option<Duration>,
}

/// Reads the arguments that follow the program's name; an error is a message for the user.
pub(crate) fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Mode, String> {
    let mut arguments = arguments.peekable();
    let Some(first) = arguments.peek() else {
        return Err("a mode or a command is needed".into());
    };
    match first.to_str() {
        Some("-h" | "--help" | "help") => Ok(Mode::Help),
        Some("-V" | "--version") => Ok(Mode::Version),
        Some("install") => {
            arguments.next();
            let directory = arguments.next().ok_or("install: a directory is needed")?;
            nothing_more("install", arguments)?;
            Ok(Mode::Install { directory: directory.into() })
        }
        Some("pause") => {
            arguments.next();
            nothing_more("pause", arguments)?;
            Ok(Mode::Pause)
        }
        Some("run") => {
            arguments.next();
            parse_run(arguments)
        }
        Some(option) if option.starts_with('-') => parse_run(arguments),
        _ => Err(format!("unknown mode '{}'; to run a command of that name write 'run -- {0}'", first.display())),
    }
}

fn parse_run(mut arguments: impl Iterator<Item = OsString>) -> Result<Mode, String> {
    let mut command = Command { argv: Vec::new(), timeout: None, grace: None };
    while let Some(argument) = arguments.next() {
        let Some(text) = argument.to_str().filter(|text| text.starts_with('-')) else {
            command.argv.push(argument);
            break;
        };
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(OsString::from(value))),
            None => (text, None),
        };
        let limit = match name {
            "--" if value.is_none() => break,
            "-h" | "--help" => return Ok(Mode::Help),
            "--timeout" => &mut command.timeout,
            "--grace" => &mut command.grace,
            _ => return Err(format!("unknown option '{text}'")),
        };
        let value = value.or_else(|| arguments.next()).ok_or_else(|| format!("{name}: a duration is needed"))?;
        *limit = limit_of(name, &value)?;
    }
    command.argv.extend(arguments);
    if command.argv.is_empty() {
        return Err("run: a command is needed".into());
    }
    Ok(Mode::Run(command))
}

/// A limit of zero is no limit, as with `timeout(1)`.
fn limit_of(name: &str, value: &OsStr) -> Result<Option<Duration>, String> {
    let duration = value
        .to_str()
        .and_then(duration::parse)
        .ok_or_else(|| format!("{name}: '{}' is not a duration such as 500ms, 5s or 1m30s", value.display()))?;
    Ok((!duration.is_zero()).then_some(duration))
}

fn nothing_more(mode: &str, mut arguments: impl Iterator<Item = OsString>) -> Result<(), String> {
    match arguments.next() {
        Some(extra) => Err(format!("{mode}: unexpected argument '{}'", extra.display())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &[&str]) -> Result<Mode, String> {
        parse(line.iter().map(OsString::from))
    }

    fn command(argv: &[&str], timeout: Option<u64>, grace: Option<u64>) -> Mode {
        Mode::Run(Command {
            argv: argv.iter().map(OsString::from).collect(),
            timeout: timeout.map(Duration::from_secs),
            grace: grace.map(Duration::from_secs),
        })
    }

    #[test]
    fn run_may_be_left_out_before_an_option() {
        assert_eq!(
            parsed(&["--timeout", "5s", "--grace=10s", "--", "a", "-b"]),
            Ok(command(&["a", "-b"], Some(5), Some(10)))
        );
        assert_eq!(parsed(&["run", "--timeout", "5", "a"]), Ok(command(&["a"], Some(5), None)));
        assert_eq!(parsed(&["--", "run"]), Ok(command(&["run"], None, None)));
    }

    #[test]
    fn options_of_the_command_are_left_to_it() {
        assert_eq!(parsed(&["run", "ls", "--timeout", "x"]), Ok(command(&["ls", "--timeout", "x"], None, None)));
        assert_eq!(parsed(&["run", "--", "--help"]), Ok(command(&["--help"], None, None)));
    }

    #[test]
    fn zero_is_no_limit() {
        assert_eq!(parsed(&["run", "--timeout", "0", "--grace", "0s", "a"]), Ok(command(&["a"], None, None)));
    }

    #[test]
    fn mistakes_are_named() {
        for (line, words) in [
            (&[][..], "a mode or a command"),
            (&["run"], "a command is needed"),
            (&["run", "--timeout"], "--timeout: a duration"),
            (&["run", "--timeout", "soon", "a"], "'soon'"),
            (&["run", "--tiemout", "1s", "a"], "'--tiemout'"),
            (&["install"], "a directory"),
            (&["install", "/a", "/b"], "'/b'"),
            (&["pause", "1"], "'1'"),
            (&["ls"], "'ls'"),
        ] {
            let message = parsed(line).expect_err("must be refused");
            assert!(message.contains(words), "{line:?}: {message}");
        }
    }
}
