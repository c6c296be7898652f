//! Named points at which a test can end the process, to prove that [`crate::repair`] understands what is left.
//!
//! How a point is armed is said in [`aether_cas::crash`].

/// Every crash point, in the order in which an operation passes them. The kill test goes through this list, and a
/// name that is not in it does not compile.
pub const POINTS: &[&str] = &[
    "pool.image.allocated",
    "pool.template.made",
    "pool.flush.taken",
    "pool.directory.filled",
    "pool.directory.dead",
    "image.written",
    "image.renamed",
    "session.created",
    "session.stamped",
    "session.recorded",
    "session.mounted",
    "session.published",
    "snapshot.frozen",
    "snapshot.taken",
    "snapshot.recorded",
    "fork.made",
    "digest.done",
    "restore.kept",
    "restore.applied",
    "reset.created",
    "reset.recorded",
    "delete.recorded",
    "delete.removed",
];

/// A point named in [`POINTS`].
macro_rules! crash_point {
    ($name:literal) => {{
        const { assert!(aether_cas::crash::is_listed($crate::crash::POINTS, $name), "crash point is not in crash::POINTS") };
        aether_cas::crash::pass($name);
    }};
}
pub(crate) use crash_point;
