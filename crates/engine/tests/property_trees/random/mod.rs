//! Random operations on real mounts: what the property tests of uppers and of restores share.

pub(crate) mod operation;
pub(crate) mod scenario;
pub(crate) mod session;

use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::UnshareFlags;

/// A number from the environment.
pub(crate) fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{variable}={text}: {error}")))
}

/// Tries seeds on every core until one fails; returns the first failure found.
pub(crate) fn search<F: Send>(seeds: u64, run: impl Fn(u64, &Path) -> Option<F> + Sync) -> Option<(u64, F)> {
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let found = Mutex::new(None);
    let workers = std::thread::available_parallelism().map_or(2, |cores| cores.get());
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                private(|scratch| {
                    while !stop.load(Ordering::Relaxed) {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= seeds {
                            return;
                        }
                        if let Some(failure) = run(seed, scratch) {
                            stop.store(true, Ordering::Relaxed);
                            found.lock().unwrap().get_or_insert((seed, failure));
                        }
                    }
                });
            });
        }
    });
    found.into_inner().unwrap()
}

/// Runs something once, on a thread with a mount namespace of its own.
pub(crate) fn alone<T: Send>(run: impl FnOnce(&Path) -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(|| private(run)).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Gives the calling thread a mount namespace of its own with an empty tmpfs in it. Everything mounted in it goes with
/// the thread.
fn private<T>(run: impl FnOnce(&Path) -> T) -> T {
    // SAFETY: neither the descriptor table nor anything else that Rust's library relies on is unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }
        .expect("this test mounts file systems and must run as root");
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).expect("make mounts private");
    let scratch = tempfile::tempdir().expect("a directory to mount on");
    mount("aether-test", scratch.path(), "tmpfs", MountFlags::empty(), c"mode=0755").expect("mount a tmpfs");
    let result = std::panic::catch_unwind(AssertUnwindSafe(|| run(scratch.path())));
    rustix::mount::unmount(scratch.path(), rustix::mount::UnmountFlags::DETACH).expect("unmount the tmpfs");
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
