//! Which blob lies in which packs: a RocksDB that is made from the bucket alone, and may be thrown away at any time.
//!
//! Column families: `packs` maps the name of a pack to its footer; `places` maps a digest and the name of a
//! pack to where in it the blob is; `roots` the name of a record of a pin to its text; `leases` a digest to the end of its lease
//! as this node has written it; `used` a digest to when its copy on the disk was last wanted; `default` says for which
//! bucket and in which format all this is, and what else there is to remember.
//! Nothing is synced: what a power cut takes is read from the bucket again.
//!
//! Memory: 16 MiB of write buffers, 32 MiB of block cache that also holds indexes and filters, 128 open files; some 100 bytes
//! for each copy that was found damaged, and for each pack that was found gone, since the bucket was last listed.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, IteratorMode, LogLevel, Options, ReadOptions,
    SliceTransform, WriteBatch,
};

use super::{
    format::{Entry, decode_footer, encode_footer},
    name::{NAME_BYTES, PackName},
};
use crate::{Blob, Digest, StoreError, store::Result};

const FORMAT: &str = "2";
const FORMAT_KEY: &[u8] = b"format";
const PACKS: &str = "packs";
const PLACES: &str = "places";
const ROOTS: &str = "roots";
const LEASES: &str = "leases";
const USED: &str = "used";

const WRITE_BUFFERS: usize = 16 << 20;
const BLOCK_CACHE: usize = 32 << 20;
const OPEN_FILES: i32 = 128;
const DIGEST_BYTES: usize = 32;
const PLACE_BYTES: usize = 25;

/// Where a copy of a blob is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// In which pack.
    pub pack: PackName,
    /// Where in it.
    pub entry: Entry,
}

pub(super) struct Index {
    db: DB,
    path: PathBuf,
    packs: AtomicU64,
    stored_bytes: AtomicU64,
    doubts: Mutex<Doubts>,
}

/// Copies that do not count. In memory only: they may be mended, or one answer was wrong.
#[derive(Default)]
struct Doubts {
    /// Those that turned out not to be their blobs.
    damaged: HashSet<(Digest, PackName)>,
    /// Those in packs that are gone.
    gone: HashSet<PackName>,
}

impl Index {
    /// Opens the index of the bucket `bucket`. One of another bucket or format, or a damaged one, is made anew.
    pub(super) fn open(path: &Path, bucket: &str) -> Result<Self> {
        std::fs::create_dir_all(path).map_err(StoreError::io("create", path))?;
        let identity = format!("{FORMAT} {bucket}");
        match Self::open_as(path, &identity) {
            Ok(Some(index)) => return Ok(index),
            Ok(None) => tracing::info!(path = %path.display(), bucket, "the index of packs is made anew"),
            // Another process has it: its files are not ours to remove.
            Err(error @ StoreError::Index { .. }) if is_locked(&error) => return Err(error),
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "the index of packs is damaged and is made anew");
            }
        }
        std::fs::remove_dir_all(path).map_err(StoreError::io("remove", path))?;
        std::fs::create_dir_all(path).map_err(StoreError::io("create", path))?;
        Self::open_as(path, &identity)?.ok_or_else(|| StoreError::Closed(path.display().to_string()))
    }

    fn open_as(path: &Path, identity: &str) -> Result<Option<Self>> {
        let cache = Cache::new_lru_cache(BLOCK_CACHE);
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_db_write_buffer_size(WRITE_BUFFERS);
        options.set_max_total_wal_size(2 * WRITE_BUFFERS as u64);
        options.set_max_open_files(OPEN_FILES);
        options.set_keep_log_file_num(2);
        options.set_log_level(LogLevel::Warn);
        let mut places = family_options(&cache);
        places.set_prefix_extractor(SliceTransform::create_fixed_prefix(DIGEST_BYTES));
        let families = [
            ColumnFamilyDescriptor::new("default", family_options(&cache)),
            ColumnFamilyDescriptor::new(PACKS, family_options(&cache)),
            ColumnFamilyDescriptor::new(PLACES, places),
            ColumnFamilyDescriptor::new(ROOTS, family_options(&cache)),
            ColumnFamilyDescriptor::new(LEASES, family_options(&cache)),
            ColumnFamilyDescriptor::new(USED, family_options(&cache)),
        ];
        let db = DB::open_cf_descriptors(&options, path, families).map_err(|source| StoreError::Index {
            action: "open",
            path: path.to_owned(),
            source,
        })?;
        let index = Self {
            db,
            path: path.to_owned(),
            packs: AtomicU64::new(0),
            stored_bytes: AtomicU64::new(0),
            doubts: Mutex::default(),
        };
        match index.db.get(FORMAT_KEY).map_err(index.error("read"))? {
            Some(found) if found == identity.as_bytes() => {}
            Some(_) => return Ok(None),
            None => index.db.put(FORMAT_KEY, identity).map_err(index.error("write"))?,
        }
        for pack in index.packs()? {
            index.count(&index.entries(pack)?, true);
        }
        Ok(Some(index))
    }

    /// How many packs are known, and how long their blobs are as they are stored.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.packs.load(Ordering::Relaxed), self.stored_bytes.load(Ordering::Relaxed))
    }

    fn count(&self, entries: &[Entry], add: bool) {
        let stored = entries.iter().map(|entry| entry.stored).sum();
        if add {
            self.packs.fetch_add(1, Ordering::Relaxed);
            self.stored_bytes.fetch_add(stored, Ordering::Relaxed);
        } else {
            self.packs.fetch_sub(1, Ordering::Relaxed);
            self.stored_bytes.fetch_sub(stored, Ordering::Relaxed);
        }
    }

    pub(super) fn has_pack(&self, pack: PackName) -> Result<bool> {
        let found = self.db.get_pinned_cf(self.family(PACKS), pack.to_bytes()).map_err(self.error("read"))?;
        Ok(found.is_some())
    }

    pub(super) fn add_pack(&self, pack: PackName, entries: &[Entry]) -> Result<()> {
        if self.has_pack(pack)? {
            return Ok(());
        }
        let mut batch = WriteBatch::default();
        batch.put_cf(self.family(PACKS), pack.to_bytes(), encode_footer(entries));
        for entry in entries {
            batch.put_cf(self.family(PLACES), place_key(&entry.blob.digest, pack), encode_place(entry));
        }
        self.write(batch)?;
        self.count(entries, true);
        Ok(())
    }

    /// Forgets a pack that is not in the bucket any more.
    pub(super) fn remove_pack(&self, pack: PackName) -> Result<()> {
        let entries = self.entries(pack)?;
        if entries.is_empty() {
            return Ok(());
        }
        let mut batch = WriteBatch::default();
        batch.delete_cf(self.family(PACKS), pack.to_bytes());
        for entry in &entries {
            batch.delete_cf(self.family(PLACES), place_key(&entry.blob.digest, pack));
        }
        self.write(batch)?;
        self.doubts().gone.remove(&pack);
        self.count(&entries, false);
        Ok(())
    }

    /// Leaves out one copy, which turned out not to be the blob, until [`Index::trust_all`].
    pub(super) fn distrust(&self, place: &Place) {
        self.doubts().damaged.insert((place.entry.blob.digest, place.pack));
    }

    /// Leaves out what a pack holds, because it is gone, until [`Index::trust_all`].
    pub(super) fn hide(&self, pack: PackName) {
        self.doubts().gone.insert(pack);
    }

    /// Gives everything another chance but what is in packs of `gone`.
    pub(super) fn trust_all(&self, gone: HashSet<PackName>) {
        *self.doubts() = Doubts { damaged: HashSet::new(), gone };
    }

    fn doubts(&self) -> MutexGuard<'_, Doubts> {
        self.doubts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All packs, in order of their names; also those that are gone and not forgotten.
    pub(super) fn packs(&self) -> Result<Vec<PackName>> {
        let mut packs = Vec::new();
        for item in self.db.iterator_cf(self.family(PACKS), IteratorMode::Start) {
            let (key, _) = item.map_err(self.error("read"))?;
            packs.extend(PackName::from_bytes(&key));
        }
        Ok(packs)
    }

    /// Those that are not known to be gone.
    pub(super) fn packs_there(&self) -> Result<Vec<PackName>> {
        let mut packs = self.packs()?;
        let doubts = self.doubts();
        packs.retain(|pack| !doubts.gone.contains(pack));
        drop(doubts);
        Ok(packs)
    }

    /// The pack with the highest name.
    pub(super) fn newest(&self) -> Result<Option<PackName>> {
        match self.db.iterator_cf(self.family(PACKS), IteratorMode::End).next() {
            None => Ok(None),
            Some(item) => Ok(PackName::from_bytes(&item.map_err(self.error("read"))?.0)),
        }
    }

    /// What a pack holds; nothing when it is not known.
    pub(super) fn entries(&self, pack: PackName) -> Result<Vec<Entry>> {
        let footer = self.db.get_cf(self.family(PACKS), pack.to_bytes()).map_err(self.error("read"))?;
        match footer {
            None => Ok(Vec::new()),
            Some(footer) => decode_footer(&footer).map_err(|e| {
                StoreError::Invalid(format!("the index {} has a wrong row for pack {pack}: {e}", self.path.display()))
            }),
        }
    }

    /// The packs that hold a digest, also those that are gone and not forgotten.
    pub(super) fn packs_of(&self, digest: &Digest) -> Result<Vec<PackName>> {
        let mut options = ReadOptions::default();
        options.set_prefix_same_as_start(true);
        let mut packs = Vec::new();
        let mut rows = self.db.raw_iterator_cf_opt(self.family(PLACES), options);
        rows.seek(digest.0);
        while let Some(name) = rows.key().and_then(|key| key.strip_prefix(&digest.0[..])) {
            packs.extend(PackName::from_bytes(name));
            rows.next();
        }
        rows.status().map_err(self.error("read"))?;
        Ok(packs)
    }

    /// Where copies of a blob are that are not known to be damaged, in the order of their packs' names.
    pub(super) fn places(&self, blob: &Blob) -> Result<Vec<Place>> {
        let mut options = ReadOptions::default();
        options.set_prefix_same_as_start(true);
        let mut places = Vec::new();
        let mut rows = self.db.raw_iterator_cf_opt(self.family(PLACES), options);
        rows.seek(blob.digest.0);
        while let Some((key, value)) = rows.item() {
            let Some(name) = key.strip_prefix(&blob.digest.0[..]) else { break };
            if let (Some(pack), Some(entry)) = (PackName::from_bytes(name), decode_place(blob.digest, value))
                && entry.blob == *blob
            {
                places.push(Place { pack, entry });
            }
            rows.next();
        }
        rows.status().map_err(self.error("read"))?;
        let doubts = self.doubts();
        places.retain(|p| !doubts.gone.contains(&p.pack) && !doubts.damaged.contains(&(blob.digest, p.pack)));
        drop(doubts);
        Ok(places)
    }

    /// Which of `blobs` have no copy that is good for it, each once, in the order asked.
    pub(super) fn missing(&self, blobs: &[Blob], is_good: impl Fn(&Place) -> bool) -> Result<Vec<Blob>> {
        let mut seen = HashSet::new();
        let mut missing = Vec::new();
        for blob in blobs {
            if !blob.is_empty() && seen.insert(*blob) && !self.places(blob)?.iter().any(&is_good) {
                missing.push(*blob);
            }
        }
        Ok(missing)
    }

    /// Up to `limit` blobs that have a copy, behind a digest, in the order of their digests.
    pub(super) fn blobs_after(&self, after: Option<&Digest>, limit: usize) -> Result<Vec<Blob>> {
        let mut options = ReadOptions::default();
        options.set_total_order_seek(true);
        let mut rows = self.db.raw_iterator_cf_opt(self.family(PLACES), options);
        match after {
            None => rows.seek_to_first(),
            // Longer than any key that begins so.
            Some(after) => rows.seek([&after.0[..], &[u8::MAX; NAME_BYTES + 1]].concat()),
        }
        let mut blobs: Vec<Blob> = Vec::new();
        while let Some((key, value)) = rows.item() {
            if let Some((digest, _)) = key.split_first_chunk()
                && blobs.last().is_none_or(|last| last.digest.0 != *digest)
                && let Some(entry) = decode_place(Digest(*digest), value)
            {
                if blobs.len() == limit {
                    break;
                }
                blobs.push(entry.blob);
            }
            rows.next();
        }
        rows.status().map_err(self.error("read"))?;
        Ok(blobs)
    }

    /// Until when leases were written, as [`Index::set_leases`] was told; 0 for never.
    pub(super) fn leases(&self, blobs: &[Blob]) -> Result<Vec<u64>> {
        let keys = blobs.iter().map(|blob| &blob.digest.0);
        let rows = self.db.batched_multi_get_cf(self.family(LEASES), keys, false);
        rows.into_iter()
            .map(|row| {
                let row = row.map_err(self.error("read"))?;
                Ok(row.and_then(|row| row.as_ref().try_into().ok()).map_or(0, u64::from_be_bytes))
            })
            .collect()
    }

    pub(super) fn set_leases(&self, blobs: &[Blob], until: u64) -> Result<()> {
        let mut batch = WriteBatch::default();
        for blob in blobs {
            batch.put_cf(self.family(LEASES), blob.digest.0, until.to_be_bytes());
        }
        self.write(batch)
    }

    /// Forgets leases that ended before.
    pub(super) fn drop_leases(&self, before: u64) -> Result<()> {
        for item in self.db.iterator_cf(self.family(LEASES), IteratorMode::Start) {
            let (key, until) = item.map_err(self.error("read"))?;
            if until.as_ref().try_into().map_or(0, u64::from_be_bytes) < before {
                self.db.delete_cf(self.family(LEASES), key).map_err(self.error("write"))?;
            }
        }
        Ok(())
    }

    /// A text that was kept under a name.
    pub(super) fn text(&self, name: &str) -> Result<Option<Vec<u8>>> {
        self.db.get(name).map_err(self.error("read"))
    }

    pub(super) fn set_text(&self, name: &str, text: &[u8]) -> Result<()> {
        self.db.put(name, text).map_err(self.error("write"))
    }

    /// A number that was kept under a name.
    pub(super) fn number(&self, name: &str) -> Result<Option<u64>> {
        let row = self.db.get(name).map_err(self.error("read"))?;
        Ok(row.and_then(|row| row.try_into().ok()).map(u64::from_be_bytes))
    }

    pub(super) fn set_number(&self, name: &str, number: Option<u64>) -> Result<()> {
        match number {
            Some(number) => self.db.put(name, number.to_be_bytes()),
            None => self.db.delete(name),
        }
        .map_err(self.error("write"))
    }

    pub(super) fn root(&self, record: &str) -> Result<Option<Vec<u8>>> {
        self.db.get_cf(self.family(ROOTS), record).map_err(self.error("read"))
    }

    pub(super) fn put_root(&self, record: &str, text: &[u8]) -> Result<()> {
        self.db.put_cf(self.family(ROOTS), record, text).map_err(self.error("write"))
    }

    /// Forgets the records that are not among those which the bucket has.
    pub(super) fn keep_roots(&self, listed: &HashSet<&str>) -> Result<()> {
        let mut batch = WriteBatch::default();
        for item in self.db.iterator_cf(self.family(ROOTS), IteratorMode::Start) {
            let (key, _) = item.map_err(self.error("read"))?;
            if !std::str::from_utf8(&key).is_ok_and(|key| listed.contains(key)) {
                batch.delete_cf(self.family(ROOTS), key);
            }
        }
        self.write(batch)
    }

    /// When copies were last wanted, as [`Index::use_now`] was told; 0 for never.
    pub(super) fn used(&self, blobs: &[Blob]) -> Result<Vec<u32>> {
        let keys = blobs.iter().map(|blob| &blob.digest.0);
        let rows = self.db.batched_multi_get_cf(self.family(USED), keys, false);
        rows.into_iter()
            .map(|row| {
                let row = row.map_err(self.error("read"))?;
                Ok(row.and_then(|row| row.as_ref().try_into().ok()).map_or(0, u32::from_be_bytes))
            })
            .collect()
    }

    pub(super) fn set_used(&self, blobs: &[Blob], when: Option<u32>) -> Result<()> {
        let mut batch = WriteBatch::default();
        for blob in blobs {
            match when {
                Some(when) => batch.put_cf(self.family(USED), blob.digest.0, when.to_be_bytes()),
                None => batch.delete_cf(self.family(USED), blob.digest.0),
            }
        }
        self.write(batch)
    }

    fn write(&self, batch: WriteBatch) -> Result<()> {
        self.db.write(batch).map_err(self.error("write"))
    }

    fn family(&self, name: &str) -> &ColumnFamily {
        self.db.cf_handle(name).expect("every family was opened with the database")
    }

    fn error(&self, action: &'static str) -> impl Fn(rocksdb::Error) -> StoreError {
        let path = self.path.clone();
        move |source| StoreError::Index { action, path: path.clone(), source }
    }
}

fn is_locked(error: &StoreError) -> bool {
    matches!(error, StoreError::Index { source, .. } if source.kind() == rocksdb::ErrorKind::IOError)
}

fn place_key(digest: &Digest, pack: PackName) -> [u8; DIGEST_BYTES + NAME_BYTES] {
    let mut key = [0; DIGEST_BYTES + NAME_BYTES];
    key[..DIGEST_BYTES].copy_from_slice(&digest.0);
    key[DIGEST_BYTES..].copy_from_slice(&pack.to_bytes());
    key
}

fn encode_place(entry: &Entry) -> [u8; PLACE_BYTES] {
    let mut bytes = [0; PLACE_BYTES];
    bytes[..8].copy_from_slice(&entry.blob.size.to_be_bytes());
    bytes[8..16].copy_from_slice(&entry.offset.to_be_bytes());
    bytes[16..24].copy_from_slice(&entry.stored.to_be_bytes());
    bytes[24] = entry.kind();
    bytes
}

/// A row of `places`; `None` for anything that [`encode_place`] does not write.
fn decode_place(digest: Digest, bytes: &[u8]) -> Option<Entry> {
    let bytes: &[u8; PLACE_BYTES] = bytes.try_into().ok()?;
    let number = |at: usize| bytes[at..at + 8].try_into().ok().map(u64::from_be_bytes);
    let (compression, directory) = Entry::of_kind(bytes[24])?;
    let (offset, stored) = (number(8)?, number(16)?);
    offset.checked_add(stored)?;
    Some(Entry { blob: Blob { digest, size: number(0)? }, offset, stored, compression, directory })
}

fn family_options(cache: &Cache) -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    blocks.set_cache_index_and_filter_blocks(true);
    blocks.set_bloom_filter(10.0, false);
    let mut options = Options::default();
    options.set_block_based_table_factory(&blocks);
    options
}
