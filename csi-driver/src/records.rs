//! What the driver must remember across its own end and the machine's: one JSON file per session and per publish,
//! replaced whole and synced before a call returns. The API holds everything else.
//!
//! A record says what this node may have written, so it is put before the deed: a session is marked [`Upper::Dirty`]
//! before it is mounted, a publish is recorded before the bind mount.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::driver::Locks;
use crate::failure::{Failure, Result};

/// A kind of record.
pub(crate) trait Record: Clone + PartialEq + Serialize + DeserializeOwned + Send + 'static {
    /// Unique among the records of its kind.
    fn key(&self) -> String;
}

/// What this node has of a session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SessionRecord {
    /// The session object's uid, and the session's id in the engine.
    pub uid: String,
    pub namespace: String,
    pub name: String,
    /// The lease epoch under which the upper was last written.
    pub epoch: i64,
    pub upper: Upper,
    /// The newest tree of this upper that became the session's head, to tell whether anything changed since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_root: Option<String>,
    /// When the newest moment was taken that was made the head under this epoch, in nanoseconds since 1970: the API keeps
    /// whole seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_nanos: Option<i64>,
    /// The newest restores that were done here, oldest first, so that none is done twice.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub applied: Vec<Applied>,
}

/// A restore that was done in place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Applied {
    /// The uid of the AetherRestore.
    pub restore: String,
    /// The AetherCheckpoint that was made for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub safety: Option<String>,
    /// Entries written, moved or given other attributes.
    pub changed: u64,
    /// Entries removed.
    pub removed: u64,
    /// How long the pods stood still, in microseconds.
    pub frozen_micros: u64,
}

/// What the node's upper of a session is worth.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "state")]
pub(crate) enum Upper {
    /// It may hold changes that exist nowhere else.
    #[default]
    Dirty,
    /// The lease was let go with exactly this tree as the session's head; it has not been mounted for writing since.
    Clean { root: String },
    /// Another node took the session over. What was unsaved is in this snapshot, kept for the checkpoint
    /// `recovered-<epoch>`; the upper goes as soon as nothing uses it.
    Fenced {
        snapshot: String,
        /// The snapshot's tree, once it is kept or known to be kept elsewhere.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        root: Option<String>,
    },
}

impl Record for SessionRecord {
    fn key(&self) -> String {
        self.uid.clone()
    }
}

/// A pod's mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PublishRecord {
    /// Where the pod has it.
    pub target: PathBuf,
    pub volume_id: String,
    pub namespace: String,
    /// The session's name.
    pub session: String,
    /// Its uid, once it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    pub read_only: bool,
    /// The engine session that is mounted here when it is not the session itself: the frozen view of a read-only mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub view: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Pod>,
    /// The session object was made for this volume and goes with it.
    #[serde(default)]
    pub inline: bool,
    /// The mount is gone; what is left is to delete the session object.
    #[serde(default)]
    pub unpublished: bool,
}

impl Record for PublishRecord {
    fn key(&self) -> String {
        self.target.to_string_lossy().into_owned()
    }
}

/// A pod, as the kubelet names it at publish.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pod {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

/// All records of one kind: a directory of files, with a copy in memory.
#[derive(Debug)]
pub(crate) struct Records<R> {
    directory: PathBuf,
    known: Arc<Mutex<HashMap<String, R>>>,
    /// Held while the file of a record is written.
    writing: Locks,
}

impl<R: Record> Records<R> {
    /// Reads the records of `directory`, which is made when it is missing. What a kill left half-written is removed:
    /// it was never acknowledged.
    ///
    /// # Errors
    /// A file that cannot be read or understood, by name: it may speak of unsaved work, so it is never skipped.
    pub(crate) fn open(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).map_err(Failure::io("make directory", directory))?;
        let mut known = HashMap::new();
        for entry in fs::read_dir(directory).map_err(Failure::io("read directory", directory))? {
            let path = entry.map_err(Failure::io("read directory", directory))?.path();
            if path.extension().is_some_and(|extension| extension == "new") {
                fs::remove_file(&path).map_err(Failure::io("remove", &path))?;
                continue;
            }
            let text = fs::read(&path).map_err(Failure::io("read", &path))?;
            let record: R = serde_json::from_slice(&text).map_err(|error| Failure::Io {
                action: "understand record",
                path: path.display().to_string(),
                source: error.into(),
            })?;
            known.insert(record.key(), record);
        }
        Ok(Self { directory: directory.to_owned(), known: Arc::new(Mutex::new(known)), writing: Locks::default() })
    }

    pub(crate) fn get(&self, key: &str) -> Option<R> {
        self.lock().get(key).cloned()
    }

    /// Whether there is one for which `matches` says yes.
    pub(crate) fn any(&self, matches: impl Fn(&R) -> bool) -> bool {
        self.lock().values().any(matches)
    }

    pub(crate) fn all(&self) -> Vec<R> {
        self.lock().values().cloned().collect()
    }

    /// Those for which `keep` says yes.
    pub(crate) fn select(&self, keep: impl Fn(&R) -> bool) -> Vec<R> {
        self.lock().values().filter(|record| keep(record)).cloned().collect()
    }

    /// Stores a record; it is on the disk when this returns. One that is there already costs nothing. Once begun it is done to
    /// its end, also when nobody waits for it.
    pub(crate) async fn put(&self, record: R) -> Result<()> {
        let key = record.key();
        let writing = self.writing.lock(&key).await;
        if self.lock().get(&key) == Some(&record) {
            return Ok(());
        }
        let (path, directory, known) = (self.path(&key), self.directory.clone(), self.known.clone());
        tokio::task::spawn_blocking(move || {
            let _writing = writing;
            let new = path.with_extension("new");
            let text = serde_json::to_vec_pretty(&record).expect("a record is plain data");
            (|| {
                let mut file = File::create(&new)?;
                file.write_all(&text)?;
                file.sync_all()?;
                fs::rename(&new, &path)?;
                File::open(&directory)?.sync_all()
            })()
            .map_err(Failure::io("write record", &path))?;
            // The map is locked for this alone, never during a sync.
            known.lock().unwrap_or_else(PoisonError::into_inner).insert(key, record);
            Ok(())
        })
        .await
        .map_err(|_| Failure::Lost("the writing of a record"))?
    }

    /// Forgets a record, after what is being written of it; removing what is not there is no error.
    pub(crate) async fn remove(&self, key: &str) -> Result<()> {
        let _writing = self.writing.lock(key).await;
        let path = self.path(key);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Failure::io("remove record", &path)(error));
            }
            _ => {}
        }
        self.lock().remove(key);
        Ok(())
    }

    /// Keys are paths and ids of others: the file's name is their digest.
    fn path(&self, key: &str) -> PathBuf {
        self.directory.join(format!("{}.json", aether_cas::Digest::of(key.as_bytes())))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, R>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(uid: &str) -> SessionRecord {
        SessionRecord {
            uid: uid.into(),
            namespace: "team".into(),
            name: "fix".into(),
            epoch: 3,
            upper: Upper::Clean { root: "ab/12".into() },
            ..SessionRecord::default()
        }
    }

    #[tokio::test]
    async fn an_equal_record_is_not_written_again() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(directory.path()).unwrap();
        records.put(record("one")).await.unwrap();
        let path = records.path("one");
        fs::remove_file(&path).unwrap();
        records.put(record("one")).await.unwrap();
        assert!(!path.exists(), "an equal record needs no write");
        records.put(SessionRecord { epoch: 4, ..record("one") }).await.unwrap();
        assert!(path.exists());
    }

    #[test]
    fn records_of_an_earlier_version_are_understood() {
        let text = r#"{"uid": "u", "namespace": "team", "name": "fix", "epoch": 2, "upper": {"state": "fenced", "snapshot": "s"}}"#;
        let record: SessionRecord = serde_json::from_str(text).unwrap();
        assert_eq!(record.upper, Upper::Fenced { snapshot: "s".into(), root: None });
        assert!(record.applied.is_empty() && record.head_nanos.is_none());
    }

    #[tokio::test]
    async fn records_survive_a_reopen_and_half_written_ones_do_not() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(directory.path()).unwrap();
        records.put(record("one")).await.unwrap();
        records.put(record("../two/with slash")).await.unwrap();
        records.put(SessionRecord { epoch: 4, upper: Upper::Dirty, ..record("one") }).await.unwrap();
        fs::write(directory.path().join("half.new"), "{\"uid\":").unwrap();
        records.remove("absent").await.unwrap();

        let again = Records::<SessionRecord>::open(directory.path()).unwrap();
        assert_eq!(again.all().len(), 2);
        assert_eq!(again.get("one").unwrap().epoch, 4);
        assert_eq!(again.get("one").unwrap().upper, Upper::Dirty);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
        again.remove("one").await.unwrap();
        assert!(Records::<SessionRecord>::open(directory.path()).unwrap().get("one").is_none());
    }

    #[tokio::test]
    async fn what_is_being_written_does_not_bring_a_removed_record_back() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(directory.path()).unwrap();
        records.put(record("one")).await.unwrap();
        // Begun, and then nobody waits for it any more: the kubelet gave the call up.
        for epoch in 4..40 {
            let mut writing = Box::pin(records.put(SessionRecord { epoch, ..record("one") }));
            std::future::poll_fn(|context| {
                let _begun = writing.as_mut().poll(context);
                std::task::Poll::Ready(())
            })
            .await;
            drop(writing);
            records.remove("one").await.unwrap();
            // Whatever was still under way has ended.
            drop(records.writing.lock("one").await);
            assert!(records.get("one").is_none() && !records.path("one").exists(), "epoch {epoch}");
        }
    }

    #[test]
    fn a_damaged_record_is_named_and_never_skipped() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("bad.json"), "{}").unwrap();
        let message = Records::<SessionRecord>::open(directory.path()).unwrap_err().to_string();
        assert!(message.contains("bad.json"), "{message}");
    }
}
