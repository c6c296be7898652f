//! Runs the command: one loop over signals, children and two deadlines.

use std::io;
use std::process;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process_group, wait};

use crate::arguments::Command;
use crate::signals::Signals;

const TIMED_OUT: u8 = 124;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;
/// Added to the number of the signal that ended a command, as shells do.
const SIGNALLED: i32 = 128;

/// Runs the command to its end and returns the code to exit with; the help text lists the codes.
pub(crate) fn run(command: &Command) -> Result<u8, String> {
    let signals = Signals::block().map_err(|error| format!("cannot block signals: {error}"))?;
    let program = &command.argv[0];
    let mut prepared = process::Command::new(program);
    prepared.args(&command.argv[1..]);
    signals.prepare(&mut prepared);
    // Children are waited for by pid below, orphans included; the handle is of no more use.
    let group = match prepared.spawn() {
        Ok(child) => Pid::from_child(&child),
        Err(error) => {
            eprintln!("aether-worker: cannot run '{}': {error}", program.display());
            return Ok(if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_EXECUTABLE });
        }
    };
    Supervised { signals, group, grace: command.grace }.until_end(command.timeout)
}

/// Reaps orphans until a signal asks to end.
pub(crate) fn pause() -> Result<u8, String> {
    let signals = Signals::block().map_err(|error| format!("cannot block signals: {error}"))?;
    loop {
        match signals.wait(None).map_err(|error| format!("cannot wait for signals: {error}"))? {
            Some(libc::SIGTERM | libc::SIGINT | libc::SIGQUIT) => return Ok(0),
            _ => while reap()?.is_some() {},
        }
    }
}

/// What happens when a deadline is reached.
#[derive(Clone, Copy)]
enum Next {
    Terminate,
    Kill,
}

struct Supervised {
    signals: Signals,
    group: Pid,
    grace: Option<Duration>,
}

impl Supervised {
    fn until_end(self, timeout: Option<Duration>) -> Result<u8, String> {
        let mut timed_out = false;
        let mut next = timeout.and_then(after).map(|at| (at, Next::Terminate));
        loop {
            let left = next.map(|(at, _)| at.saturating_duration_since(Instant::now()));
            let signal = self.signals.wait(left).map_err(|error| format!("cannot wait for signals: {error}"))?;
            // Before a deadline is acted on: a command that has ended in time has not timed out.
            while let Some((pid, status)) = reap()? {
                if pid == self.group {
                    return Ok(exit_code(status, timed_out));
                }
            }
            match signal {
                Some(libc::SIGCHLD) => {}
                Some(libc::SIGTERM) => {
                    self.forward(Signal::TERM);
                    next = self.kill_later().or(next);
                }
                Some(number) => {
                    if let Some(signal) = Signal::from_named_raw(number) {
                        self.forward(signal);
                    }
                }
                None => match next {
                    Some((at, Next::Terminate)) if at <= Instant::now() => {
                        timed_out = true;
                        self.forward(Signal::TERM);
                        next = self.kill_later();
                    }
                    Some((at, Next::Kill)) if at <= Instant::now() => {
                        self.forward(Signal::KILL);
                        next = None;
                    }
                    _ => {}
                },
            }
        }
    }

    fn kill_later(&self) -> Option<(Instant, Next)> {
        self.grace.and_then(after).map(|at| (at, Next::Kill))
    }

    fn forward(&self, signal: Signal) {
        // The group may be gone already: then its end is about to be reaped.
        let _ = kill_process_group(self.group, signal);
        if signal == Signal::TERM {
            // A stopped process would not notice.
            let _ = kill_process_group(self.group, Signal::CONT);
        }
    }
}

/// `None` beyond what the clock can count, which is as good as no deadline.
fn after(duration: Duration) -> Option<Instant> {
    Instant::now().checked_add(duration)
}

/// Takes one ended child off the process table, be it the command or an orphan that fell to us as first process.
fn reap() -> Result<Option<(Pid, WaitStatus)>, String> {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(ended) => return Ok(ended),
            Err(Errno::CHILD) => return Ok(None),
            Err(Errno::INTR) => {}
            Err(error) => return Err(format!("cannot wait for children: {error}")),
        }
    }
}

fn exit_code(status: WaitStatus, timed_out: bool) -> u8 {
    let killed = status.terminating_signal() == Some(Signal::KILL.as_raw());
    if timed_out && !killed {
        return TIMED_OUT;
    }
    let code = status.exit_status().or_else(|| status.terminating_signal().map(|signal| SIGNALLED + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}
