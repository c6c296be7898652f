//! A store on a local disk: small blobs and directories in RocksDB, larger blobs as files.
//!
//! It promises: a write returns when the blob survives a power cut; a crash leaves no half-made
//! blob under a blob's name; contents are verified when they are written and when they are read,
//! and a copy that turns out damaged is set aside and counts as missing.
//!
//! The store node keeps a cluster's blobs in one ([`LocalConfig::inline_limit`] of some KiB); a node's
//! engine keeps its objects in one (limit 0: every content is a file that the kernel can read,
//! directories are put with [`LocalStore::put_directory`]). Methods of [`LocalStore`] itself block the
//! thread; the [`Store`](crate::Store) implementation does not. One process at a time may have a store open.
//!
//! A store of many clients is opened by [`LocalStore::open_collected`]: its answers are leases, and
//! [`collect`](crate::collect) deletes what no pin and no lease keeps. A node's store is not: its engine knows what it needs;
//! nor is a cache ([`LocalStore::open_cache`]), which need not have the pins.

mod affected;
mod aliases;
mod cache;
mod commit;
mod damage;
mod files;
mod fsck;
mod heap;
mod index;
mod ingest;
mod roots;
#[cfg(feature = "testing")]
pub mod rows;
mod scrub;
mod store;
mod tenure;

use std::{
    collections::HashSet,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::oneshot;

pub use affected::{Affected, affected};
pub use damage::Damage;
pub use fsck::{FsckReport, IncompleteRoot};
pub use ingest::Ingest;
pub use roots::Root;
pub use scrub::{Heal, ScrubState};

use cache::DirectoryCache;
use commit::{Committer, Writes};
use files::{Files, TemporaryPath};
use index::{Changes, Entry, Index};
use tenure::Tenure;

use crate::{
    Blob, Digest, StoreError,
    store::{Result, verify},
    tree::{Directories, Directory},
};

/// Where a local store is and what it keeps where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalConfig {
    /// Folder of the files; made if it is not there.
    pub objects: PathBuf,
    /// Folder of the RocksDB; made if it is not there. Best on the same disk as `objects`.
    pub index: PathBuf,
    /// Blobs of up to this many bytes are kept in RocksDB, larger ones as files. 0: all as files.
    pub inline_limit: u64,
}

/// A store on a local disk. Clones share it; it closes when the last one is dropped.
#[derive(Clone)]
pub struct LocalStore {
    // Dropped first: ends the thread that writes.
    committer: Arc<Committer>,
    shared: Arc<Shared>,
}

/// What a local store holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Blobs in RocksDB.
    pub inline_blobs: u64,
    /// Their bytes, before compression.
    pub inline_bytes: u64,
    /// Blobs that are files.
    pub file_blobs: u64,
    /// Their bytes.
    pub file_bytes: u64,
}

struct Shared {
    index: Index,
    files: Files,
    inline_limit: u64,
    counts: Counts,
    directories: DirectoryCache,
    /// Held by whoever changes entries of the index: the commit thread, or a reader that drops a damaged copy.
    writes: Mutex<()>,
    /// Of a store that is collected.
    tenure: Option<Tenure>,
    /// Held by whoever changes what SHA-256 names stand for.
    aliases: Mutex<()>,
}

impl LocalStore {
    /// Opens the store, and makes it if it is not there.
    ///
    /// Removes what a crash left half-made. After a crash the size of every file is compared with
    /// the index, and files that do not agree count as missing.
    ///
    /// # Errors
    /// [`StoreError::Index`] also when another process has the store open; [`StoreError::UnknownFormat`].
    pub fn open(config: LocalConfig) -> Result<Self> {
        Self::open_for(config, None)
    }

    /// Opens a store of many clients, which are told what is present and what was stored for at least half of `lease`.
    ///
    /// What is in a store that was never opened this way is not collected before `lease` has passed once.
    ///
    /// # Errors
    /// As [`LocalStore::open`].
    pub fn open_collected(config: LocalConfig, lease: Duration) -> Result<Self> {
        Self::open_for(config, Some(lease))
    }

    /// Opens the disk of a store node that is a cache now, and may have been collected before: what a collection had begun
    /// there is ended, because nobody goes on with it.
    ///
    /// # Errors
    /// As [`LocalStore::open`].
    pub fn open_cache(config: LocalConfig) -> Result<Self> {
        let store = Self::open_for(config, None)?;
        store.shared.end_collection()?;
        Ok(store)
    }

    /// Opens a store that is there, to look at it: nothing of it changes, and it is closed for whoever wants to store. After a crash it shows
    /// what the index says, before anybody has compared that with the files. Beside a process that has the store open it
    /// sees one moment of it, and may fail.
    ///
    /// # Errors
    /// [`StoreError::UnknownFormat`], also for an older format that [`LocalStore::open`] takes over, and those of the disk.
    pub fn open_read_only(config: LocalConfig) -> Result<Self> {
        let (index, files) = (Index::open_read_only(&config.index)?, Files::open_read_only(&config.objects)?);
        Self::start(index, files, config.inline_limit, None)
    }

    fn open_for(config: LocalConfig, lease: Option<Duration>) -> Result<Self> {
        // First the index: its lock keeps a second process from sweeping the first one's files.
        let index = Index::open(&config.index)?;
        let files = Files::open(&config.objects)?;
        let tenure = lease.map(|lease| Tenure::resume(lease, &index)).transpose()?;
        Self::start(index, files, config.inline_limit, tenure)
    }

    fn start(index: Index, files: Files, inline_limit: u64, tenure: Option<Tenure>) -> Result<Self> {
        let shared = Arc::new(Shared {
            index,
            files,
            inline_limit,
            counts: Counts::default(),
            directories: DirectoryCache::default(),
            writes: Mutex::new(()),
            tenure,
            aliases: Mutex::new(()),
        });
        shared.recover()?;
        Ok(Self { committer: Arc::new(Committer::start(shared.clone())?), shared })
    }

    /// Folder of the files.
    pub fn objects(&self) -> &Path {
        self.shared.files.root()
    }

    /// Where the file of a blob is, or would be.
    pub fn object_path(&self, digest: &Digest) -> PathBuf {
        self.shared.files.path(digest)
    }

    /// An unused path on the file system of the objects. What is left there is removed at the next open.
    pub fn temporary_path(&self) -> PathBuf {
        self.shared.files.temporary_path()
    }

    /// Whether the store has the blob in any form.
    ///
    /// # Errors
    /// Those of the index.
    pub fn contains(&self, blob: &Blob) -> Result<bool> {
        Ok(self.missing(&[*blob])?.is_empty())
    }

    /// Which of `blobs` the store has in no form, each once, in the order asked.
    ///
    /// # Errors
    /// Those of the index.
    pub fn missing(&self, blobs: &[Blob]) -> Result<Vec<Blob>> {
        self.shared.answer_missing(blobs, |_, _| true)
    }

    /// Which of `blobs` the store has not where contents of files belong: as a file, or inline up to
    /// the limit. So a directory message does not pass for a file with the same bytes.
    ///
    /// # Errors
    /// Those of the index.
    pub fn missing_contents(&self, blobs: &[Blob]) -> Result<Vec<Blob>> {
        let limit = self.shared.inline_limit;
        self.shared.answer_missing(blobs, |blob, entry| entry.file || blob.size <= limit)
    }

    /// Which of `blobs` the store has not where directory messages belong, in the index.
    ///
    /// # Errors
    /// Those of the index.
    pub fn missing_directories(&self, blobs: &[Blob]) -> Result<Vec<Blob>> {
        self.shared.answer_missing(blobs, |_, entry| entry.inline)
    }

    /// The contents of a blob, verified.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Corrupt`] and those of the disk.
    pub fn read_blob(&self, blob: &Blob) -> Result<Bytes> {
        self.shared.read(blob)
    }

    /// Reads a blob to its end, in memory that does not grow with it, and drops the copy if it is damaged.
    ///
    /// # Errors
    /// As [`LocalStore::read_blob`].
    pub fn verify(&self, blob: &Blob) -> Result<()> {
        if blob.is_empty() {
            return Ok(());
        }
        let entry = self.shared.entry(blob)?.ok_or_else(|| self.shared.not_found(blob))?;
        match self.shared.check_copy(blob, entry)? {
            None => Ok(()),
            Some(_) => self.shared.drop_damaged(blob),
        }
    }

    /// Opens a blob's file without verifying it; `None` if the store has no file of it.
    ///
    /// # Errors
    /// Those of opening the file.
    pub fn open_object(&self, blob: &Blob) -> Result<Option<File>> {
        match self.shared.entry(blob)? {
            Some(entry) if entry.file => self.shared.files.open_object(&blob.digest),
            _ => Ok(None),
        }
    }

    /// Stores blobs, durable together when this returns.
    ///
    /// # Errors
    /// [`StoreError::Mismatch`] and those of the disk. After an error any part may be stored.
    pub fn put_batch(&self, blobs: Vec<(Blob, Bytes)>) -> Result<()> {
        self.wait(self.submit_batch(blobs)?)
    }

    /// Stores a copy of the file at `path`.
    ///
    /// # Errors
    /// As [`LocalStore::put_batch`].
    pub fn put_file(&self, blob: Blob, path: &Path) -> Result<()> {
        if self.missing_contents(&[blob])?.is_empty() {
            return Ok(());
        }
        let source = File::open(path).map_err(StoreError::io("open", path))?;
        let mut writes = Writes::default();
        if blob.size <= self.shared.inline_limit {
            // One byte more than it should have is enough to see that the file grew.
            let mut data = Vec::new();
            source.take(blob.size + 1).read_to_end(&mut data).map_err(StoreError::io("read", path))?;
            verify(blob, &data)?;
            writes.inline.push((blob, data.into()));
        } else {
            let mut temporary = self.shared.files.create_temporary()?;
            let found = temporary.copy_from(source, path)?;
            if found != blob {
                return Err(StoreError::Mismatch { blob, found });
            }
            writes.files.push((blob, temporary.into_path()));
        }
        self.wait(self.committer.submit(writes))
    }

    /// Takes over files that are already written, on the file system of the objects: by one sync and a
    /// rename each. The caller has computed the digests of exactly these bytes; only sizes are checked.
    /// A file whose blob is there already is removed. On an error the files that were not taken are removed.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for a file of another size and those of the disk.
    pub fn adopt_batch(&self, files: Vec<(Blob, PathBuf)>) -> Result<()> {
        let mut writes = Writes::default();
        let files: Vec<_> = files.into_iter().map(|(blob, path)| (blob, TemporaryPath::take_over(path))).collect();
        for (blob, path) in files {
            self.shared.files.prepare_foreign(&blob, path.as_path())?;
            if !blob.is_empty() {
                writes.files.push((blob, path));
            }
        }
        self.wait(self.committer.submit(writes))
    }

    /// Stores a directory message in the index. Put everything below it first.
    ///
    /// # Errors
    /// [`StoreError::NotADirectory`] for a directory that breaks the rules of trees, and those of the disk.
    pub fn put_directory(&self, directory: &Directory) -> Result<Blob> {
        let encoded = encode(directory)?;
        let blob = encoded.0;
        self.put_encoded_directories(vec![encoded])?;
        Ok(blob)
    }

    /// Stores many directories in one step, so their order does not matter among them.
    ///
    /// # Errors
    /// As [`LocalStore::put_directory`].
    pub fn put_directories<'a>(&self, directories: impl IntoIterator<Item = &'a Directory>) -> Result<Vec<Blob>> {
        let encoded = directories.into_iter().map(encode).collect::<Result<Vec<_>>>()?;
        let blobs = encoded.iter().map(|(blob, _)| *blob).collect();
        self.put_encoded_directories(encoded)?;
        Ok(blobs)
    }

    /// As [`LocalStore::put_directories`], for messages whose digests and form are verified already.
    pub(crate) fn put_encoded_directories(&self, directories: Vec<(Blob, Bytes)>) -> Result<()> {
        let writes = Writes { inline: directories, ..Default::default() };
        self.wait(self.committer.submit(writes))
    }

    /// Begins to store a blob in pieces.
    ///
    /// # Errors
    /// Those of creating a file.
    pub fn begin(&self, blob: Blob) -> Result<Ingest> {
        Ingest::new(self.clone(), blob.size, Some(blob.digest))
    }

    /// Begins to store a blob in pieces of which only the size is known. Whoever does so verifies by other means that
    /// it is what was meant, before it is finished.
    ///
    /// # Errors
    /// Those of creating a file.
    pub fn begin_unnamed(&self, size: u64) -> Result<Ingest> {
        Ingest::new(self.clone(), size, None)
    }

    /// Removes blobs in all forms. Whoever calls it knows that no tree needs them.
    ///
    /// # Errors
    /// Those of the disk; blobs are gone from the index before their files are removed.
    pub fn remove(&self, blobs: &[Blob]) -> Result<()> {
        self.shared.remove(blobs)
    }

    /// Visits every blob, in order of digest, and says whether it has a file.
    ///
    /// # Errors
    /// Those of the index and of `visit`.
    pub fn for_each(&self, mut visit: impl FnMut(Blob, bool) -> Result<()>) -> Result<()> {
        self.shared.index.for_each(|blob, entry| visit(blob, entry.file)).map(drop)
    }

    /// What the store holds.
    pub fn statistics(&self) -> Statistics {
        self.shared.counts.get()
    }

    fn submit_batch(&self, blobs: Vec<(Blob, Bytes)>) -> Result<oneshot::Receiver<Result<()>>> {
        let names: Vec<Blob> = blobs.iter().map(|(blob, _)| *blob).collect();
        for (blob, data) in &blobs {
            verify(*blob, data)?;
        }
        let missing: HashSet<Blob> = self.missing_contents(&names)?.into_iter().collect();
        let mut writes = Writes::default();
        for (blob, data) in blobs {
            if !missing.contains(&blob) {
                continue;
            }
            if blob.size <= self.shared.inline_limit {
                writes.inline.push((blob, data));
            } else {
                let mut temporary = self.shared.files.create_temporary()?;
                temporary.write(&data)?;
                writes.files.push((blob, temporary.into_path()));
            }
        }
        Ok(self.committer.submit(writes))
    }

    /// Not tokio's own blocking, which panics on a thread of a runtime: the commit thread needs no runtime to go on.
    fn wait(&self, receiver: oneshot::Receiver<Result<()>>) -> Result<()> {
        futures::executor::block_on(receiver).unwrap_or_else(|_| Err(self.closed()))
    }

    fn closed(&self) -> StoreError {
        StoreError::Closed(self.shared.name())
    }
}

impl std::fmt::Debug for LocalStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LocalStore({})", self.shared.name())
    }
}

fn encode(directory: &Directory) -> Result<(Blob, Bytes)> {
    let data = directory.encode();
    let blob = Blob::of(&data);
    directory.check().map_err(|source| StoreError::NotADirectory { blob, source })?;
    Ok((blob, data))
}

impl Directories for LocalStore {
    fn directory(&self, blob: &Blob) -> Result<Arc<Directory>> {
        if let Some(directory) = self.shared.directories.get(blob) {
            return Ok(directory);
        }
        let data = self.shared.read(blob)?;
        let directory =
            Arc::new(Directory::decode(&data).map_err(|source| StoreError::NotADirectory { blob: *blob, source })?);
        self.shared.directories.put(*blob, directory.clone());
        Ok(directory)
    }

    fn directory_bytes(&self, blob: &Blob) -> Result<Bytes> {
        self.shared.read(blob)
    }
}

impl Shared {
    fn name(&self) -> String {
        self.files.root().display().to_string()
    }

    fn lock_writes(&self) -> MutexGuard<'_, ()> {
        self.writes.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn not_found(&self, blob: &Blob) -> StoreError {
        StoreError::NotFound { blob: *blob, store: self.name() }
    }

    fn corrupt(&self, blob: &Blob, reason: String) -> StoreError {
        StoreError::Corrupt { blob: *blob, store: self.name(), reason }
    }

    /// The entry of a blob, if the store has it.
    fn entry(&self, blob: &Blob) -> Result<Option<Entry>> {
        let entry = self.index.entry(&blob.digest)?;
        Ok(entry.filter(|entry| entry.size == blob.size))
    }

    fn missing(&self, blobs: &[Blob], good: impl Fn(&Blob, &Entry) -> bool) -> Result<Vec<Blob>> {
        let entries = self.index.entries(blobs.iter().map(|blob| &blob.digest))?;
        let mut seen = HashSet::new();
        let missing = blobs.iter().zip(entries).filter(|(blob, entry)| {
            let there = entry.is_some_and(|entry| entry.size == blob.size && good(blob, &entry));
            !there && !blob.is_empty() && seen.insert(**blob)
        });
        Ok(missing.map(|(blob, _)| *blob).collect())
    }

    fn read(&self, blob: &Blob) -> Result<Bytes> {
        if blob.is_empty() {
            return Ok(Bytes::new());
        }
        let entry = self.entry(blob)?.ok_or_else(|| self.not_found(blob))?;
        if let Ok(data) = self.read_copy(blob, entry)? {
            return Ok(data);
        }
        self.drop_damaged(blob)?;
        // There is another form of the blob, or somebody has replaced the copy meanwhile.
        let entry = self.entry(blob)?.ok_or_else(|| self.not_found(blob))?;
        self.read_copy(blob, entry)?.map_err(|reason| self.corrupt(blob, reason))
    }

    /// Reads a blob where its entry says it is; the inner error says what is wrong with the copy.
    fn read_copy(&self, blob: &Blob, entry: Entry) -> Result<Result<Bytes, String>> {
        let data = if entry.inline {
            self.index.data(&blob.digest)
        } else {
            match self.files.open_object(&blob.digest)? {
                None => Ok(None),
                Some(file) => {
                    // Not more than one byte beyond its size, whatever the file has become.
                    let mut data = Vec::with_capacity(usize::try_from(blob.size).unwrap_or(0));
                    let read = file.take(blob.size + 1).read_to_end(&mut data);
                    let read = read.map_err(StoreError::io("read", &self.files.path(&blob.digest)));
                    read.map(|_| Some(Bytes::from(data)))
                }
            }
        };
        Ok(match data {
            Err(error) => Err(scrub::damage(error)?),
            Ok(None) => Err(GONE.to_owned()),
            Ok(Some(data)) if blob.matches(&data) => Ok(data),
            Ok(Some(data)) => Err(found_instead(blob, &Blob::of(&data))),
        })
    }

    /// As [`Shared::read_copy`], in memory that does not grow with the blob: what is wrong with the copy, if anything.
    fn check_copy(&self, blob: &Blob, entry: Entry) -> Result<Option<String>> {
        if entry.inline {
            return Ok(self.read_copy(blob, entry)?.err());
        }
        let Some(file) = self.files.open_object(&blob.digest)? else {
            return Ok(Some(GONE.to_owned()));
        };
        let found = Blob::of_reader(file.take(blob.size + 1));
        match found.map_err(StoreError::io("read", &self.files.path(&blob.digest))) {
            Ok(found) => Ok((found != *blob).then(|| found_instead(blob, &found))),
            Err(error) => Ok(Some(scrub::damage(error)?)),
        }
    }

    /// Drops a copy that a reader found damaged, unless it has been replaced by a good one meanwhile.
    ///
    /// Succeeds when a good copy is there afterwards.
    fn drop_damaged(&self, blob: &Blob) -> Result<()> {
        let _writing = self.lock_writes();
        let entry = self.entry(blob)?.ok_or_else(|| self.not_found(blob))?;
        let mut changes = Changes::default();
        let mut left = entry;
        let mut wrong = None;
        // A blob that is there in both forms keeps the good one.
        for form in entry.forms() {
            if let Some(reason) = self.check_copy(blob, form)? {
                wrong = Some(reason);
                if form.inline {
                    changes.data.push((blob.digest, None));
                }
                left = Entry { inline: left.inline && !form.inline, file: left.file && !form.file, ..left };
            }
        }
        let Some(reason) = wrong else { return Ok(()) };
        let kept = (left.inline || left.file).then_some(left);
        if self.index.read_only {
            return if kept.is_some() { Ok(()) } else { Err(self.corrupt(blob, reason)) };
        }
        changes.entries.push((blob.digest, kept));
        if kept.is_none() {
            changes.rows.extend(self.damage_row(blob, &reason));
        }
        self.index.apply(changes)?;
        self.counts.replace(Some(&entry), kept.as_ref());
        if entry.file && !left.file {
            self.files.set_aside(&blob.digest)?;
        }
        tracing::error!(%blob, store = %self.name(), %reason, "dropped a damaged copy");
        if kept.is_some() { Ok(()) } else { Err(self.corrupt(blob, reason)) }
    }

    fn remove(&self, blobs: &[Blob]) -> Result<()> {
        let _writing = self.lock_writes();
        let mut changes = Changes::default();
        let mut gone = Vec::new();
        for blob in blobs {
            if let Some(entry) = self.entry(blob)? {
                changes.entries.push((blob.digest, None));
                if entry.inline {
                    changes.data.push((blob.digest, None));
                }
                gone.push((blob.digest, entry));
            }
        }
        self.index.apply(changes)?;
        for (digest, entry) in gone {
            self.counts.replace(Some(&entry), None);
            if entry.file {
                self.files.remove(&digest)?;
            }
        }
        // A directory that was removed must not be served from memory.
        self.directories.clear();
        Ok(())
    }

    /// Counts what is there; after a crash, also compares every file's size with the index.
    fn recover(&self) -> Result<()> {
        let mut wrong = Vec::new();
        let compare = !self.index.was_clean && !self.index.read_only;
        let unreadable = self.index.for_each(|blob, entry| {
            if entry.file && compare && self.files.size(&blob.digest)? != Some(blob.size) {
                wrong.push((blob, entry));
            } else {
                self.counts.replace(None, Some(&entry));
            }
            Ok(())
        })?;
        if !unreadable.is_empty() {
            tracing::error!(
                rows = unreadable.len(),
                store = %self.name(),
                "the index has rows that cannot be read; what they stood for counts as missing, and fsck names them"
            );
        }
        for (blob, entry) in wrong {
            tracing::error!(%blob, store = %self.name(), "lost a file in a crash");
            let left = Entry { file: false, ..entry };
            let left = left.inline.then_some(left);
            let rows = self.damage_row(&blob, "its file was lost in a crash").into_iter().collect();
            self.index.apply(Changes { entries: vec![(blob.digest, left)], rows, ..Default::default() })?;
            self.counts.replace(None, left.as_ref());
            self.files.set_aside(&blob.digest)?;
        }
        Ok(())
    }
}

const GONE: &str = "it is gone";

fn found_instead(blob: &Blob, found: &Blob) -> String {
    if found.size == blob.size {
        format!("its digest is {}", found.digest)
    } else if found.size < blob.size {
        format!("it has {} bytes only", found.size)
    } else {
        "it is longer than it should be".to_owned()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Err(error) = self.index.close() {
            tracing::warn!(%error, "the next start will check all files");
        }
    }
}

#[derive(Default)]
struct Counts {
    inline_blobs: AtomicU64,
    inline_bytes: AtomicU64,
    file_blobs: AtomicU64,
    file_bytes: AtomicU64,
}

impl Counts {
    /// Accounts for an entry that took the place of another.
    fn replace(&self, old: Option<&Entry>, new: Option<&Entry>) {
        for (entry, add) in [(old, false), (new, true)] {
            let Some(entry) = entry else { continue };
            let change = |counter: &AtomicU64, by: u64| {
                if add {
                    counter.fetch_add(by, Ordering::Relaxed);
                } else {
                    counter.fetch_sub(by, Ordering::Relaxed);
                }
            };
            if entry.inline {
                change(&self.inline_blobs, 1);
                change(&self.inline_bytes, entry.size);
            }
            if entry.file {
                change(&self.file_blobs, 1);
                change(&self.file_bytes, entry.size);
            }
        }
    }

    fn get(&self) -> Statistics {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Statistics {
            inline_blobs: read(&self.inline_blobs),
            inline_bytes: read(&self.inline_bytes),
            file_blobs: read(&self.file_blobs),
            file_bytes: read(&self.file_bytes),
        }
    }
}
