//! Named points at which a test can end the process, to prove that what is left is understood.
//!
//! `AETHER_CRASH_AT=<name>` makes the process abort when it gets there, `<name>@2` when it gets there the second time:
//! no destructor, no buffer flushed, as with `kill -9`. With `AETHER_CRASH_ONCE=<file>` it does so only while that file is
//! not there, and makes it first: so a process that is started again in the same environment goes on. Without the
//! variables a point costs one load of a static.
//!
//! A crate that has points lists them as `pub const POINTS: &[&str]` in its module `crash`, in the order in which they are
//! passed. Its tests go through that list; a name that is not in it does not compile.

use std::fs::File;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The armed point, read once from the environment.
struct Armed {
    name: String,
    /// How often it is still passed before the end.
    left: AtomicU64,
    /// The file that says that it has been the end already.
    once: Option<PathBuf>,
}

fn armed() -> Option<&'static Armed> {
    static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
    let read = || {
        let value = std::env::var("AETHER_CRASH_AT").ok()?;
        let (name, time) = value.split_once('@').unwrap_or((&value, "1"));
        let once = std::env::var_os("AETHER_CRASH_ONCE").map(PathBuf::from);
        Some(Armed { name: name.to_owned(), left: AtomicU64::new(time.parse().unwrap_or(1)), once })
    };
    ARMED.get_or_init(read).as_ref()
}

/// Ends the process if this point is armed. To be called by [`crash_point`], which checks the name.
pub fn pass(name: &str) {
    let Some(armed) = armed().filter(|armed| armed.name == name) else { return };
    if armed.left.fetch_sub(1, Ordering::Relaxed) != 1 {
        return;
    }
    if let Some(Err(error)) = armed.once.as_ref().map(File::create_new)
        && error.kind() == ErrorKind::AlreadyExists
    {
        return;
    }
    eprintln!("crash point {name}");
    std::process::abort();
}

/// Whether a name is in a list of points; usable at compile time.
pub const fn is_listed(points: &[&str], name: &str) -> bool {
    let mut i = 0;
    while i < points.len() {
        if same(points[i].as_bytes(), name.as_bytes()) {
            return true;
        }
        i += 1;
    }
    false
}

const fn same(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let mut i = 0;
    while i < a.len() {
        if a[i] != b[i] {
            return false;
        }
        i += 1;
    }
    true
}

/// A point of the calling crate, named in its `crash::POINTS`.
#[macro_export]
#[allow(clippy::crate_in_macro_def, reason = "the list is the calling crate's")]
macro_rules! crash_point {
    ($name:literal) => {{
        const { assert!($crate::is_listed(crate::crash::POINTS, $name), "crash point is not in crash::POINTS") };
        $crate::pass($name);
    }};
}
