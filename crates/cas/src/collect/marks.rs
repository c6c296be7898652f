//! The marks of one collection: a RocksDB without log in a scratch folder, gone when the collection has ended.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use rocksdb::{BlockBasedOptions, Cache, DB, Options, WriteBatch, WriteOptions};

use crate::{Digest, StoreError, store::Result};

const WRITE_BUFFER: usize = 8 << 20;
const BLOCK_CACHE: usize = 8 << 20;
const OPEN_FILES: i32 = 64;

/// What keeps a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// The pin with this number.
    Pin(usize),
    /// A lease until this time.
    Lease(u64),
}

const PIN: u8 = 0;
const LEASE: u8 = 1;
/// All below is marked too.
const FOLLOWED: u8 = 2;

impl Mark {
    fn encode(self, followed: bool) -> [u8; 9] {
        let (kind, value) = match self {
            Self::Pin(number) => (PIN, number as u64),
            Self::Lease(until) => (LEASE, until),
        };
        let mut row = [0; 9];
        row[0] = kind | if followed { FOLLOWED } else { 0 };
        row[1..].copy_from_slice(&value.to_be_bytes());
        row
    }

    fn decode(row: &[u8]) -> Option<(Self, bool)> {
        let (kind, value) = row.split_first()?;
        let value = u64::from_be_bytes(value.try_into().ok()?);
        let mark = if kind & LEASE == 0 { Self::Pin(usize::try_from(value).ok()?) } else { Self::Lease(value) };
        Some((mark, kind & FOLLOWED != 0))
    }
}

pub(super) struct Marks {
    /// `None` only while being dropped or made anew.
    db: Option<DB>,
    folder: PathBuf,
}

impl Marks {
    /// Begins without any mark, whatever an earlier collection has left.
    pub(super) fn create(folder: &Path) -> Result<Self> {
        Ok(Self { db: Some(create(folder)?), folder: folder.to_owned() })
    }

    /// Forgets all marks.
    pub(super) fn clear(&mut self) -> Result<()> {
        // Its files are removed.
        self.db = None;
        self.db = Some(create(&self.folder)?);
        Ok(())
    }

    /// The mark of each digest.
    pub(super) fn get(&self, digests: &[Digest]) -> Result<Vec<Option<Mark>>> {
        let rows = self.db().multi_get(digests.iter().map(|digest| digest.0));
        rows.into_iter()
            .map(|row| match row.map_err(self.error("read"))? {
                None => Ok(None),
                Some(row) => Mark::decode(&row).map(|(mark, _)| Some(mark)).ok_or_else(|| self.broken()),
            })
            .collect()
    }

    /// Whether all below a directory is marked.
    pub(super) fn is_followed(&self, directory: &Digest) -> Result<bool> {
        let row = self.db().get_pinned(directory.0).map_err(self.error("read"))?;
        row.map_or(Ok(false), |row| Mark::decode(&row).map(|(_, followed)| followed).ok_or_else(|| self.broken()))
    }

    /// Marks blobs, unless they are marked already: a directory stays followed, and the first reason stays.
    pub(super) fn keep(&self, marks: &[(Digest, Mark)]) -> Result<()> {
        let digests: Vec<Digest> = marks.iter().map(|(digest, _)| *digest).collect();
        let mut batch = WriteBatch::default();
        for ((digest, mark), known) in marks.iter().zip(self.get(&digests)?) {
            if known.is_none() {
                batch.put(digest.0, mark.encode(false));
            }
        }
        self.write(batch)
    }

    /// Marks a directory and its contents. The subdirectories are marked when they are followed.
    pub(super) fn follow(&self, directory: &Digest, contents: &[Digest], mark: Mark) -> Result<()> {
        let contents: Vec<_> = contents.iter().map(|digest| (*digest, mark)).collect();
        self.keep(&contents)?;
        let mut batch = WriteBatch::default();
        batch.put(directory.0, mark.encode(true));
        self.write(batch)
    }

    pub(super) fn broken(&self) -> StoreError {
        StoreError::Invalid(format!("the marks in {} are damaged", self.folder.display()))
    }

    fn write(&self, batch: WriteBatch) -> Result<()> {
        let mut options = WriteOptions::default();
        // Marks are made anew after a crash.
        options.disable_wal(true);
        self.db().write_opt(batch, &options).map_err(self.error("write"))
    }

    fn db(&self) -> &DB {
        self.db.as_ref().expect("there until it is dropped")
    }

    fn error(&self, action: &'static str) -> impl Fn(rocksdb::Error) -> StoreError {
        let path = self.folder.clone();
        move |source| StoreError::Index { action, path: path.clone(), source }
    }
}

/// An empty database.
fn create(folder: &Path) -> Result<DB> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(StoreError::io("remove", folder)(e)),
        _ => {}
    }
    fs::create_dir_all(folder).map_err(StoreError::io("create", folder))?;
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(&Cache::new_lru_cache(BLOCK_CACHE));
    blocks.set_cache_index_and_filter_blocks(true);
    blocks.set_bloom_filter(10.0, false);
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_block_based_table_factory(&blocks);
    options.set_write_buffer_size(WRITE_BUFFER);
    options.set_max_write_buffer_number(2);
    options.set_max_open_files(OPEN_FILES);
    options.set_keep_log_file_num(1);
    DB::open(&options, folder).map_err(|source| StoreError::Index { action: "open", path: folder.to_owned(), source })
}

impl Drop for Marks {
    fn drop(&mut self) {
        self.db = None;
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            tracing::warn!(%error, folder = %self.folder.display(), "the next collection removes this folder");
        }
    }
}
