//! Garbage collection: deletes what neither a pin nor a lease keeps, and nothing else, whatever happens meanwhile.
//!
//! The roots are the pins of the store and the leases of its clients; a root that is a directory keeps all below it.
//! One collection goes through these phases ([`Phase`]):
//!
//! 1. **Mark** what the roots reach.
//! 2. **Condemn** what is not marked and has no lease. From here on the answer to "is it there?" is no, so nobody builds
//!    on it any more; it can still be read, and whoever stores it anew lifts the sentence.
//! 3. **Adopt**: wait until everybody who answers for the store knows the condemned.
//! 4. **Mark again** from what was pinned or leased meanwhile, and **rescue** what that reaches.
//! 5. **Sentence**: from here on a pin of a condemned tree is refused. If one came since the marking, back to 4.
//! 6. **Sweep**: delete the condemned, at a limited rate; then give the space back.
//!
//! Why that loses nothing: an answer "present" is given only for what is not condemned, and is a lease that is on disk
//! before the answer. So what a client may build on was either marked in 1, with all below it, or was leased before 4 looked
//! at it. A collection can be killed anywhere: before 5 the next one begins at 1 and rescues what it marks, after 5
//! it goes on with 6, because what is left of the condemned is still nobody's.
//!
//! A directory below a pin that is missing or damaged may have reached anything: then nothing is condemned, and the
//! report names the pin. What a lease names is no promise of ours that it is whole: there such a gap is no reason to stop,
//! until somebody pins it.
//!
//! **Memory** does not grow with the number of blobs: the marks are rows of a RocksDB in a scratch folder ([`Marks`]:
//! some 24 MiB of buffers; some 55 bytes on disk per blob that is kept), pages have [`PAGE`] rows, and the way down a tree holds
//! the names of the subdirectories of its ancestors. Each pin takes some 300 bytes while the collection runs.
//!
//! Where the blobs are is behind [`Heap`]; [`LocalStore`](crate::LocalStore) is one.

mod heap;
mod marks;
mod pace;

use std::{
    collections::HashSet,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

pub use heap::{Freed, Heap, Roots};
pub use pace::Pace;

use crate::{
    Blob, Digest, StoreError,
    crash::crash_point,
    local::Root,
    store::Result,
    tree::{Directory, MAX_DIRECTORY_BYTES},
};
use marks::{Mark, Marks};

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
    progress: Progress,
    /// Whether something is missing below a directory that was followed for a lease.
    gaps: bool,
}

impl<'a> Collector<'a> {
    /// Collects `heap`; `scratch` is a folder of its own that is made and removed.
    pub fn new(heap: &'a dyn Heap, scratch: &Path) -> Self {
        Self { heap, scratch: scratch.to_owned(), progress: Progress::default(), gaps: false }
    }

    /// Collects: deletes what nothing keeps, at most at `pace`.
    ///
    /// When `watch` breaks off, what is condemned stays so until the next collection.
    ///
    /// # Errors
    /// Those of the heap and of the scratch folder; [`StoreError::Closed`] when it was broken off.
    pub fn collect(mut self, pace: Pace, watch: Watch<'_>) -> Result<Progress> {
        if self.heap.is_sentenced()? {
            self.sweep(pace, watch)?;
        }
        let begin = self.heap.now();
        let mut marks = Marks::create(&self.scratch)?;
        let roots = self.heap.roots()?.roots;
        self.mark(&marks, &roots, begin, watch)?;
        let mut whole: HashSet<Blob> = roots.iter().map(|root| root.tree).collect();
        crash_point!("collect.marked");
        self.progress.protected_until = self.heap.protected_until()?.filter(|until| *until > begin);
        if self.progress.incomplete.is_empty() && self.progress.protected_until.is_none() {
            self.condemn(&marks, begin, watch)?;
            crash_point!("collect.condemned");
            self.heap.adopt()?;
            loop {
                self.enter(Phase::Rescue, watch)?;
                let Roots { roots, appeals } = self.heap.roots()?;
                // What was followed is not followed again: a new pin would not be seen to miss what its lease missed.
                if self.gaps && !roots.iter().all(|root| whole.contains(&root.tree)) {
                    drop(marks);
                    marks = Marks::create(&self.scratch)?;
                    self.gaps = false;
                }
                self.mark(&marks, &roots, begin, watch)?;
                whole.extend(roots.iter().map(|root| root.tree));
                crash_point!("collect.marked.again");
                self.rescue(&marks, watch)?;
                crash_point!("collect.rescued");
                // A pin may have come with a tree that misses something.
                if !self.progress.incomplete.is_empty() {
                    break;
                }
                if self.heap.sentence(appeals)? {
                    crash_point!("collect.sentenced");
                    self.sweep(pace, watch)?;
                    break;
                }
            }
        }
        self.enter(Phase::Done, watch)?;
        Ok(self.progress)
    }

    /// Says of each blob why it stays or does not, and changes nothing.
    ///
    /// # Errors
    /// As [`Collector::collect`].
    pub fn explain(
        mut self,
        tell: &mut dyn FnMut(Blob, Verdict) -> ControlFlow<()>,
        watch: Watch<'_>,
    ) -> Result<Progress> {
        let begin = self.heap.now();
        let marks = Marks::create(&self.scratch)?;
        let roots = self.heap.roots()?.roots;
        self.mark(&marks, &roots, begin, watch)?;
        self.progress.protected_until = self.heap.protected_until()?.filter(|until| *until > begin);
        self.enter(Phase::Condemn, watch)?;
        let mut after = None;
        while let Some((page, last)) = page(self.heap.blobs(after.as_ref())?, |blob| blob.digest) {
            let digests: Vec<Digest> = page.iter().map(|blob| blob.digest).collect();
            let condemned = self.heap.condemned_since(&digests)?;
            for ((blob, mark), since) in page.iter().zip(marks.get(&digests)?).zip(condemned) {
                let verdict = match (mark, since) {
                    (Some(Mark::Pin(number)), _) => match roots.get(number) {
                        Some(root) => Verdict::Pinned(root.clone()),
                        None => return Err(marks.broken()),
                    },
                    (Some(Mark::Lease(until)), _) => Verdict::Leased(until),
                    (None, Some(since)) => Verdict::Condemned(since),
                    (None, None) => Verdict::Unreachable,
                };
                self.progress.examined.add(blob);
                if mark.is_none() {
                    self.progress.condemned.add(blob);
                }
                if tell(*blob, verdict).is_break() {
                    return Err(broken_off());
                }
            }
            after = Some(last);
            self.tell(watch)?;
        }
        self.enter(Phase::Done, watch)?;
        Ok(self.progress)
    }

    /// Marks what pins and leases reach.
    fn mark(&mut self, marks: &Marks, roots: &[Root], begin: u64, watch: Watch<'_>) -> Result<()> {
        self.mark_roots(marks, roots, watch)?;
        self.mark_leases(marks, begin, watch)
    }

    fn mark_roots(&mut self, marks: &Marks, roots: &[Root], watch: Watch<'_>) -> Result<()> {
        self.progress.incomplete.clear();
        for (number, root) in roots.iter().enumerate() {
            let problem = self.mark_tree(marks, &root.tree, Mark::Pin(number), watch)?;
            if let Some(problem) = problem {
                let problem = problem.to_string();
                tracing::error!(owner = root.owner_uid, kind = root.kind, name = root.name, %problem, "a pinned tree is incomplete: nothing is collected");
                self.progress.incomplete.push(Incomplete { root: root.clone(), problem });
            }
        }
        Ok(())
    }

    fn mark_leases(&mut self, marks: &Marks, begin: u64, watch: Watch<'_>) -> Result<()> {
        let mut after = None;
        while let Some((page, last)) = page(self.heap.leases(after.as_ref())?, |(blob, _)| blob.digest) {
            for (blob, until) in page.into_iter().filter(|(_, until)| *until > begin) {
                // Whatever it is: it is kept, and if it is a directory, so is all below.
                let mark = Mark::Lease(until);
                if self.heap.may_be_directory(&blob)? && blob.size <= MAX_DIRECTORY_BYTES as u64 {
                    let problem = self.mark_tree(marks, &blob, mark, watch)?;
                    // Most that is leased is no directory, and has nothing below.
                    self.gaps |= problem.is_some() && marks.is_followed(&blob.digest)?;
                }
                marks.keep(&[blob.digest], mark)?;
            }
            after = Some(last);
            self.tell(watch)?;
        }
        Ok(())
    }

    /// Marks all below `root`; returns the first thing below it that is missing or is no directory.
    fn mark_tree(&mut self, marks: &Marks, root: &Blob, mark: Mark, watch: Watch<'_>) -> Result<Option<StoreError>> {
        let mut problem = None;
        let mut waiting = vec![*root];
        while let Some(blob) = waiting.pop() {
            if marks.is_followed(&blob.digest)? {
                continue;
            }
            let directory =
                match self.heap.read(&blob).and_then(|data| {
                    Directory::decode(&data).map_err(|source| StoreError::NotADirectory { blob, source })
                }) {
                    Ok(directory) => directory,
                    Err(
                        error @ (StoreError::NotFound { .. }
                        | StoreError::Corrupt { .. }
                        | StoreError::NotADirectory { .. }),
                    ) => {
                        problem.get_or_insert(error);
                        continue;
                    }
                    Err(error) => return Err(error),
                };
            let contents: Vec<Digest> = directory.contents().map(|blob| blob.digest).collect();
            marks.follow(&blob.digest, &contents, mark)?;
            waiting.extend(directory.subdirectories().map(|(_, blob)| blob));
            self.progress.directories += 1;
            if self.progress.directories.is_multiple_of(PAGE as u64) {
                self.tell(watch)?;
            }
        }
        Ok(problem)
    }

    fn condemn(&mut self, marks: &Marks, begin: u64, watch: Watch<'_>) -> Result<()> {
        self.enter(Phase::Condemn, watch)?;
        let mut after = None;
        while let Some((page, last)) = page(self.heap.blobs(after.as_ref())?, |blob| blob.digest) {
            let digests: Vec<Digest> = page.iter().map(|blob| blob.digest).collect();
            let mut unmarked = Vec::new();
            for (blob, mark) in page.iter().zip(marks.get(&digests)?) {
                self.progress.examined.add(blob);
                if mark.is_none() {
                    unmarked.push(*blob);
                }
            }
            for blob in self.heap.condemn(&unmarked, begin)? {
                self.progress.condemned.add(&blob);
            }
            crash_point!("collect.condemned.some");
            after = Some(last);
            self.tell(watch)?;
        }
        Ok(())
    }

    fn rescue(&mut self, marks: &Marks, watch: Watch<'_>) -> Result<()> {
        let mut after = None;
        while let Some((page, last)) = page(self.heap.condemned(after.as_ref())?, |digest| *digest) {
            let marked: Vec<Digest> =
                page.iter().zip(marks.get(&page)?).filter(|(_, mark)| mark.is_some()).map(|(d, _)| *d).collect();
            self.heap.rescue(&marked)?;
            self.progress.rescued += marked.len() as u64;
            after = Some(last);
            self.tell(watch)?;
        }
        Ok(())
    }

    /// Deletes everything that is still condemned. Only under a sentence.
    fn sweep(&mut self, mut pace: Pace, watch: Watch<'_>) -> Result<()> {
        self.enter(Phase::Sweep, watch)?;
        let step = DELETIONS.min(pace.step());
        let mut after = None;
        while let Some((page, last)) = page(self.heap.condemned(after.as_ref())?, |digest| *digest) {
            for digests in page.chunks(step) {
                let freed = self.heap.delete(digests)?;
                crash_point!("collect.deleted.some");
                self.progress.deleted.blobs += freed.blobs;
                self.progress.deleted.bytes += freed.bytes;
                self.tell(watch)?;
                pace.wait(digests.len() as u64);
            }
            after = Some(last);
        }
        crash_point!("collect.deleted");
        self.enter(Phase::Reclaim, watch)?;
        self.heap.finish()
    }

    fn enter(&mut self, phase: Phase, watch: Watch<'_>) -> Result<()> {
        self.progress.phase = phase;
        self.tell(watch)
    }

    fn tell(&self, watch: Watch<'_>) -> Result<()> {
        if watch(&self.progress).is_break() { Err(broken_off()) } else { Ok(()) }
    }
}

fn broken_off() -> StoreError {
    StoreError::Closed("that was being collected".to_owned())
}

/// A page with where it ends; `None` after the last one.
fn page<T>(rows: Vec<T>, digest: impl Fn(&T) -> Digest) -> Option<(Vec<T>, Digest)> {
    let last = digest(rows.last()?);
    Some((rows, last))
}
