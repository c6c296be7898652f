//! Named points at which a test can end the process, to prove that what is left is understood.
//!
//! How a point is armed is said in [`aether_crash`].

pub(crate) use aether_crash::crash_point;

/// Every crash point of this crate, in the order in which a collection passes them. The kill tests go through
/// this list.
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
