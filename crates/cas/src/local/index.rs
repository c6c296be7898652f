//! The index of a local store: a RocksDB with one small entry per blob, and the bytes of small ones.
//!
//! Column families: `objects` maps a digest to where the blob is and its size; `data` holds blobs
//! that are kept in the index; `roots` the pins; `leases` until when a blob was promised to a client;
//! `condemned` since when a blob is about to be deleted; `damaged` what a copy was found to be; `sha256` for
//! which blob a SHA-256 digest stands;
//! `default` the format version, whether the store was closed cleanly, and where collection and scrub are.
//!
//! Format 2 added the families `leases`, `condemned`, `damaged` and `sha256`; an index of format 1 becomes one when it is opened.
//!
//! Memory: 32 MiB of write buffers for all families together, 32 MiB of block cache that also
//! holds indexes and filters, 128 open files; some 80 MiB when busy, a few when idle.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use rocksdb::{
    BlockBasedOptions, BottommostLevelCompaction, Cache, ColumnFamily, ColumnFamilyDescriptor, CompactOptions, DB,
    DBCompressionType, Direction, IteratorMode, LogLevel, Options, WriteBatch, WriteOptions,
};

use crate::{Blob, Digest, StoreError, store::Result};

const FORMAT: &str = "2";
/// Has nothing that format 2 has not.
const OLDER_FORMAT: &str = "1";
const FORMAT_KEY: &[u8] = b"format";
const CLEAN_KEY: &[u8] = b"clean";

const OBJECTS: &str = "objects";
const DATA: &str = "data";
const ROOTS: &str = "roots";

/// Families of small rows, each named by a digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Table {
    Leases,
    Condemned,
    Damaged,
    /// Named by SHA-256.
    Sha256,
}

impl Table {
    const ALL: [Self; 4] = [Self::Leases, Self::Condemned, Self::Damaged, Self::Sha256];

    const fn family(self) -> &'static str {
        match self {
            Self::Leases => "leases",
            Self::Condemned => "condemned",
            Self::Damaged => "damaged",
            Self::Sha256 => "sha256",
        }
    }
}

const WRITE_BUFFERS: usize = 32 << 20;
const BLOCK_CACHE: usize = 32 << 20;
const OPEN_FILES: i32 = 128;
/// Values from this size on are kept apart from their keys, so that compaction does not rewrite them.
const SEPARATE_FROM: u64 = 2 << 10;

/// Where the copies of one blob are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) size: u64,
    /// Bytes in family `data`.
    pub(super) inline: bool,
    /// A file in the object directory.
    pub(super) file: bool,
}

const INLINE_FLAG: u8 = 1;
const FILE_FLAG: u8 = 2;

impl Entry {
    /// Each copy on its own.
    pub(super) fn forms(self) -> impl Iterator<Item = Self> {
        let forms = [Self { file: false, ..self }, Self { inline: false, ..self }];
        forms.into_iter().filter(|form| form.inline || form.file)
    }

    pub(super) fn encode(self) -> [u8; 9] {
        let mut bytes = [0; 9];
        bytes[0] = if self.inline { INLINE_FLAG } else { 0 } | if self.file { FILE_FLAG } else { 0 };
        bytes[1..].copy_from_slice(&self.size.to_be_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (flags, size) = bytes.split_first()?;
        Some(Self {
            size: u64::from_be_bytes(size.try_into().ok()?),
            inline: flags & INLINE_FLAG != 0,
            file: flags & FILE_FLAG != 0,
        })
    }
}

/// A row to put, or to delete.
pub(super) type Row = (Table, Digest, Option<Vec<u8>>);

/// Changes that are applied together.
#[derive(Default)]
pub(super) struct Changes {
    pub(super) entries: Vec<(Digest, Option<Entry>)>,
    pub(super) data: Vec<(Digest, Option<Bytes>)>,
    pub(super) rows: Vec<Row>,
    /// Values of family `default`.
    pub(super) states: Vec<(&'static str, Option<Vec<u8>>)>,
}

impl Changes {
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.data.is_empty() && self.rows.is_empty() && self.states.is_empty()
    }
}

pub(super) struct Index {
    db: DB,
    path: PathBuf,
    /// Whether the last user of the index closed it.
    pub(super) was_clean: bool,
    /// Whether nothing can be written.
    pub(super) read_only: bool,
}

impl Index {
    pub(super) fn open(path: &Path) -> Result<Self> {
        std::fs::create_dir_all(path).map_err(StoreError::io("create", path))?;
        let cache = Cache::new_lru_cache(BLOCK_CACHE);
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_db_write_buffer_size(WRITE_BUFFERS);
        options.set_max_total_wal_size(2 * WRITE_BUFFERS as u64);
        options.set_max_open_files(OPEN_FILES);
        options.set_max_background_jobs(2);
        options.set_keep_log_file_num(2);
        options.set_log_level(LogLevel::Warn);

        let db = DB::open_cf_descriptors(&options, path, families(&cache)).map_err(opening(path))?;
        let mut index = Self { db, path: path.to_owned(), was_clean: true, read_only: false };
        index.begin()?;
        Ok(index)
    }

    /// Opens an index of this very format to look at it; changes nothing, not even what says that it is in use.
    pub(super) fn open_read_only(path: &Path) -> Result<Self> {
        let (options, cache) = (Options::default(), Cache::new_lru_cache(BLOCK_CACHE));
        let there = DB::list_cf(&options, path).map_err(opening(path))?;
        if Table::ALL.iter().any(|table| there.iter().all(|family| family != table.family())) {
            return Err(unknown_format(path, OLDER_FORMAT.as_bytes()));
        }
        let db = DB::open_cf_descriptors_read_only(&options, path, families(&cache), false).map_err(opening(path))?;
        let mut index = Self { db, path: path.to_owned(), was_clean: true, read_only: true };
        let format = index.db.get(FORMAT_KEY).map_err(index.error("read"))?.unwrap_or_default();
        if format != FORMAT.as_bytes() {
            return Err(unknown_format(path, &format));
        }
        index.was_clean = index.db.get(CLEAN_KEY).map_err(index.error("read"))?.is_some();
        Ok(index)
    }

    /// Checks the version, and marks the index as in use until [`Index::close`].
    fn begin(&mut self) -> Result<()> {
        let format = self.db.get(FORMAT_KEY).map_err(self.error("read"))?;
        let mut batch = WriteBatch::default();
        match format {
            Some(found) if [FORMAT.as_bytes(), OLDER_FORMAT.as_bytes()].contains(&&found[..]) => {
                batch.put(FORMAT_KEY, FORMAT);
                let clean = self.db.get(CLEAN_KEY).map_err(self.error("read"))?;
                self.was_clean = clean.is_some();
            }
            Some(found) => {
                return Err(unknown_format(&self.path, &found));
            }
            None => batch.put(FORMAT_KEY, FORMAT),
        }
        batch.delete(CLEAN_KEY);
        self.write(batch)
    }

    /// Marks the index as closed cleanly. Nothing may be written after it.
    pub(super) fn close(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        let mut batch = WriteBatch::default();
        batch.put(CLEAN_KEY, b"");
        self.write(batch)
    }

    pub(super) fn entry(&self, digest: &Digest) -> Result<Option<Entry>> {
        let value = self.db.get_pinned_cf(self.family(OBJECTS), digest.0).map_err(self.error("read"))?;
        Ok(value.and_then(|value| Entry::decode(&value)))
    }

    /// The entries of many digests, in their order.
    pub(super) fn entries<'a>(&self, digests: impl IntoIterator<Item = &'a Digest>) -> Result<Vec<Option<Entry>>> {
        let keys = digests.into_iter().map(|digest| &digest.0);
        self.db
            .batched_multi_get_cf(self.family(OBJECTS), keys, false)
            .into_iter()
            .map(|value| {
                let value = value.map_err(self.error("read"))?;
                Ok(value.and_then(|value| Entry::decode(&value)))
            })
            .collect()
    }

    pub(super) fn data(&self, digest: &Digest) -> Result<Option<Bytes>> {
        let value = self.db.get_cf(self.family(DATA), digest.0).map_err(self.error("read"))?;
        Ok(value.map(Bytes::from))
    }

    /// Applies `changes` in one step, durable when this returns.
    pub(super) fn apply(&self, changes: Changes) -> Result<()> {
        let mut batch = WriteBatch::default();
        for (digest, data) in changes.data {
            match data {
                Some(data) => batch.put_cf(self.family(DATA), digest.0, data),
                None => batch.delete_cf(self.family(DATA), digest.0),
            }
        }
        for (digest, entry) in changes.entries {
            match entry {
                Some(entry) => batch.put_cf(self.family(OBJECTS), digest.0, entry.encode()),
                None => batch.delete_cf(self.family(OBJECTS), digest.0),
            }
        }
        for (table, digest, row) in changes.rows {
            match row {
                Some(row) => batch.put_cf(self.family(table.family()), digest.0, row),
                None => batch.delete_cf(self.family(table.family()), digest.0),
            }
        }
        for (name, value) in changes.states {
            match value {
                Some(value) => batch.put(name, value),
                None => batch.delete(name),
            }
        }
        self.write(batch)
    }

    /// A value of family `default`.
    pub(super) fn state(&self, name: &'static str) -> Result<Option<Vec<u8>>> {
        self.db.get(name).map_err(self.error("read"))
    }

    /// The rows of many digests, in their order.
    pub(super) fn rows<'a>(
        &self,
        table: Table,
        digests: impl IntoIterator<Item = &'a Digest>,
    ) -> Result<Vec<Option<Vec<u8>>>> {
        let keys = digests.into_iter().map(|digest| &digest.0);
        let found = self.db.batched_multi_get_cf(self.family(table.family()), keys, false);
        found.into_iter().map(|row| Ok(row.map_err(self.error("read"))?.map(|row| row.to_vec()))).collect()
    }

    /// Up to `limit` rows after a digest, in order of digest.
    pub(super) fn rows_after(
        &self,
        table: Table,
        after: Option<&Digest>,
        limit: usize,
    ) -> Result<Vec<(Digest, Vec<u8>)>> {
        Ok(self.page(table.family(), after, limit)?.into_iter().map(|(digest, row)| (digest, row.into_vec())).collect())
    }

    /// Up to `limit` blobs after a digest, in order of digest; none at the end. No snapshot is held between two pages.
    pub(super) fn entries_after(&self, after: Option<&Digest>, limit: usize) -> Result<Vec<(Blob, Entry)>> {
        let mut after = after.copied();
        loop {
            let page = self.page(OBJECTS, after.as_ref(), limit)?;
            let Some((last, _)) = page.last() else { return Ok(Vec::new()) };
            after = Some(*last);
            let entry = |(digest, row): (Digest, Box<[u8]>)| {
                Entry::decode(&row).map(|entry| (Blob { digest, size: entry.size }, entry))
            };
            // A page of rows that cannot be read is not the end.
            let entries: Vec<_> = page.into_iter().filter_map(entry).collect();
            if !entries.is_empty() {
                return Ok(entries);
            }
        }
    }

    fn page(&self, family: &str, after: Option<&Digest>, limit: usize) -> Result<Vec<(Digest, Box<[u8]>)>> {
        let from = after.map_or(IteratorMode::Start, |digest| IteratorMode::From(&digest.0, Direction::Forward));
        let mut rows = Vec::new();
        for item in self.db.iterator_cf(self.family(family), from) {
            let (key, value) = item.map_err(self.error("read"))?;
            let Ok(key) = <[u8; 32]>::try_from(key.as_ref()) else { continue };
            if after == Some(&Digest(key)) {
                continue;
            }
            rows.push((Digest(key), value));
            if rows.len() == limit {
                break;
            }
        }
        Ok(rows)
    }

    /// Rewrites what deleted rows still take on the disk. Costs reading and writing most of the index.
    pub(super) fn compact(&self) -> Result<()> {
        // Blob files are emptied by compaction, by default only the oldest quarter of them.
        let cutoff = |value| {
            let option = [("blob_garbage_collection_age_cutoff", value)];
            self.db.set_options_cf(self.family(DATA), &option).map_err(self.error("set options of"))
        };
        cutoff("1.0")?;
        let mut options = CompactOptions::default();
        options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
        for family in [OBJECTS, DATA].into_iter().chain(Table::ALL.map(Table::family)) {
            self.db.compact_range_cf_opt(self.family(family), None::<&[u8]>, None::<&[u8]>, &options);
        }
        cutoff("0.25")
    }

    /// Visits every blob in order of digest. Answers with the keys of rows that cannot be read: what they stood for counts
    /// as missing.
    pub(super) fn for_each(&self, mut visit: impl FnMut(Blob, Entry) -> Result<()>) -> Result<Vec<Box<[u8]>>> {
        let mut unreadable = Vec::new();
        for item in self.db.iterator_cf(self.family(OBJECTS), IteratorMode::Start) {
            let (key, value) = item.map_err(self.error("read"))?;
            match (<[u8; 32]>::try_from(key.as_ref()), Entry::decode(&value)) {
                (Ok(digest), Some(entry)) => visit(Blob { digest: Digest(digest), size: entry.size }, entry)?,
                _ => unreadable.push(key),
            }
        }
        Ok(unreadable)
    }

    /// Drops a row that [`Index::for_each`] could not read. Only while nobody else writes.
    pub(super) fn drop_unreadable(&self, key: &[u8]) -> Result<()> {
        let value = self.db.get_pinned_cf(self.family(OBJECTS), key).map_err(self.error("read"))?;
        if key.len() == 32 && value.is_none_or(|value| Entry::decode(&value).is_some()) {
            // Somebody has stored the blob meanwhile.
            return Ok(());
        }
        let mut batch = WriteBatch::default();
        batch.delete_cf(self.family(OBJECTS), key);
        self.write(batch)
    }

    /// Puts bytes where a row of a blob belongs.
    #[cfg(test)]
    pub(super) fn put_raw_entry(&self, key: &[u8], row: &[u8]) {
        let mut batch = WriteBatch::default();
        batch.put_cf(self.family(OBJECTS), key, row);
        self.write(batch).expect("the index can be written");
    }

    pub(super) fn put_root(&self, key: &[u8], value: &[u8]) -> Result<()> {
        let mut batch = WriteBatch::default();
        batch.put_cf(self.family(ROOTS), key, value);
        self.write(batch)
    }

    pub(super) fn delete_roots(&self, keys: &[Vec<u8>]) -> Result<()> {
        let mut batch = WriteBatch::default();
        for key in keys {
            batch.delete_cf(self.family(ROOTS), key);
        }
        self.write(batch)
    }

    pub(super) fn roots(&self) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        self.db
            .iterator_cf(self.family(ROOTS), IteratorMode::Start)
            .map(|item| {
                let (key, value) = item.map_err(self.error("read"))?;
                Ok((key.into_vec(), value.into_vec()))
            })
            .collect()
    }

    fn write(&self, batch: WriteBatch) -> Result<()> {
        let mut options = WriteOptions::default();
        options.set_sync(true);
        self.db.write_opt(batch, &options).map_err(self.error("write"))
    }

    fn family(&self, name: &str) -> &ColumnFamily {
        self.db.cf_handle(name).expect("every family was opened with the database")
    }

    fn error(&self, action: &'static str) -> impl Fn(rocksdb::Error) -> StoreError {
        let path = self.path.clone();
        move |source| StoreError::Index { action, path: path.clone(), source }
    }
}

fn families(cache: &Cache) -> Vec<ColumnFamilyDescriptor> {
    let mut data = family_options(cache);
    data.set_compression_type(DBCompressionType::Lz4);
    data.set_enable_blob_files(true);
    data.set_min_blob_size(SEPARATE_FROM);
    data.set_blob_compression_type(DBCompressionType::Lz4);
    data.set_enable_blob_gc(true);
    let small = ["default", OBJECTS, ROOTS].into_iter().chain(Table::ALL.map(Table::family));
    let small = small.map(|family| ColumnFamilyDescriptor::new(family, family_options(cache)));
    small.chain([ColumnFamilyDescriptor::new(DATA, data)]).collect()
}

fn opening(path: &Path) -> impl Fn(rocksdb::Error) -> StoreError {
    move |source| StoreError::Index { action: "open", path: path.to_owned(), source }
}

fn unknown_format(path: &Path, found: &[u8]) -> StoreError {
    StoreError::UnknownFormat {
        path: path.to_owned(),
        found: String::from_utf8_lossy(found).into_owned(),
        known: FORMAT,
    }
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
