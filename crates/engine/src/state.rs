//! What the engine remembers: records of images, sessions and snapshots, and the stat cache of each session.
//!
//! One RocksDB in `index/state`. A record is JSON, so that a person can read it with `aether-node`. A record that was
//! written is on disk before the call returns; the stat cache is only a cache and is not waited for.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aether_cas::tree::{Owner, Summary};
use aether_cas::{Blob, Digest};
use rocksdb::{ColumnFamilyDescriptor, DB, IteratorMode, Options, WriteBatch, WriteOptions};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::lazy::Incomplete;
use crate::pool::{Limits, Medium};
use crate::upper::{Known, StatCache, StatKey};

/// Names an image: a tree, seen by one owner. A tree records ownership only where it differs from the owner's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ImageId {
    /// Root of the tree.
    pub root: Blob,
    /// User id of files that name no owner.
    pub uid: u32,
    /// Group id of files that name no owner.
    pub gid: u32,
}

impl ImageId {
    /// The image of `root` for `owner`.
    pub fn new(root: Blob, owner: Owner) -> Self {
        Self { root, uid: owner.uid, gid: owner.gid }
    }

    /// The owner that it was made for.
    pub fn owner(&self) -> Owner {
        Owner { uid: self.uid, gid: self.gid }
    }
}

/// `<root>-<uid>-<gid>`, with the digest alone for the root: it is a file name, and 255 bytes of mount option.
impl std::fmt::Display for ImageId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}-{}", self.root.digest, self.uid, self.gid)
    }
}

/// An image that is on this node, complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Image {
    /// Root of the tree, `<hex>/<size>`.
    pub root: Blob,
    /// User id of files that name no owner.
    pub uid: u32,
    /// Group id of files that name no owner.
    pub gid: u32,
    /// Regular files in the tree.
    pub files: u64,
    /// Bytes of their contents, each file counted.
    pub bytes: u64,
    /// Bytes of the image itself.
    pub image_bytes: u64,
}

impl Image {
    /// Its name.
    pub fn id(&self) -> ImageId {
        ImageId { root: self.root, uid: self.uid, gid: self.gid }
    }

    pub(crate) fn new(id: ImageId, summary: Summary, image_bytes: u64) -> Self {
        Self { root: id.root, uid: id.uid, gid: id.gid, files: summary.files, bytes: summary.bytes, image_bytes }
    }
}

/// A session on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    /// Its name: the uid of its AetherSession object.
    pub id: String,
    /// The image that its upper belongs to, for life.
    pub image: Image,
    /// The directory in the pool; differs from `id` after the upper was swapped.
    pub directory: String,
    /// What the upper was last digested to, if it was not mounted since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<Blob>,
    /// The snapshot that it was forked from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forked_from: Option<String>,
    /// How often it was mounted: what a digest found holds for the upper only if this is the same before and after.
    pub generation: u64,
    /// When it was made, in seconds since 1970.
    pub created: i64,
    /// What its upper is kept on.
    #[serde(default)]
    pub medium: Medium,
    /// The most that its upper may take up.
    #[serde(default)]
    pub limits: Limits,
    /// Being deleted: only the rest of the deletion may still happen to it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deleting: bool,
}

/// How exact a moment a snapshot shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Consistency {
    /// Every writer was stopped, or there was none: the moment of the snapshot.
    PointInTime,
    /// Each file for itself; writers could not be stopped.
    PerFile,
}

/// A frozen copy of a session's upper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Snapshot {
    /// Its name.
    pub id: String,
    /// The session that it shows.
    pub session: String,
    /// The session's directory in the pool at that time, to which its inode numbers belong.
    pub directory: String,
    /// The image that its upper belongs to.
    pub image: Image,
    /// How exact a moment.
    pub consistency: Consistency,
    /// Why it is not a point in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How long the writers were stopped, in microseconds.
    pub frozen_micros: u64,
    /// When, in nanoseconds since 1970.
    pub taken_nanos: i64,
    /// The tree that it was digested to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digested: Option<Digested>,
    /// Made for one operation of this engine, and of no use once that has ended or crashed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub temporary: bool,
    /// Being deleted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deleting: bool,
}

/// What digesting a snapshot found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Digested {
    /// Root of the tree, `<hex>/<size>`.
    pub root: Blob,
    /// Files, symbolic links and fifos that differ from the image: new, written, moved or with other attributes.
    pub changed_files: u64,
    /// Names that were taken away from the image.
    pub deleted_files: u64,
    /// Bytes of contents that the session has written.
    pub own_bytes: u64,
    /// Files that had to be read; the others were recognised by their stat data.
    pub read_files: u64,
    /// How long it took, in milliseconds.
    pub milliseconds: u64,
}

const IMAGES: &str = "images";
const SESSIONS: &str = "sessions";
const SNAPSHOTS: &str = "snapshots";
const FILES: &str = "files";
const INCOMPLETE: &str = "incomplete";

/// The records. Clones share the database.
#[derive(Clone)]
pub(crate) struct State {
    db: Arc<DB>,
    path: PathBuf,
}

impl State {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        fs::create_dir_all(path).at("create", path)?;
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        // Records are few and small; the stat cache is the only thing that grows.
        options.set_write_buffer_size(4 << 20);
        options.set_keep_log_file_num(2);
        options.set_max_open_files(64);
        let families = [IMAGES, SESSIONS, SNAPSHOTS, FILES, INCOMPLETE]
            .map(|name| ColumnFamilyDescriptor::new(name, Options::default()));
        let db = DB::open_cf_descriptors(&options, path, families).map_err(|error| {
            if error.to_string().contains("lock") {
                Error::Busy { what: path.display().to_string(), by: format!("another engine has it open ({error})") }
            } else {
                Error::store(format!("open the records in {}", path.display()), error)
            }
        })?;
        Ok(Self { db: Arc::new(db), path: path.to_owned() })
    }

    fn family(&self, name: &'static str) -> &rocksdb::ColumnFamily {
        self.db.cf_handle(name).expect("made at open")
    }

    fn get<T: DeserializeOwned>(&self, family: &'static str, key: &str) -> Result<Option<T>> {
        let value = self.db.get_cf(self.family(family), key).map_err(|error| self.failed("read", error))?;
        value.map(|value| self.decode(family, key.as_bytes(), &value)).transpose()
    }

    fn list<T: DeserializeOwned>(&self, family: &'static str) -> Result<Vec<T>> {
        let mut all = Vec::new();
        for item in self.db.iterator_cf(self.family(family), IteratorMode::Start) {
            let (key, value) = item.map_err(|error| self.failed("read", error))?;
            all.push(self.decode(family, &key, &value)?);
        }
        Ok(all)
    }

    fn decode<T: DeserializeOwned>(&self, family: &str, key: &[u8], value: &[u8]) -> Result<T> {
        serde_json::from_slice(value).map_err(|error| Error::Damaged {
            what: format!("record {} of {family} in {}", String::from_utf8_lossy(key), self.path.display()),
            detail: error.to_string(),
        })
    }

    fn put(&self, family: &'static str, key: &str, value: &impl Serialize) -> Result<()> {
        let mut batch = WriteBatch::default();
        self.add(&mut batch, family, key, value);
        self.commit(batch)
    }

    fn add(&self, batch: &mut WriteBatch, family: &'static str, key: &str, value: &impl Serialize) {
        let value = serde_json::to_vec(value).expect("records are plain data");
        batch.put_cf(self.family(family), key, value);
    }

    fn remove(&self, family: &'static str, key: &str) -> Result<()> {
        let mut batch = WriteBatch::default();
        batch.delete_cf(self.family(family), key);
        self.commit(batch)
    }

    fn commit(&self, batch: WriteBatch) -> Result<()> {
        let mut options = WriteOptions::default();
        options.set_sync(true);
        self.db.write_opt(batch, &options).map_err(|error| self.failed("write", error))
    }

    fn failed(&self, action: &str, error: rocksdb::Error) -> Error {
        // The database writes nothing more after that until it is opened again; what it acknowledged is safe.
        let way_out = if error.to_string().contains("No space left") {
            " (free space there, then restart the node driver)"
        } else {
            ""
        };
        Error::store(format!("{action} the records in {}{way_out}", self.path.display()), error)
    }

    pub(crate) fn image(&self, id: ImageId) -> Result<Option<Image>> {
        self.get(IMAGES, &id.to_string())
    }

    pub(crate) fn images(&self) -> Result<Vec<Image>> {
        self.list(IMAGES)
    }

    pub(crate) fn put_image(&self, image: &Image) -> Result<()> {
        self.put(IMAGES, &image.id().to_string(), image)
    }

    pub(crate) fn remove_image(&self, id: ImageId) -> Result<()> {
        self.remove(IMAGES, &id.to_string())
    }

    pub(crate) fn incomplete(&self, root: Blob) -> Result<Option<Incomplete>> {
        self.get(INCOMPLETE, &root.to_string())
    }

    pub(crate) fn incompletes(&self) -> Result<Vec<Incomplete>> {
        self.list(INCOMPLETE)
    }

    pub(crate) fn put_incomplete(&self, incomplete: &Incomplete) -> Result<()> {
        self.put(INCOMPLETE, &incomplete.root.to_string(), incomplete)
    }

    pub(crate) fn remove_incomplete(&self, root: Blob) -> Result<()> {
        self.remove(INCOMPLETE, &root.to_string())
    }

    pub(crate) fn session(&self, id: &str) -> Result<Option<Session>> {
        self.get(SESSIONS, id)
    }

    pub(crate) fn sessions(&self) -> Result<Vec<Session>> {
        self.list(SESSIONS)
    }

    pub(crate) fn put_session(&self, session: &Session) -> Result<()> {
        self.put(SESSIONS, &session.id, session)
    }

    /// As [`put_session`](Self::put_session), but only a kill of this process is survived, not a power cut.
    pub(crate) fn put_session_unsynced(&self, session: &Session) -> Result<()> {
        let mut batch = WriteBatch::default();
        self.add(&mut batch, SESSIONS, &session.id, session);
        self.db.write(batch).map_err(|error| self.failed("write", error))
    }

    /// Forgets a session and what its files were digested to.
    pub(crate) fn remove_session(&self, session: &Session) -> Result<()> {
        let mut batch = WriteBatch::default();
        batch.delete_cf(self.family(SESSIONS), &session.id);
        self.forget_files(&mut batch, &session.directory);
        self.commit(batch)
    }

    /// Replaces a session's record and forgets what the files of its former directory were digested to.
    pub(crate) fn swap_directory(&self, session: &Session, former: &str) -> Result<()> {
        let mut batch = WriteBatch::default();
        self.add(&mut batch, SESSIONS, &session.id, session);
        self.forget_files(&mut batch, former);
        self.commit(batch)
    }

    fn forget_files(&self, batch: &mut WriteBatch, directory: &str) {
        // Names hold no zero byte, so this range is this directory's alone.
        batch.delete_range_cf(self.family(FILES), format!("{directory}\0"), format!("{directory}\u{1}"));
    }

    pub(crate) fn snapshot(&self, id: &str) -> Result<Option<Snapshot>> {
        self.get(SNAPSHOTS, id)
    }

    pub(crate) fn snapshots(&self) -> Result<Vec<Snapshot>> {
        self.list(SNAPSHOTS)
    }

    pub(crate) fn put_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        self.put(SNAPSHOTS, &snapshot.id, snapshot)
    }

    pub(crate) fn remove_snapshot(&self, id: &str) -> Result<()> {
        self.remove(SNAPSHOTS, id)
    }

    /// The stat cache of one session directory. A fork's inodes have their own life and need another.
    pub(crate) fn stat_cache(&self, directory: &str) -> impl StatCache + use<> {
        Files { state: self.clone(), prefix: format!("{directory}\0").into_bytes() }
    }
}

struct Files {
    state: State,
    prefix: Vec<u8>,
}

impl Files {
    /// Inode first, so that a session's cache has one entry per file that was ever digested.
    fn key(&self, key: &StatKey) -> Vec<u8> {
        [self.prefix.as_slice(), &key.inode.to_be_bytes()].concat()
    }

    fn stamp(key: &StatKey) -> Vec<u8> {
        let mut stamp = key.size.to_be_bytes().to_vec();
        for (seconds, nanos) in [key.mtime, key.ctime] {
            stamp.extend(seconds.to_be_bytes());
            stamp.extend(nanos.to_be_bytes());
        }
        stamp
    }
}

impl StatCache for Files {
    fn get(&self, key: &StatKey) -> Option<Known> {
        let value = self.state.db.get_pinned_cf(self.state.family(FILES), self.key(key)).ok()??;
        let (plain, digest) = value.strip_prefix(Self::stamp(key).as_slice())?.split_last()?;
        Some(Known { digest: Digest(digest.try_into().ok()?), plain: *plain == 1 })
    }

    fn put(&self, key: &StatKey, known: Known) {
        let value = [Self::stamp(key).as_slice(), &known.digest.0, &[u8::from(known.plain)]].concat();
        // A lost entry costs one read of a file.
        if let Err(error) = self.state.db.put_cf(self.state.family(FILES), self.key(key), value) {
            tracing::warn!(%error, "a digest could not be remembered");
        }
    }
}

/// Writes a small file so that it is there whole or not at all, also after a power cut.
pub(crate) fn write_file(path: &Path, contents: &[u8]) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(parent).at("create a file in", parent)?;
    file.write_all(contents).at("write", path)?;
    file.as_file().sync_all().at("sync", path)?;
    file.persist(path).map_err(|error| error.error).at("rename to", path)?;
    File::open(parent).and_then(|directory| directory.sync_all()).at("sync", parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Image {
        let root = Blob { digest: Digest([7; 32]), size: 5 };
        Image { root, uid: 1000, gid: 1000, files: 1, bytes: 2, image_bytes: 3 }
    }

    fn session(id: &str) -> Session {
        Session {
            id: id.into(),
            image: image(),
            directory: id.into(),
            head: None,
            forked_from: None,
            generation: 3,
            created: 1,
            medium: Medium::Disk,
            limits: Limits { bytes: Some(1), inodes: None },
            deleting: false,
        }
    }

    #[test]
    fn records_survive_reopening_and_a_second_opener_is_told_why_not() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path()).unwrap();
        state.put_session(&session("a")).unwrap();
        state.put_image(&image()).unwrap();
        assert!(matches!(State::open(directory.path()), Err(Error::Busy { .. })));
        drop(state);
        let state = State::open(directory.path()).unwrap();
        assert_eq!(state.session("a").unwrap(), Some(session("a")));
        assert_eq!(state.image(image().id()).unwrap(), Some(image()));
        state.remove_session(&session("a")).unwrap();
        assert_eq!(state.sessions().unwrap(), []);
    }

    #[test]
    fn the_stat_cache_forgets_with_its_session_and_knows_only_unchanged_files() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path()).unwrap();
        let key = StatKey { inode: 300, size: 1, mtime: (1, 2), ctime: (3, 4) };
        for name in ["a", "a-b"] {
            state.put_session(&session(name)).unwrap();
            for plain in [false, true] {
                let known = Known { digest: Digest([1; 32]), plain };
                state.stat_cache(name).put(&key, known);
                assert_eq!(state.stat_cache(name).get(&key), Some(known));
            }
        }
        assert_eq!(state.stat_cache("a").get(&StatKey { ctime: (3, 5), ..key }), None);
        state.remove_session(&session("a")).unwrap();
        assert_eq!(state.stat_cache("a").get(&key), None);
        assert!(state.stat_cache("a-b").get(&key).is_some());
    }
}
