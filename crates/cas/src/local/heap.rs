//! A local store as a heap that can be collected.

use std::{
    io::Read,
    ops::ControlFlow,
    sync::{MutexGuard, TryLockError},
};

use bytes::Bytes;

use super::{
    LocalStore,
    index::{Changes, Table},
    tenure::{PAGE, PROTECTED, SENTENCED, Tenure, decode_lease, now},
};
use crate::{
    Blob, Digest, StoreError,
    collect::{Collector, Freed, Graph, Heap, Pace, Progress, Roots, Verdict, VisitLeases, Watch, explain, page},
    crash::crash_point,
    store::Result,
    tree::DIRECTORY_TAGS,
};

/// Bytes that were deleted from the index and may still be on the disk.
const GARBAGE: &str = "collection.garbage";
/// The index is compacted when this part of it may be garbage.
const WORTH: u64 = 8;

/// Folder of the marks, beside the objects.
const MARKS: &str = ".marks";

impl LocalStore {
    /// Deletes what neither a pin nor a lease keeps, at most at `pace`: see [`collect`](crate::collect).
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for a store that was not opened by [`LocalStore::open_collected`] or has a row that cannot
    /// be read, [`StoreError::Busy`] while another collection runs, [`StoreError::Closed`] when `watch` broke it off, and
    /// those of the disk.
    pub fn collect(&self, pace: Pace, watch: Watch<'_>) -> Result<Progress> {
        let _collecting = self.begin_collection()?;
        Collector::new(self, &self.objects().join(MARKS)).collect(pace, watch)
    }

    /// Says of each blob why a collection would keep it, or not, and changes nothing.
    ///
    /// # Errors
    /// As [`LocalStore::collect`].
    pub fn explain(
        &self,
        tell: &mut dyn FnMut(Blob, Verdict) -> ControlFlow<()>,
        watch: Watch<'_>,
    ) -> Result<Progress> {
        let _collecting = self.begin_collection()?;
        explain(self, &self.objects().join(MARKS), tell, watch)
    }

    fn begin_collection(&self) -> Result<MutexGuard<'_, ()>> {
        match self.tenure()?.collecting.try_lock() {
            Ok(guard) => Ok(guard),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {
                Err(StoreError::Busy(format!("the store {} is being collected already", self.shared.name())))
            }
        }
    }

    fn tenure(&self) -> Result<&Tenure> {
        self.shared.tenure.as_ref().ok_or_else(|| {
            StoreError::Invalid(format!("the store {} is not open for being collected", self.shared.name()))
        })
    }

    fn number(&self, state: &'static str) -> Result<u64> {
        let value = self.shared.index.state(state)?;
        Ok(value.and_then(|value| value.try_into().ok()).map_or(0, u64::from_be_bytes))
    }
}

impl Graph for LocalStore {
    fn now(&self) -> u64 {
        now()
    }

    fn protected_until(&self) -> Result<Option<u64>> {
        Ok(Some(self.number(PROTECTED)?))
    }

    fn roots(&self) -> Result<Roots> {
        let verdicts = self.tenure()?.read();
        Ok(Roots { roots: LocalStore::roots(self, None, None)?, appeals: verdicts.appeals })
    }

    fn leases(&self, visit: VisitLeases<'_>) -> Result<()> {
        let lease = |(digest, row): (Digest, Vec<u8>)| {
            let (until, size) = decode_lease(&row).ok_or_else(|| {
                StoreError::Invalid(format!("the lease of {digest} in {} is damaged", self.shared.name()))
            })?;
            Ok((Blob { digest, size }, until))
        };
        let mut after = None;
        while let Some((rows, last)) =
            page(self.shared.index.rows_after(Table::Leases, after.as_ref(), PAGE)?, |(digest, _)| *digest)
        {
            let leases: Vec<(Blob, u64)> = rows.into_iter().map(lease).collect::<Result<_>>()?;
            visit(&leases)?;
            after = Some(last);
        }
        Ok(())
    }

    fn blobs(&self, after: Option<&Digest>) -> Result<Vec<Blob>> {
        Ok(self.shared.index.entries_after(after, PAGE)?.into_iter().map(|(blob, _)| blob).collect())
    }

    fn read(&self, blob: &Blob) -> Result<Bytes> {
        self.shared.read(blob)
    }

    fn may_be_directory(&self, blob: &Blob) -> Result<bool> {
        let Some(mut file) = self.open_object(blob)? else { return Ok(true) };
        let mut tag = [0];
        // Whoever reads all of it finds out what is wrong.
        let Ok(length) = file.read(&mut tag) else { return Ok(true) };
        Ok(length == 1 && DIRECTORY_TAGS.contains(&tag[0]))
    }

    fn condemned_since(&self, digests: &[Digest]) -> Result<Vec<Option<u64>>> {
        let rows = self.shared.index.rows(Table::Condemned, digests)?;
        Ok(rows.into_iter().map(|row| row.and_then(|row| row.try_into().ok()).map(u64::from_be_bytes)).collect())
    }
}

impl Heap for LocalStore {
    fn condemn(&self, blobs: &[Blob], begin: u64) -> Result<Vec<Blob>> {
        let shared = &self.shared;
        let tenure = self.tenure()?;
        let _writing = shared.lock_writes();
        let _verdicts = tenure.write();
        let digests: Vec<Digest> = blobs.iter().map(|blob| blob.digest).collect();
        let known = shared.which_condemned(tenure, digests.iter())?;
        let entries = shared.index.entries(&digests)?;
        let leases = shared.index.rows(Table::Leases, &digests)?;
        let mut condemned = Vec::new();
        let mut rows = Vec::new();
        for ((blob, entry), lease) in blobs.iter().zip(entries).zip(leases) {
            let leased = lease.as_deref().and_then(decode_lease).is_some_and(|(until, _)| until > begin);
            if entry.is_none() || leased {
                continue;
            }
            condemned.push(*blob);
            if !known.contains(&blob.digest) {
                rows.push((Table::Condemned, blob.digest, Some(now().to_be_bytes().to_vec())));
            }
        }
        if !rows.is_empty() {
            // First, so that nobody takes an empty table for granted.
            tenure.count_condemned(rows.len());
            shared.index.apply(Changes { rows, ..Default::default() })?;
        }
        Ok(condemned)
    }

    fn condemned(&self, after: Option<&Digest>) -> Result<Vec<Digest>> {
        let rows = self.shared.index.rows_after(Table::Condemned, after, PAGE)?;
        Ok(rows.into_iter().map(|(digest, _)| digest).collect())
    }

    fn rescue(&self, digests: &[Digest]) -> Result<()> {
        if digests.is_empty() {
            return Ok(());
        }
        let tenure = self.tenure()?;
        let _writing = self.shared.lock_writes();
        let _verdicts = tenure.write();
        let saved = self.shared.which_condemned(tenure, digests.iter())?;
        let count = saved.len();
        let rows = saved.into_iter().map(|digest| (Table::Condemned, digest, None)).collect();
        self.shared.index.apply(Changes { rows, ..Default::default() })?;
        tenure.count_acquitted(count);
        Ok(())
    }

    fn sentence(&self, appeals: u64) -> Result<bool> {
        let mut verdicts = self.tenure()?.write();
        if verdicts.appeals != appeals {
            return Ok(false);
        }
        let states = vec![(SENTENCED, Some(Vec::new()))];
        self.shared.index.apply(Changes { states, ..Default::default() })?;
        verdicts.sentenced = true;
        Ok(true)
    }

    fn is_sentenced(&self) -> Result<bool> {
        Ok(self.tenure()?.read().sentenced)
    }

    fn delete(&self, digests: &[Digest]) -> Result<Freed> {
        let shared = &self.shared;
        let tenure = self.tenure()?;
        // Until the files are gone too: whoever stores one of these blobs again comes after that.
        let _writing = shared.lock_writes();
        let mut gone = Vec::new();
        let condemned;
        {
            let _verdicts = tenure.write();
            condemned = shared.which_condemned(tenure, digests.iter())?;
            let mut changes = Changes::default();
            let mut garbage = self.number(GARBAGE)?;
            for (digest, entry) in condemned.iter().zip(shared.index.entries(&condemned)?) {
                let Some(entry) = entry else { continue };
                if entry.inline {
                    changes.data.push((*digest, None));
                    garbage += entry.size;
                }
                changes.entries.push((*digest, None));
                changes.rows.push((Table::Leases, *digest, None));
                gone.push((*digest, entry));
            }
            changes.states.push((GARBAGE, Some(garbage.to_be_bytes().to_vec())));
            shared.index.apply(changes)?;
        }
        crash_point!("collect.delete.indexed");
        let mut freed = Freed::default();
        for (digest, entry) in gone {
            shared.counts.replace(Some(&entry), None);
            freed.add(&Blob { digest, size: entry.size });
        }
        // Also of those that an earlier collection deleted from the index before it was killed.
        for digest in &condemned {
            shared.files.remove(digest)?;
        }
        crash_point!("collect.delete.unlinked");
        let count = condemned.len();
        let rows = condemned.into_iter().map(|digest| (Table::Condemned, digest, None)).collect();
        shared.index.apply(Changes { rows, ..Default::default() })?;
        tenure.count_acquitted(count);
        shared.directories.clear();
        Ok(freed)
    }

    fn finish(&self) -> Result<()> {
        {
            let mut verdicts = self.tenure()?.write();
            self.shared.index.apply(Changes { states: vec![(SENTENCED, None)], ..Default::default() })?;
            verdicts.sentenced = false;
        }
        self.prune_sha256(|blobs| self.shared.missing(blobs, |_, _| true))?;
        let garbage = self.number(GARBAGE)?;
        if garbage > 0 && garbage.saturating_mul(WORTH) >= self.statistics().inline_bytes {
            self.shared.index.compact()?;
            self.shared.index.apply(Changes { states: vec![(GARBAGE, None)], ..Default::default() })?;
        }
        Ok(())
    }
}
