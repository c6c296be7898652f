//! Signals as events of one loop: blocked for the whole process, then waited for. All `unsafe` of the program is here.

use std::io;
use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;
use std::time::Duration;

/// Forwarded to the command.
pub(crate) const FORWARDED: [libc::c_int; 6] =
    [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2];

/// Blocks [`FORWARDED`] and `SIGCHLD`, so that none is lost between two waits and none ends the process, also when it is
/// the first of its namespace.
pub(crate) struct Signals {
    waited: libc::sigset_t,
    /// What the process was started with, and the command gets.
    inherited: libc::sigset_t,
}

impl Signals {
    pub(crate) fn block() -> io::Result<Signals> {
        let mut waited = MaybeUninit::uninit();
        let mut inherited = MaybeUninit::uninit();
        // SAFETY: every pointer is to a live local; sigemptyset initialises `waited` before it is read, and
        // sigprocmask initialises `inherited` when it returns 0. The process has one thread.
        unsafe {
            // An ignored SIGCHLD, which is inherited, would make the kernel throw exit codes away.
            libc::signal(libc::SIGCHLD, libc::SIG_DFL);
            libc::sigemptyset(waited.as_mut_ptr());
            for signal in FORWARDED.into_iter().chain([libc::SIGCHLD]) {
                libc::sigaddset(waited.as_mut_ptr(), signal);
            }
            if libc::sigprocmask(libc::SIG_BLOCK, waited.as_ptr(), inherited.as_mut_ptr()) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Signals { waited: waited.assume_init(), inherited: inherited.assume_init() })
        }
    }

    /// The next signal, or `None` when `limit` has passed without one.
    pub(crate) fn wait(&self, limit: Option<Duration>) -> io::Result<Option<libc::c_int>> {
        let limit = limit.map(|limit| libc::timespec {
            tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        });
        let limit = limit.as_ref().map_or(ptr::null(), ptr::from_ref);
        // SAFETY: the set is initialised, siginfo may be null, and the limit is null or points to a live local.
        let signal = unsafe { libc::sigtimedwait(&self.waited, ptr::null_mut(), limit) };
        if signal > 0 {
            return Ok(Some(signal));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR) => Ok(None),
            _ => Err(error),
        }
    }

    /// Starts the command in a session, and so a process group, of its own, with the signal mask this process had.
    pub(crate) fn prepare(&self, command: &mut Command) {
        let inherited = self.inherited;
        // SAFETY: between fork and exec only setsid and sigprocmask run, both async-signal-safe, on copied values.
        unsafe {
            command.pre_exec(move || {
                rustix::process::setsid()?;
                match libc::sigprocmask(libc::SIG_SETMASK, &inherited, ptr::null_mut()) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
    }
}
