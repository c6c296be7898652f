//! What pins and leases reach, looked at as often as it takes.

use std::{collections::HashSet, ops::ControlFlow, path::Path};

use super::{
    Freed, Graph, Incomplete, PAGE, Phase, Progress, Roots, Verdict, Watch,
    marks::{Mark, Marks},
};
use crate::{
    Blob, Digest, StoreError,
    local::Root,
    store::Result,
    tree::{Directory, MAX_DIRECTORY_BYTES},
};

/// How far a collection is, and who hears of it.
pub(crate) struct Report<'a> {
    pub(crate) progress: Progress,
    watch: Watch<'a>,
}

impl<'a> Report<'a> {
    pub(crate) fn new(watch: Watch<'a>) -> Self {
        Self { progress: Progress::default(), watch }
    }

    pub(crate) fn enter(&mut self, phase: Phase) -> Result<()> {
        self.progress.phase = phase;
        self.tell()
    }

    /// Says how far it is.
    ///
    /// # Errors
    /// [`StoreError::Closed`] when the collection is to end.
    pub(crate) fn tell(&mut self) -> Result<()> {
        if (self.watch)(&self.progress).is_break() { Err(broken_off()) } else { Ok(()) }
    }

    pub(crate) fn done(mut self) -> Result<Progress> {
        self.enter(Phase::Done)?;
        Ok(self.progress)
    }
}

/// What was found to be reachable since a collection began.
pub(crate) struct Marking<'a> {
    graph: &'a dyn Graph,
    marks: Marks,
    /// In milliseconds since 1970: leases that ended before are none.
    began: u64,
    /// Trees of the pins that were followed.
    pinned: HashSet<Blob>,
    /// Whether something is missing below a directory that was followed for a lease.
    gaps: bool,
}

impl<'a> Marking<'a> {
    /// Nothing is marked yet; `scratch` is a folder of its own that is made and removed.
    pub(crate) fn begin(graph: &'a dyn Graph, scratch: &Path) -> Result<Self> {
        let (began, marks) = (graph.now(), Marks::create(scratch)?);
        Ok(Self { graph, marks, began, pinned: HashSet::new(), gaps: false })
    }

    /// When it began, in milliseconds since 1970.
    pub(crate) fn began(&self) -> u64 {
        self.began
    }

    /// Until when nothing is to be condemned, if that is still to come.
    pub(crate) fn protected_until(&self) -> Result<Option<u64>> {
        Ok(self.graph.protected_until()?.filter(|until| *until > self.began))
    }

    pub(crate) fn are_marked(&self, digests: &[Digest]) -> Result<Vec<bool>> {
        Ok(self.marks.get(digests)?.iter().map(Option::is_some).collect())
    }

    /// Marks what the pins and leases reach that there are now. What was marked stays so. Pins that miss something are in
    /// the progress then, and no others.
    pub(crate) fn mark(&mut self, report: &mut Report<'_>) -> Result<Roots> {
        let roots = self.graph.roots()?;
        // What was followed is not followed again: a new pin would not be seen to miss what its lease missed.
        if self.gaps && !roots.roots.iter().all(|root| self.pinned.contains(&root.tree)) {
            self.marks.clear()?;
            self.gaps = false;
        }
        self.mark_roots(&roots.roots, report)?;
        self.mark_leases(report)?;
        self.pinned.extend(roots.roots.iter().map(|root| root.tree));
        Ok(roots)
    }

    fn mark_roots(&self, roots: &[Root], report: &mut Report<'_>) -> Result<()> {
        report.progress.incomplete.clear();
        for (number, root) in roots.iter().enumerate() {
            let problem = self.mark_tree(&root.tree, Mark::Pin(number), report)?;
            if let Some(problem) = problem {
                let problem = problem.to_string();
                tracing::error!(owner = root.owner_uid, kind = root.kind, name = root.name, %problem, "a pinned tree is incomplete: nothing is collected");
                report.progress.incomplete.push(Incomplete { root: root.clone(), problem });
            }
        }
        Ok(())
    }

    fn mark_leases(&mut self, report: &mut Report<'_>) -> Result<()> {
        let graph = self.graph;
        graph.leases(&mut |leases| {
            for (blob, until) in leases.iter().filter(|(_, until)| *until > self.began) {
                // Whatever it is: it is kept, and if it is a directory, so is all below.
                let mark = Mark::Lease(*until);
                if blob.size <= MAX_DIRECTORY_BYTES as u64 && graph.may_be_directory(blob)? {
                    let problem = self.mark_tree(blob, mark, report)?;
                    // Most that is leased is no directory, and has nothing below.
                    self.gaps |= problem.is_some() && self.marks.is_followed(&blob.digest)?;
                }
            }
            let kept: Vec<(Digest, Mark)> = leases
                .iter()
                .filter(|(_, until)| *until > self.began)
                .map(|(blob, until)| (blob.digest, Mark::Lease(*until)))
                .collect();
            self.marks.keep(&kept)?;
            report.tell()
        })
    }

    /// Marks all below `root`; returns the first thing below it that is missing or is no directory.
    fn mark_tree(&self, root: &Blob, mark: Mark, report: &mut Report<'_>) -> Result<Option<StoreError>> {
        let mut problem = None;
        let mut waiting = vec![*root];
        while let Some(blob) = waiting.pop() {
            if self.marks.is_followed(&blob.digest)? {
                continue;
            }
            let directory =
                match self.graph.read(&blob).and_then(|data| {
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
            self.marks.follow(&blob.digest, &contents, mark)?;
            waiting.extend(directory.subdirectories().map(|(_, blob)| blob));
            report.progress.directories += 1;
            if report.progress.directories.is_multiple_of(PAGE as u64) {
                report.tell()?;
            }
        }
        Ok(problem)
    }
}

/// Says of each blob of `graph` why a collection would keep it, or not, and changes nothing.
///
/// # Errors
/// Those of the graph and of the scratch folder; [`StoreError::Closed`] when it was broken off.
pub fn explain(
    graph: &dyn Graph,
    scratch: &Path,
    tell: &mut dyn FnMut(Blob, Verdict) -> ControlFlow<()>,
    watch: Watch<'_>,
) -> Result<Progress> {
    let mut report = Report::new(watch);
    let mut marking = Marking::begin(graph, scratch)?;
    let roots = marking.mark(&mut report)?.roots;
    report.progress.protected_until = marking.protected_until()?;
    report.enter(Phase::Condemn)?;
    let mut after = None;
    while let Some((page, last)) = page(graph.blobs(after.as_ref())?, |blob| blob.digest) {
        let digests: Vec<Digest> = page.iter().map(|blob| blob.digest).collect();
        let condemned = graph.condemned_since(&digests)?;
        for ((blob, mark), since) in page.iter().zip(marking.marks.get(&digests)?).zip(condemned) {
            let verdict = match (mark, since) {
                (Some(Mark::Pin(number)), _) => match roots.get(number) {
                    Some(root) => Verdict::Pinned(root.clone()),
                    None => return Err(marking.marks.broken()),
                },
                (Some(Mark::Lease(until)), _) => Verdict::Leased(until),
                (None, Some(since)) => Verdict::Condemned(since),
                (None, None) => Verdict::Unreachable,
            };
            report.progress.examined.add(blob);
            if mark.is_none() {
                report.progress.condemned.add(blob);
            }
            if tell(*blob, verdict).is_break() {
                return Err(broken_off());
            }
        }
        after = Some(last);
        report.tell()?;
    }
    report.done()
}

impl Freed {
    pub(crate) fn add(&mut self, blob: &Blob) {
        self.blobs += 1;
        self.bytes += blob.size;
    }
}

fn broken_off() -> StoreError {
    StoreError::Closed("that was being collected".to_owned())
}

/// A page with where it ends; `None` after the last one.
pub(crate) fn page<T>(rows: Vec<T>, digest: impl Fn(&T) -> Digest) -> Option<(Vec<T>, Digest)> {
    let last = digest(rows.last()?);
    Some((rows, last))
}
