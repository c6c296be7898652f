//! Named points at which a test can end the process, to prove that what is left is understood.
//!
//! `AETHER_CRASH_AT=<name>` makes the process abort when it gets there, `<name>@2` when it gets there the second time:
//! no destructor, no buffer flushed, as with `kill -9`. Without the variable a point costs one load of a static.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Every crash point of this crate, in the order in which a collection passes them. A name that is not in the list does
/// not compile.
pub const POINTS: &[&str] = &[
    "collect.marked",
    "collect.condemned.some",
    "collect.condemned",
    "collect.marked.again",
    "collect.rescued",
    "collect.sentenced",
    "collect.delete.indexed",
    "collect.delete.unlinked",
    "collect.deleted.some",
    "collect.deleted",
];

/// The armed point, from `AETHER_CRASH_AT`, read once.
struct Armed {
    name: String,
    /// How often it is still passed before the end.
    left: AtomicU64,
}

fn armed() -> Option<&'static Armed> {
    static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
    let read = || {
        let value = std::env::var("AETHER_CRASH_AT").ok()?;
        let (name, time) = value.split_once('@').unwrap_or((&value, "1"));
        Some(Armed { name: name.to_owned(), left: AtomicU64::new(time.parse().unwrap_or(1)) })
    };
    ARMED.get_or_init(read).as_ref()
}

/// Ends the process if this point is armed. To be called by a macro of the crate that has the point, which checks the name.
pub fn pass(name: &str) {
    let Some(armed) = armed().filter(|armed| armed.name == name) else { return };
    if armed.left.fetch_sub(1, Ordering::Relaxed) == 1 {
        eprintln!("crash point {name}");
        std::process::abort();
    }
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

/// A point named in [`POINTS`].
macro_rules! crash_point {
    ($name:literal) => {{
        const { assert!($crate::crash::is_listed($crate::crash::POINTS, $name), "crash point is not in crash::POINTS") };
        $crate::crash::pass($name);
    }};
}
pub(crate) use crash_point;
