//! Garbage collection of a bucket: deletes packs, and nothing that anybody needs, whichever nodes work and die meanwhile.
//!
//! What can be deleted is a pack. So what is still needed of a pack that has too much waste is written anew first. The phases:
//!
//! 1. **Mark** what pins and leases reach ([`collect`](crate::collect)). What is in a young pack is leased.
//! 2. **Condemn**: of old packs with waste, store anew what is marked; then [condemn](super::terms) them.
//! 3. **Adopt**: wait until no node counts on them any more.
//! 4. **Mark again** from what was pinned or leased until then; store anew what that reaches and only condemned packs have.
//! 5. **Sweep**: delete the condemned, at a limited rate.
//!
//! Why that loses nothing: before a node says that a blob is present, or pins it, the lease is in the bucket, and the list of the
//! condemned by which it says so is young. So what anybody may build on was leased before 4 looked, or is present by a
//! pack that 5 does not delete. Packs are never acquitted and names never given twice, so a collection can be killed
//! anywhere, or stand still for days: the next one finds what is condemned and begins at 1. Two at one time only do some
//! work twice: of several copies the one in the pack with the highest name is kept by both; and each looks at what
//! the other has condemned after it has condemned itself.
//!
//! Before a pack is deleted, the copies that make it needless were read, and were good.
//!
//! **Waste** is what is not marked, and copies of what lies in a later pack too. A directory that
//! nothing needs makes its pack go whatever the rest: else it would count as present when what is below it is gone.
//! Small packs count as waste when there are many of them.

use std::{
    collections::{HashMap, HashSet},
    ops::ControlFlow,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::TryStreamExt;
use tokio::runtime::Handle;

use super::{
    Durable, PackName, Place,
    format::{Entry, MAX_SHARED_BLOB},
    spans,
    terms::{REMEMBERED, View, now, time_of, whole_millis},
};
use crate::{
    Blob, Digest, StoreError,
    collect::{self, Graph, Marking, PAGE, Pace, Phase, Progress, Report, Roots, Verdict, VisitLeases, Watch},
    crash::crash_point,
    store::Result,
};

/// Part of a pack that may be waste, in percent.
pub const WASTE: u64 = 25;
/// Packs shorter than this are written anew when there are [`MANY`].
const SMALL: u64 = 256 << 10;
const MANY: usize = 64;
/// Bytes of blobs that are stored anew together, at the least; a pack may bring as much again as it holds.
const TOGETHER: u64 = 4 << 20;
/// Packs that one record condemns.
const RECORD_PACKS: usize = 256;
/// A record that is older is written anew before more of its packs are deleted, so that it is remembered from then on.
const OLD_RECORD: Duration = Duration::from_secs(3600);
/// Records of leases that are read together.
const LEASE_RECORDS: usize = 64;
/// Between two looks whether the collection is to end.
const LOOK: Duration = Duration::from_millis(100);

/// Reads a blob, verified, from wherever it is nearest.
pub type Read<'a> = &'a (dyn Fn(&Blob) -> Result<Bytes> + Sync);

/// One bucket, to be collected by this node.
pub struct BucketCollector<'a> {
    durable: &'a Durable,
    read: Read<'a>,
    scratch: &'a Path,
    /// In percent.
    waste: u64,
}

/// What is taken out of packs to be stored together.
#[derive(Default)]
struct Moving {
    packs: Vec<PackName>,
    blobs: Vec<(Blob, Bytes)>,
    bytes: u64,
}

/// What is needed of a pack that has too much waste.
struct Needed {
    keep: Vec<Entry>,
    /// Because there is a directory in it that nothing needs.
    must_go: bool,
}

impl Moving {
    fn add(&mut self, pack: PackName, blobs: Vec<(Blob, Bytes)>) {
        self.packs.push(pack);
        self.bytes += blobs.iter().map(|(blob, _)| blob.size).sum::<u64>();
        self.blobs.extend(blobs);
    }
}

impl<'a> BucketCollector<'a> {
    /// Collects the bucket of `durable`, of which `read` reads directories; `scratch` is a folder of its own that is made and removed;
    /// up to `waste` percent of a pack may be waste, as [`WASTE`]. Its functions block, on a thread of a runtime that may.
    pub fn new(durable: &'a Durable, read: Read<'a>, scratch: &'a Path, waste: u64) -> Self {
        Self { durable, read, scratch, waste }
    }

    /// Says of each blob why a collection would keep it, or not, and changes nothing.
    ///
    /// # Errors
    /// As [`BucketCollector::collect`].
    pub fn explain(
        &self,
        tell: &mut dyn FnMut(Blob, Verdict) -> ControlFlow<()>,
        watch: Watch<'_>,
    ) -> Result<Progress> {
        self.wait(self.durable.rebuild())?;
        let graph = BucketGraph { view: self.wait(self.durable.view_now())?, of: self };
        collect::explain(&graph, self.scratch, tell, watch)
    }

    /// Collects: deletes what nothing keeps, at most at `pace`.
    ///
    /// # Errors
    /// Those of the bucket, of the index and of the scratch folder; [`StoreError::Closed`] when `watch` broke it off.
    pub fn collect(&self, mut pace: Pace, watch: Watch<'_>) -> Result<Progress> {
        let mut report = Report::new(watch);
        self.wait(self.durable.rebuild())?;
        let graph = BucketGraph { view: self.wait(self.durable.view_now())?, of: self };
        let mut marking = Marking::begin(&graph, self.scratch)?;
        marking.mark(&mut report)?;
        crash_point!("collect.marked");
        if !report.progress.incomplete.is_empty() {
            return report.done();
        }
        self.condemn(&graph.view, &marking, &mut report)?;
        crash_point!("collect.condemned");
        let condemned = self.wait(self.durable.view_now())?;
        if !condemned.is_empty() {
            self.adopt(&mut report)?;
            report.enter(Phase::Rescue)?;
            // Also of what another collection has condemned or deleted meanwhile.
            self.wait(self.durable.rebuild())?;
            let view = self.wait(self.durable.view_now())?;
            marking.mark(&mut report)?;
            crash_point!("collect.marked.again");
            // A pin may have come with a tree that misses something.
            if report.progress.incomplete.is_empty() {
                let needless = self.rescue(&condemned, &view, &marking, &mut report)?;
                crash_point!("collect.rescued");
                self.sweep(&condemned, &needless, &marking, &mut pace, &mut report)?;
            }
        }
        self.wait(self.durable.delete_leases(now().saturating_sub(whole_millis(self.durable.0.terms.skew))))?;
        report.done()
    }

    fn wait<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        Handle::current().block_on(work)
    }

    fn condemn(&self, view: &View, marking: &Marking<'_>, report: &mut Report<'_>) -> Result<()> {
        report.enter(Phase::Condemn)?;
        let old = self.old_packs(view, marking)?;
        let small = self.small_packs(&old)?;
        let mut moving = Moving::default();
        let mut condemned = Vec::new();
        for pack in old {
            if let Some(Needed { keep, must_go }) = self.examine(pack, small.contains(&pack), view, marking, report)? {
                match self.take_out(pack, keep) {
                    Ok(blobs) => moving.add(pack, blobs),
                    Err(error) if error.is_missing() && !must_go => {
                        tracing::error!(%error, %pack, "a pack with waste stays, because what is needed of it cannot be read");
                    }
                    Err(error) => return Err(error),
                }
            }
            if moving.bytes >= TOGETHER {
                condemned.extend(self.move_all(&mut moving)?);
            }
            if condemned.len() >= RECORD_PACKS {
                self.wait(self.durable.condemn(&condemned))?;
                condemned.clear();
                crash_point!("collect.condemned.some");
            }
            report.tell()?;
        }
        condemned.extend(self.move_all(&mut moving)?);
        for packs in condemned.chunks(RECORD_PACKS) {
            self.wait(self.durable.condemn(packs))?;
        }
        Ok(())
    }

    /// Stores what was taken out of packs, and returns these: they can be condemned then.
    fn move_all(&self, moving: &mut Moving) -> Result<Vec<PackName>> {
        let Moving { packs, blobs, .. } = std::mem::take(moving);
        if !blobs.is_empty() {
            self.wait(self.durable.put(blobs))?;
        }
        Ok(packs)
    }

    /// Packs of which nothing is leased because it is new, and that are not condemned.
    fn old_packs(&self, view: &View, marking: &Marking<'_>) -> Result<Vec<PackName>> {
        let mut packs = self.durable.packs()?;
        packs.retain(|pack| !view.is_condemned(*pack) && self.young_until(*pack) <= marking.began());
        Ok(packs)
    }

    fn young_until(&self, pack: PackName) -> u64 {
        super::name::millis(pack.time()).saturating_add(self.durable.0.terms.young())
    }

    /// Those that are small, if they are many.
    fn small_packs(&self, packs: &[PackName]) -> Result<HashSet<PackName>> {
        let mut small = HashSet::new();
        for pack in packs {
            let entries = self.durable.pack_entries(*pack)?;
            if entries.iter().map(|entry| entry.stored).sum::<u64>() < SMALL {
                small.insert(*pack);
            }
        }
        Ok(if small.len() < MANY { HashSet::new() } else { small })
    }

    /// What of a pack has to be stored anew, if too much of it is waste.
    fn examine(
        &self,
        pack: PackName,
        small: bool,
        view: &View,
        marking: &Marking<'_>,
        report: &mut Report<'_>,
    ) -> Result<Option<Needed>> {
        let entries = self.durable.pack_entries(pack)?;
        let digests: Vec<Digest> = entries.iter().map(|entry| entry.blob.digest).collect();
        let (mut whole, mut waste, mut must_go) = (0, 0, false);
        let mut keep = Vec::new();
        for (entry, marked) in entries.into_iter().zip(marking.are_marked(&digests)?) {
            report.progress.examined.add(&entry.blob);
            whole += entry.stored;
            if !marked {
                report.progress.condemned.add(&entry.blob);
                waste += entry.stored;
                must_go |= entry.directory;
            } else if self.has_later_copy(pack, &entry, view)? {
                waste += entry.stored;
            } else {
                keep.push(entry);
            }
        }
        if !(must_go || waste * 100 > whole * self.waste || small) {
            return Ok(None);
        }
        // What is alone in its pack is no waste.
        let moved = keep.iter().any(|entry| entry.blob.size > MAX_SHARED_BLOB);
        Ok((!moved).then_some(Needed { keep, must_go }))
    }

    /// Whether there is another copy that is kept in place of this one.
    fn has_later_copy(&self, pack: PackName, entry: &Entry, view: &View) -> Result<bool> {
        let places = self.durable.0.index.places(&entry.blob)?;
        Ok(places.iter().any(|place| place.pack > pack && !view.is_condemned(place.pack)))
    }

    /// Those of `entries` of which no pack that counts has a good copy: the copies are read.
    fn without_good_copy(&self, mut entries: Vec<Entry>, view: &View) -> Result<Vec<Entry>> {
        let mut nowhere = Vec::new();
        while !entries.is_empty() {
            let (mut shared, mut good) = (Vec::new(), HashSet::new());
            for entry in std::mem::take(&mut entries) {
                let mut places = self.durable.0.index.places(&entry.blob)?;
                places.retain(|place| !view.is_condemned(place.pack));
                match places.pop() {
                    None => nowhere.push(entry),
                    Some(place) if entry.blob.size <= MAX_SHARED_BLOB => {
                        shared.push(place);
                        entries.push(entry);
                    }
                    Some(place) => {
                        if self.wait(self.durable.is_good(place))? {
                            good.insert(entry.blob);
                        }
                        entries.push(entry);
                    }
                }
            }
            for span in spans(shared) {
                good.extend(self.wait(self.durable.read_span(span))?.into_iter().map(|(blob, _)| blob));
            }
            // Of the others the next copy is looked at: the damaged one does not count any more.
            entries.retain(|entry| !good.contains(&entry.blob));
        }
        Ok(nowhere)
    }

    /// Reads these blobs of a pack, or from elsewhere what is damaged there. Fails if not all of them can be read.
    fn take_out(&self, pack: PackName, entries: Vec<Entry>) -> Result<Vec<(Blob, Bytes)>> {
        let wanted: Vec<Blob> = entries.iter().map(|entry| entry.blob).collect();
        let places = entries.into_iter().map(|entry| Place { pack, entry }).collect();
        let mut read = Vec::new();
        for span in spans(places) {
            read.extend(self.wait(self.durable.read_span(span))?);
        }
        let there: HashSet<Blob> = read.iter().map(|(blob, _)| *blob).collect();
        for blob in wanted.into_iter().filter(|blob| !there.contains(blob)) {
            read.push((blob, (self.read)(&blob)?));
        }
        Ok(read)
    }

    /// Waits until every node has another list of the condemned than before, or does not answer.
    fn adopt(&self, report: &mut Report<'_>) -> Result<()> {
        report.enter(Phase::Adopt)?;
        // A little longer, because clocks do not run alike.
        let end = Instant::now() + self.durable.0.terms.view.mul_f64(1.02) + LOOK;
        while Instant::now() < end {
            thread::sleep(LOOK.min(end.saturating_duration_since(Instant::now())));
            report.tell()?;
        }
        Ok(())
    }

    /// Stores anew what is marked and only condemned packs have. Returns the packs that nobody needs any more then.
    fn rescue(
        &self,
        condemned: &View,
        view: &View,
        marking: &Marking<'_>,
        report: &mut Report<'_>,
    ) -> Result<HashSet<PackName>> {
        let mut needless = HashSet::new();
        for pack in self.durable.packs()?.into_iter().filter(|pack| condemned.is_condemned(*pack)) {
            let entries = self.durable.pack_entries(pack)?;
            let digests: Vec<Digest> = entries.iter().map(|entry| entry.blob.digest).collect();
            let marked = entries.into_iter().zip(marking.are_marked(&digests)?).filter(|(_, marked)| *marked);
            let only_here = self.without_good_copy(marked.map(|(entry, _)| entry).collect(), view)?;
            report.progress.rescued += only_here.len() as u64;
            let (large, small): (Vec<Entry>, Vec<Entry>) =
                only_here.into_iter().partition(|entry| entry.blob.size > MAX_SHARED_BLOB);
            let copied = self.take_out(pack, small).and_then(|blobs| {
                if !blobs.is_empty() {
                    self.wait(self.durable.put(blobs))?;
                }
                large
                    .into_iter()
                    .try_for_each(|entry| self.wait(self.durable.copy_large(Place { pack, entry }, self.scratch)))
            });
            match copied {
                Ok(()) => {
                    needless.insert(pack);
                }
                Err(error) if error.is_missing() || matches!(error, StoreError::Mismatch { .. }) => {
                    tracing::error!(%error, %pack, "a condemned pack stays, because what is needed of it cannot be read; clients are asked for it again");
                }
                Err(error) => return Err(error),
            }
            report.tell()?;
        }
        Ok(needless)
    }

    /// Deletes those of the packs that were condemned when the wait began which are `needless`.
    fn sweep(
        &self,
        condemned: &View,
        needless: &HashSet<PackName>,
        marking: &Marking<'_>,
        pace: &mut Pace,
        report: &mut Report<'_>,
    ) -> Result<()> {
        report.enter(Phase::Sweep)?;
        let listed = self.wait(self.durable.list(None))?;
        let there: HashSet<PackName> = listed.into_iter().map(|(pack, _)| pack).collect();
        for (mut record, packs) in condemned.records() {
            let left: Vec<PackName> = packs.iter().copied().filter(|pack| there.contains(pack)).collect();
            if left.is_empty() {
                let forgotten = record.time() + REMEMBERED + self.durable.0.terms.skew;
                if forgotten < time_of(now()) {
                    self.wait(self.durable.delete_condemned(record))?;
                }
                continue;
            }
            // What this version cannot read is not among them.
            for pack in left.into_iter().filter(|pack| needless.contains(pack)) {
                let entries = self.durable.pack_entries(pack)?;
                if whole_millis(OLD_RECORD).saturating_add(super::name::millis(record.time())) < now() {
                    record = self.wait(self.durable.condemn_again(record, packs))?;
                }
                let digests: Vec<Digest> = entries.iter().map(|entry| entry.blob.digest).collect();
                self.wait(self.durable.delete_pack(pack))?;
                crash_point!("collect.deleted.some");
                for (entry, marked) in entries.iter().zip(marking.are_marked(&digests)?) {
                    if !marked {
                        report.progress.deleted.add(&entry.blob);
                    }
                }
                report.tell()?;
                pace.wait(entries.len() as u64);
            }
        }
        crash_point!("collect.deleted");
        Ok(())
    }
}

/// The bucket as what can be marked.
struct BucketGraph<'a> {
    of: &'a BucketCollector<'a>,
    view: std::sync::Arc<View>,
}

impl Graph for BucketGraph<'_> {
    fn now(&self) -> u64 {
        now()
    }

    fn protected_until(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn roots(&self) -> Result<Roots> {
        Ok(Roots { roots: self.of.wait(self.of.durable.roots(None, None))?, appeals: 0 })
    }

    fn leases(&self, visit: VisitLeases<'_>) -> Result<()> {
        let durable = self.of.durable;
        for pack in durable.packs()? {
            let until = self.of.young_until(pack);
            if until > now() {
                let leases: Vec<(Blob, u64)> =
                    durable.pack_entries(pack)?.into_iter().map(|entry| (entry.blob, until)).collect();
                visit(&leases)?;
            }
        }
        let skew = whole_millis(durable.0.terms.skew);
        for names in self.of.wait(durable.lease_records())?.chunks(LEASE_RECORDS) {
            for leases in self.of.wait(durable.read_leases(names))? {
                let until = leases.until.saturating_add(skew);
                let leases: Vec<(Blob, u64)> = leases.blobs.into_iter().map(|blob| (blob, until)).collect();
                visit(&leases)?;
            }
        }
        Ok(())
    }

    fn blobs(&self, after: Option<&Digest>) -> Result<Vec<Blob>> {
        self.of.durable.0.index.blobs_after(after, PAGE)
    }

    fn read(&self, blob: &Blob) -> Result<Bytes> {
        (self.of.read)(blob)
    }

    fn may_be_directory(&self, blob: &Blob) -> Result<bool> {
        Ok(self.of.durable.0.index.places(blob)?.iter().any(|place| place.entry.directory))
    }

    fn condemned_since(&self, digests: &[Digest]) -> Result<Vec<Option<u64>>> {
        let mut memo: HashMap<PackName, Option<u64>> = HashMap::new();
        digests
            .iter()
            .map(|digest| {
                let packs = self.of.durable.0.index.packs_of(digest)?;
                let since: Option<Vec<u64>> =
                    packs.iter().map(|pack| *memo.entry(*pack).or_insert_with(|| self.view.since(*pack))).collect();
                Ok(since.and_then(|since| since.into_iter().max()))
            })
            .collect()
    }
}

impl Durable {
    /// Stores a large blob in another pack.
    async fn copy_large(&self, place: Place, scratch: &Path) -> Result<()> {
        let blob = place.entry.blob;
        let path = scratch.with_extension("blob");
        let lost = || StoreError::NotFound { blob, store: self.name() };
        let mut pieces = self.read_pieces(place).await?.ok_or_else(lost)?;
        let mut file = tokio::fs::File::create(&path).await.map_err(StoreError::io("create", &path))?;
        while let Some(piece) = pieces.try_next().await? {
            tokio::io::AsyncWriteExt::write_all(&mut file, &piece).await.map_err(StoreError::io("write", &path))?;
        }
        tokio::io::AsyncWriteExt::flush(&mut file).await.map_err(StoreError::io("write", &path))?;
        drop(file);
        let stored = self.put_file(blob, &path).await;
        tokio::fs::remove_file(&path).await.map_err(StoreError::io("remove", &path))?;
        stored
    }
}
