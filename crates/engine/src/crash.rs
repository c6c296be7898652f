//! Named points at which a test can end the process, to prove that [`crate::repair`] understands what is left.
//!
//! How a point is armed is said in [`aether_crash`].

pub(crate) use aether_crash::crash_point;

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
