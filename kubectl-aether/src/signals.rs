//! Ctrl-C and its relatives, and how a program that they ended exits.

use std::fmt;

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// From its making on, signals are events instead of the end of the process.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    pub(crate) fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    /// The next signal.
    pub(crate) async fn next(&mut self) -> Interrupted {
        tokio::select! {
            _ = self.interrupt.recv() => Interrupted(2),
            _ = self.terminate.recv() => Interrupted(15),
            _ = self.hangup.recv() => Interrupted(1),
        }
    }

    /// The next signal that is no Ctrl-C: while a pager has the terminal, Ctrl-C is the pager's.
    pub(crate) async fn next_but_interrupt(&mut self) -> Interrupted {
        tokio::select! {
            _ = self.terminate.recv() => Interrupted(15),
            _ = self.hangup.recv() => Interrupted(1),
        }
    }
}

/// A signal asked the program to end; its number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interrupted(pub(crate) u8);

impl Interrupted {
    /// The exit code that a shell reports for it.
    pub(crate) fn exit_code(self) -> u8 {
        128 + self.0
    }
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "interrupted by signal {}", self.0)
    }
}

impl std::error::Error for Interrupted {}
