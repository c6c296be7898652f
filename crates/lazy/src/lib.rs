//! The lazy layer of a node: the last data-only layer of a session whose contents are not all there yet.
//!
//! It is a FUSE file system with two levels, `ab/cdef…`, like the directory of objects. A lookup answers out of the
//! [catalog](aether_cas::lazy), without asking anybody; an open fetches the object, verified, and hands the kernel the
//! local file (FUSE passthrough, Linux 6.9), so that reads do not come here. Objects of 64 MiB and more are served in
//! parts while the rest arrives.
//!
//! Promises: what cannot be had is EIO, never ENOENT, after a deadline, in the log and counted; bytes of a whole object
//! are served only when they match its digest; the end of the server is not seen by readers, who wait for the next one.
//!
//! Two processes: the [`exchange`] holds the connection to the kernel and every question that is not answered, and
//! starts the [`server`], which answers them and may die at any time. The file system has no state of its own (inode
//! numbers come from the catalog), so any server can answer any question.

#![warn(missing_docs)]

pub mod exchange;
mod mount;
mod objects;
mod pace;
mod protocol;
pub mod server;
#[cfg(feature = "testing")]
pub mod testing;
mod workshop;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use exchange::{Exchange, Launch};
pub use mount::{detach, mount};
pub use objects::{Limits, Rest};
pub use server::Metrics;

/// What a thread that panicked left is as good as what any other left: each change is made whole under the lock.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
