//! Garbage collection: deletes what neither a pin nor a lease keeps, and nothing else, whatever happens meanwhile.
//!
//! The roots are the pins of the store and the leases of its clients; a root that is a directory keeps all below it.
//! One collection goes through these phases ([`Phase`]):
//!
//! 1. **Mark** what the roots reach.
//! 2. **Condemn** what is not marked and has no lease. From here on the answer to "is it there?" is no, so nobody builds
//!    on it any more; it can still be read, and whoever stores it anew lifts the sentence.
//! 3. **Mark again** from what was pinned or leased meanwhile, and **rescue** what that reaches.
//! 4. **Sentence**: from here on a pin of a condemned tree is refused. If one came since the marking, back to 3.
//! 5. **Sweep**: delete the condemned, at a limited rate; then give the space back.
//!
//! Why that loses nothing: an answer "present" is given only for what is not condemned, and is a lease that is on disk
//! before the answer. So what a client may build on was either marked in 1, with all below it, or was leased before 3 looked
//! at it. A collection can be killed anywhere: before 4 the next one begins at 1 and rescues what it marks, after 4
//! it goes on with 5, because what is left of the condemned is still nobody's.
//!
//! A directory below a pin that is missing or damaged may have reached anything: then nothing is condemned, and the
//! report names the pin. What a lease names is no promise of ours that it is whole: there such a gap is no reason to stop,
//! until somebody pins it.
//!
//! **Memory** does not grow with the number of blobs: the marks are rows of a RocksDB in a scratch folder ([`Marks`]:
//! some 24 MiB of buffers; some 55 bytes on disk per blob that is kept), pages have [`PAGE`] rows, and the way down a tree holds
//! the names of the subdirectories of its ancestors. Each pin takes some 300 bytes while the collection runs.
//!
//! Where the blobs are is behind [`Heap`]; [`LocalStore`](crate::LocalStore) is one. A bucket, of which nothing can be
//! deleted but whole packs, and in which several nodes work, marks by the same rules ([`Graph`]) and does the rest in its own way:
//! [`durable::collect`](crate::durable::collect).

mod heap;
mod marking;
mod marks;
mod pace;

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
};

pub use heap::{Freed, Graph, Heap, Roots, VisitLeases};
pub use marking::explain;
pub(crate) use marking::{Marking, Report, page};
pub use pace::Pace;

use crate::{Digest, crash::crash_point, local::Root, store::Result};

/// Blobs condemned or rescued in one step.
pub const PAGE: usize = 1024;
/// Blobs deleted in one step, during which nobody can store anything.
const DELETIONS: usize = 128;

/// What a collection is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Follows the pins and leases.
    #[default]
    Mark,
    /// Condemns what nothing keeps.
    Condemn,
    /// Waits until every node knows what is condemned. Where one node is all there is, nothing is to wait for.
    Adopt,
    /// Follows what was pinned and leased meanwhile, and rescues.
    Rescue,
    /// Deletes.
    Sweep,
    /// Gives space back.
    Reclaim,
    /// Has ended.
    Done,
}

/// How far a collection is, and at the end what it did.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// What it is doing.
    pub phase: Phase,
    /// Directories that were followed.
    pub directories: u64,
    /// Blobs that were looked at, and their bytes.
    pub examined: Freed,
    /// Those that nothing keeps, now or since an earlier collection.
    pub condemned: Freed,
    /// Blobs that were condemned and kept after all.
    pub rescued: u64,
    /// What was deleted.
    pub deleted: Freed,
    /// Pins below which a directory is missing or damaged. With one of them nothing was condemned.
    pub incomplete: Vec<Incomplete>,
    /// Nothing is collected before this time, in milliseconds since 1970, if it is to come.
    pub protected_until: Option<u64>,
}

/// A pin below which not everything can be followed.
#[derive(Clone, Debug)]
pub struct Incomplete {
    /// The pin.
    pub root: Root,
    /// What is wrong.
    pub problem: String,
}

/// Why a blob stays, or does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// This pin reaches it.
    Pinned(Root),
    /// It, or a directory above it, was promised to a client until this time, in milliseconds since 1970.
    Leased(u64),
    /// Nothing keeps it since this time; the next collection deletes it.
    Condemned(u64),
    /// Nothing keeps it: a collection would delete it.
    Unreachable,
}

/// Hears how far a collection is, and may end it.
pub type Watch<'a> = &'a mut dyn FnMut(&Progress) -> ControlFlow<()>;

/// Collects one heap. There must be one collector of a heap at a time.
pub struct Collector<'a> {
    heap: &'a dyn Heap,
    scratch: PathBuf,
}

impl<'a> Collector<'a> {
    /// Collects `heap`; `scratch` is a folder of its own that is made and removed.
    pub fn new(heap: &'a dyn Heap, scratch: &Path) -> Self {
        Self { heap, scratch: scratch.to_owned() }
    }

    /// Collects: deletes what nothing keeps, at most at `pace`.
    ///
    /// When `watch` breaks off, what is condemned stays so until the next collection.
    ///
    /// # Errors
    /// Those of the heap and of the scratch folder; [`StoreError::Closed`](crate::StoreError::Closed) when it was broken off.
    pub fn collect(self, pace: Pace, watch: Watch<'_>) -> Result<Progress> {
        let mut report = Report::new(watch);
        if self.heap.is_sentenced()? {
            self.sweep(pace, &mut report)?;
        }
        let mut marking = Marking::begin(self.heap, &self.scratch)?;
        marking.mark(&mut report)?;
        crash_point!("collect.marked");
        report.progress.protected_until = marking.protected_until()?;
        if report.progress.incomplete.is_empty() && report.progress.protected_until.is_none() {
            self.condemn(&marking, &mut report)?;
            crash_point!("collect.condemned");
            loop {
                report.enter(Phase::Rescue)?;
                let appeals = marking.mark(&mut report)?.appeals;
                crash_point!("collect.marked.again");
                self.rescue(&marking, &mut report)?;
                crash_point!("collect.rescued");
                // A pin may have come with a tree that misses something.
                if !report.progress.incomplete.is_empty() {
                    break;
                }
                if self.heap.sentence(appeals)? {
                    crash_point!("collect.sentenced");
                    self.sweep(pace, &mut report)?;
                    break;
                }
            }
        }
        report.done()
    }

    fn condemn(&self, marking: &Marking<'_>, report: &mut Report<'_>) -> Result<()> {
        report.enter(Phase::Condemn)?;
        let mut after = None;
        while let Some((page, last)) = page(self.heap.blobs(after.as_ref())?, |blob| blob.digest) {
            let digests: Vec<Digest> = page.iter().map(|blob| blob.digest).collect();
            let mut unmarked = Vec::new();
            for (blob, marked) in page.iter().zip(marking.are_marked(&digests)?) {
                report.progress.examined.add(blob);
                if !marked {
                    unmarked.push(*blob);
                }
            }
            for blob in self.heap.condemn(&unmarked, marking.began())? {
                report.progress.condemned.add(&blob);
            }
            crash_point!("collect.condemned.some");
            after = Some(last);
            report.tell()?;
        }
        Ok(())
    }

    fn rescue(&self, marking: &Marking<'_>, report: &mut Report<'_>) -> Result<()> {
        let mut after = None;
        while let Some((page, last)) = page(self.heap.condemned(after.as_ref())?, |digest| *digest) {
            let marked: Vec<Digest> =
                page.iter().zip(marking.are_marked(&page)?).filter(|(_, marked)| *marked).map(|(d, _)| *d).collect();
            self.heap.rescue(&marked)?;
            report.progress.rescued += marked.len() as u64;
            after = Some(last);
            report.tell()?;
        }
        Ok(())
    }

    /// Deletes everything that is still condemned. Only under a sentence.
    fn sweep(&self, mut pace: Pace, report: &mut Report<'_>) -> Result<()> {
        report.enter(Phase::Sweep)?;
        let step = DELETIONS.min(pace.step());
        let mut after = None;
        while let Some((page, last)) = page(self.heap.condemned(after.as_ref())?, |digest| *digest) {
            for digests in page.chunks(step) {
                let freed = self.heap.delete(digests)?;
                crash_point!("collect.deleted.some");
                report.progress.deleted.blobs += freed.blobs;
                report.progress.deleted.bytes += freed.bytes;
                report.tell()?;
                pace.wait(digests.len() as u64);
            }
            after = Some(last);
        }
        crash_point!("collect.deleted");
        report.enter(Phase::Reclaim)?;
        self.heap.finish()
    }
}
