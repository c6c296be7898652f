//! What a place of blobs can do so that it can be collected.

use bytes::Bytes;

use crate::{Blob, Digest, local::Root, store::Result};

/// Blobs and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    /// How many.
    pub blobs: u64,
    /// Their bytes, before compression.
    pub bytes: u64,
}

/// The pins of a heap at one moment.
#[derive(Debug)]
pub struct Roots {
    /// The pins.
    pub roots: Vec<Root>,
    /// How many condemned trees were pinned until then.
    pub appeals: u64,
}

/// Sees some leases with their ends.
pub type VisitLeases<'a> = &'a mut dyn FnMut(&[(Blob, u64)]) -> Result<()>;

/// What can be marked: blobs, and what keeps them. All functions may block.
///
/// Pages are in order of digest, begin after a given one, have a bounded length, and the empty page is the last. What
/// comes or goes between two pages may or may not be in them.
pub trait Graph: Send + Sync {
    /// Milliseconds since 1970, by the clock of the leases.
    fn now(&self) -> u64;

    /// Before this time nothing is to be condemned: not all leases can be known yet.
    fn protected_until(&self) -> Result<Option<u64>>;

    /// The pins.
    fn roots(&self) -> Result<Roots>;

    /// Shows leases with their ends, some at a time; also of those that have ended.
    fn leases(&self, visit: VisitLeases<'_>) -> Result<()>;

    /// A page of the blobs that are there.
    fn blobs(&self, after: Option<&Digest>) -> Result<Vec<Blob>>;

    /// The contents of a blob, verified, condemned or not.
    fn read(&self, blob: &Blob) -> Result<Bytes>;

    /// Whether it is worth reading a blob to see whether it is a directory.
    fn may_be_directory(&self, blob: &Blob) -> Result<bool>;

    /// Since when each of `digests` has been condemned, in milliseconds since 1970.
    fn condemned_since(&self, digests: &[Digest]) -> Result<Vec<Option<u64>>>;
}

/// A place of blobs that can be collected blob by blob: [`Collector`](super::Collector) decides, a heap acts.
///
/// A heap promises, beside what its functions say:
/// - what it answers to be present, or acknowledges as stored, has a lease that is as durable as its blobs before the answer
///   is given; what is condemned is never answered to be present; storing a condemned blob ends its being condemned;
/// - condemning, sentencing and deleting never happen between the look and the answer.
pub trait Heap: Graph {
    /// Condemns those of `blobs` that have no lease until after `begin`, durably; returns which are condemned now.
    fn condemn(&self, blobs: &[Blob], begin: u64) -> Result<Vec<Blob>>;

    /// A page of the condemned.
    fn condemned(&self, after: Option<&Digest>) -> Result<Vec<Digest>>;

    /// Ends the being condemned of these.
    fn rescue(&self, digests: &[Digest]) -> Result<()>;

    /// From now on, and over restarts, a pin of a condemned tree is refused; until [`Heap::finish`]. Does nothing and
    /// says no if there have been other than `appeals` appeals.
    fn sentence(&self, appeals: u64) -> Result<bool>;

    /// Whether there is a sentence.
    fn is_sentenced(&self) -> Result<bool>;

    /// Deletes those of `digests` that are still condemned. A crash may leave some of them condemned and half deleted:
    /// deleting them again deletes the rest.
    fn delete(&self, digests: &[Digest]) -> Result<Freed>;

    /// Lifts the sentence when all is deleted, and gives space back as far as that is worth the work.
    fn finish(&self) -> Result<()>;
}
