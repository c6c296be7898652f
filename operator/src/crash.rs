//! Named points at which a test can end the process, to prove that the next operator finds out what was done.
//!
//! How a point is armed is said in [`aether_crash`].

pub(crate) use aether_crash::crash_point;

/// Every crash point of a commit, in the order in which one passes them: wherever one effect is done and the next is not.
/// The kill tests go through this list.
pub const POINTS: &[&str] = &[
    // Its checkpoint is there, and not named in the status.
    "commit.checkpoint.taken",
    // What it is of is known, and not written.
    "commit.settled",
    // The status says that it waits, and nobody has been told.
    "commit.waiting",
    // An approval says that it counts, and the commit does not.
    "commit.answered",
    // The audit log says that it goes, and the status does not.
    "commit.recorded",
    // The status says that it goes, and nobody has been told; there is no Job.
    "commit.released",
    // The Job's account is there, and no Job.
    "commit.admitted",
    // The Job is there, and not named in the status.
    "commit.job.made",
    // A Job that is not to be believed is deleted, and the status does not say so.
    "commit.job.deleted",
    // What the Job did is known, and not written.
    "commit.heard",
    // The source has the revision, and the commit does not say so.
    "commit.promoted",
    // The status says how it ended, and nobody has been told.
    "commit.finished",
];
