//! What a store that is collected owes to its clients: leases, and honest answers about the condemned.
//!
//! A **lease** keeps a blob, and if it is a directory all below it, until a time. Whoever is told that a blob is
//! present, or that it was stored, has one for at least half of the period: it is on disk before the answer goes out,
//! and is written anew only when less than half of it is left, so that asking again costs nothing.
//! A **condemned** blob is about to be deleted: it can still be read, but counts as missing, and storing it again
//! lifts the sentence.
//!
//! Locks: `writes` of the store before `verdicts`. Leases are granted with `verdicts` held for reading; condemning,
//! pinning and deleting hold it for writing. So no blob is condemned or deleted between the look and the answer.

use std::{
    collections::HashSet,
    sync::{
        Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    Shared,
    index::{Changes, Entry, Index, Row, Table},
};
use crate::{Blob, Digest, store::Result};

/// Present from the moment in which a collection may delete until all is deleted.
pub(super) const SENTENCED: &str = "collection.sentenced";
/// Milliseconds since 1970 before which nothing is collected.
pub(super) const PROTECTED: &str = "collection.protected";

/// Rows read in one step.
pub(super) const PAGE: usize = 1024;

/// Leases, and what is condemned.
pub(super) struct Tenure {
    /// For how long a lease is given.
    period: Duration,
    verdicts: RwLock<Verdicts>,
    /// How many rows the table of the condemned has at most, so that nothing is looked up in an empty one.
    condemned: AtomicU64,
    /// Held by the one collection.
    pub(super) collecting: Mutex<()>,
}

#[derive(Default)]
pub(super) struct Verdicts {
    /// Whether what is condemned is being deleted, so that a pin cannot save it any more.
    pub(super) sentenced: bool,
    /// How many condemned trees were pinned.
    pub(super) appeals: u64,
}

impl Tenure {
    /// Goes on where the last user of the store ended.
    pub(super) fn resume(period: Duration, index: &Index) -> Result<Self> {
        let mut condemned = 0;
        let mut after = None;
        loop {
            let rows = index.rows_after(Table::Condemned, after.as_ref(), PAGE)?;
            let Some((last, _)) = rows.last() else { break };
            after = Some(*last);
            condemned += rows.len() as u64;
        }
        let verdicts = Verdicts { sentenced: index.state(SENTENCED)?.is_some(), appeals: 0 };
        let tenure = Self {
            period,
            verdicts: RwLock::new(verdicts),
            condemned: AtomicU64::new(condemned),
            collecting: Mutex::default(),
        };
        if index.state(PROTECTED)?.is_none() {
            let is_empty = index.entries_after(None, 1)?.is_empty();
            let until = if is_empty { 0 } else { now().saturating_add(tenure.period()) };
            let states = vec![(PROTECTED, Some(until.to_be_bytes().to_vec()))];
            index.apply(Changes { states, ..Default::default() })?;
        }
        Ok(tenure)
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, Verdicts> {
        self.verdicts.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Verdicts> {
        self.verdicts.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn period(&self) -> u64 {
        u64::try_from(self.period.as_millis()).unwrap_or(u64::MAX)
    }

    pub(super) fn count_condemned(&self, more: usize) {
        self.condemned.fetch_add(more as u64, Ordering::Relaxed);
    }

    pub(super) fn count_acquitted(&self, fewer: usize) {
        self.condemned.fetch_sub(fewer as u64, Ordering::Relaxed);
    }
}

/// Milliseconds since 1970.
pub(super) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The end of a lease, and the size of its blob.
pub(super) fn encode_lease(until: u64, size: u64) -> Vec<u8> {
    [until.to_be_bytes(), size.to_be_bytes()].concat()
}

pub(super) fn decode_lease(row: &[u8]) -> Option<(u64, u64)> {
    let (until, size) = row.split_at_checked(8)?;
    Some((u64::from_be_bytes(until.try_into().ok()?), u64::from_be_bytes(size.try_into().ok()?)))
}

impl Shared {
    /// As [`Shared::missing`], but an answer: what is condemned is missing, and what is not missing is leased.
    pub(super) fn answer_missing(&self, blobs: &[Blob], good: impl Fn(&Blob, &Entry) -> bool) -> Result<Vec<Blob>> {
        let Some(tenure) = &self.tenure else { return self.missing(blobs, good) };
        let _verdicts = tenure.read();
        let mut missing: HashSet<Blob> = self.missing(blobs, good)?.into_iter().collect();
        let mut present: Vec<Blob> = Vec::new();
        let mut seen = HashSet::new();
        present.extend(blobs.iter().filter(|b| !b.is_empty() && !missing.contains(b) && seen.insert(**b)));
        let condemned = self.which_condemned(tenure, present.iter().map(|blob| &blob.digest))?;
        missing.extend(present.iter().filter(|blob| condemned.contains(&blob.digest)));
        present.retain(|blob| !condemned.contains(&blob.digest));
        let rows = self.renewals(tenure, &present)?;
        if !rows.is_empty() {
            self.index.apply(Changes { rows, ..Default::default() })?;
        }
        seen.clear();
        Ok(blobs.iter().filter(|blob| missing.contains(blob) && seen.insert(**blob)).copied().collect())
    }

    /// Stores blobs for clients: with a lease, and no longer condemned. Call with `writes` held.
    pub(super) fn apply_stored(&self, blobs: &[Blob], mut changes: Changes) -> Result<()> {
        let mut acquitted = 0;
        if let Some(tenure) = &self.tenure {
            let condemned = self.which_condemned(tenure, blobs.iter().map(|blob| &blob.digest))?;
            acquitted = condemned.len();
            changes.rows = self.renewals(tenure, blobs)?;
            changes.rows.extend(condemned.into_iter().map(|digest| (Table::Condemned, digest, None)));
        }
        if !changes.is_empty() {
            self.index.apply(changes)?;
        }
        if let Some(tenure) = &self.tenure {
            tenure.count_acquitted(acquitted);
        }
        Ok(())
    }

    /// Leaves nothing of a collection in a store that is not collected any more: a sentence that nobody lifts would be
    /// carried out years later, on blobs that were stored anew.
    ///
    /// What was condemned only is acquitted. Under a sentence it is deleted: some of it is gone already, and what is left
    /// must not pass for whole. If the store is collected again some day, that begins with a new period of grace.
    pub(super) fn end_collection(&self) -> Result<()> {
        let sentenced = self.index.state(SENTENCED)?.is_some();
        loop {
            let page = self.index.rows_after(Table::Condemned, None, PAGE)?;
            if page.is_empty() {
                break;
            }
            let digests: Vec<Digest> = page.into_iter().map(|(digest, _)| digest).collect();
            if sentenced {
                let entries = self.index.entries(&digests)?.into_iter().zip(&digests);
                let blobs: Vec<Blob> =
                    entries.filter_map(|(entry, digest)| Some(Blob { digest: *digest, size: entry?.size })).collect();
                self.remove(&blobs)?;
                // Also of those that were deleted from the index when the collection was killed.
                digests.iter().try_for_each(|digest| self.files.remove(digest))?;
            }
            let rows = digests.into_iter().map(|digest| (Table::Condemned, digest, None)).collect();
            self.index.apply(Changes { rows, ..Default::default() })?;
        }
        self.index.apply(Changes { states: vec![(SENTENCED, None), (PROTECTED, None)], ..Default::default() })
    }

    pub(super) fn which_condemned<'a>(
        &self,
        tenure: &Tenure,
        digests: impl Iterator<Item = &'a Digest>,
    ) -> Result<HashSet<Digest>> {
        if tenure.condemned.load(Ordering::Relaxed) == 0 {
            return Ok(HashSet::new());
        }
        let digests: Vec<Digest> = digests.copied().collect();
        let rows = self.index.rows(Table::Condemned, &digests)?;
        Ok(digests.into_iter().zip(rows).filter_map(|(digest, row)| row.map(|_| digest)).collect())
    }

    /// The leases that have to be written so that each of `blobs` has one for at least half of the period.
    fn renewals(&self, tenure: &Tenure, blobs: &[Blob]) -> Result<Vec<Row>> {
        let (now, period) = (now(), tenure.period());
        let rows = self.index.rows(Table::Leases, blobs.iter().map(|blob| &blob.digest))?;
        let stale = blobs.iter().zip(rows).filter(|(_, row)| {
            let until = row.as_deref().and_then(decode_lease).map_or(0, |(until, _)| until);
            until < now.saturating_add(period / 2)
        });
        Ok(stale
            .map(|(blob, _)| {
                let lease = encode_lease(now.saturating_add(period), blob.size);
                (Table::Leases, blob.digest, Some(lease))
            })
            .collect())
    }
}
