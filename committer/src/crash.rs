//! Named points at which a test can end the process, to prove that the next one finds out what was done.
//!
//! How a point is armed is said in [`aether_crash`].

pub(crate) use aether_crash::crash_point;

/// Every crash point, in the order in which they are passed. The kill test goes through this list, and a name that is
/// not in it does not compile.
pub const POINTS: &[&str] = &[
    "git.based",
    "git.looked",
    "git.written",
    "git.committed",
    "git.pushed",
    "git.verified",
    "export.folder.made",
    "export.folder.written",
    "export.folder.renamed",
    "export.s3.begun",
    "export.s3.written",
    "export.s3.complete",
    "export.s3.ended",
];
