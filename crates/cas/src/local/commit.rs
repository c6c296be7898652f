//! Group commit: one thread makes what many writers hand in durable, together.
//!
//! A group costs two `syncfs` and one synced write of the index, however many blobs it has:
//! contents are synced before they get their final names, names before the index speaks of them.
//! Blobs that live in the index cost the one synced write only.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

use bytes::Bytes;
use tokio::sync::oneshot;

use super::{
    Shared,
    files::TemporaryPath,
    index::{Changes, Entry},
};
use crate::{Blob, Digest, StoreError, store::Result};

/// A group takes no more requests once it has this many bytes for the index …
const GROUP_BYTES: usize = 32 << 20;
/// … or this many files.
const GROUP_FILES: usize = 8192;

/// Blobs to be made durable. Their bytes are verified already.
#[derive(Default)]
pub(super) struct Writes {
    pub(super) files: Vec<(Blob, TemporaryPath)>,
    pub(super) inline: Vec<(Blob, Bytes)>,
}

impl Writes {
    pub(super) fn is_empty(&self) -> bool {
        self.files.is_empty() && self.inline.is_empty()
    }

    fn inline_bytes(&self) -> usize {
        self.inline.iter().map(|(_, data)| data.len()).sum()
    }
}

struct Request {
    writes: Writes,
    done: oneshot::Sender<Result<()>>,
}

/// Hands writes to the thread; ends it when dropped.
pub(super) struct Committer {
    sender: Option<mpsc::Sender<Request>>,
    thread: Option<JoinHandle<()>>,
}

impl Committer {
    pub(super) fn start(shared: Arc<Shared>) -> Result<Self> {
        if shared.index.read_only {
            return Ok(Self { sender: None, thread: None });
        }
        let (sender, receiver) = mpsc::channel();
        let folder = shared.files.root().to_owned();
        let thread = std::thread::Builder::new()
            .name("store-commit".to_owned())
            .spawn(move || run(&shared, &receiver))
            .map_err(StoreError::io("start the commit thread of", &folder))?;
        Ok(Self { sender: Some(sender), thread: Some(thread) })
    }

    /// Queues `writes`; the receiver hears when they are durable.
    pub(super) fn submit(&self, writes: Writes) -> oneshot::Receiver<Result<()>> {
        let (done, receiver) = oneshot::channel();
        if writes.is_empty() {
            let _ = done.send(Ok(()));
        } else if let Some(sender) = &self.sender {
            // If the thread is gone, the request and with it `done` is dropped: the receiver hears that.
            let _ = sender.send(Request { writes, done });
        }
        receiver
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared, receiver: &mpsc::Receiver<Request>) {
    while let Ok(first) = receiver.recv() {
        let mut bytes = first.writes.inline_bytes();
        let mut files = first.writes.files.len();
        let mut group = vec![first];
        while bytes < GROUP_BYTES && files < GROUP_FILES {
            let Ok(next) = receiver.try_recv() else { break };
            bytes += next.writes.inline_bytes();
            files += next.writes.files.len();
            group.push(next);
        }
        let (writes, done): (Vec<_>, Vec<_>) = group.into_iter().map(|r| (r.writes, r.done)).unzip();
        let result = commit(shared, writes);
        for done in done {
            // A writer that no longer listens has its blobs all the same.
            let _ = done.send(match &result {
                Ok(()) => Ok(()),
                Err(error) => Err(repeat(error)),
            });
        }
    }
}

/// Makes a group durable. On an error any part of it may be stored, none of it is acknowledged.
fn commit(shared: &Shared, group: Vec<Writes>) -> Result<()> {
    let _writing = shared.lock_writes();
    let mut known: HashMap<Digest, Entry> = HashMap::new();
    let digests: HashSet<Digest> = group
        .iter()
        .flat_map(|w| {
            let files = w.files.iter().map(|(blob, _)| blob.digest);
            files.chain(w.inline.iter().map(|(blob, _)| blob.digest))
        })
        .collect();
    let entries = shared.index.entries(&digests)?;
    for (digest, entry) in digests.iter().zip(entries) {
        if let Some(entry) = entry {
            known.insert(*digest, entry);
        }
    }
    let before = known.clone();

    let mut files = Vec::new();
    let mut changes = Changes::default();
    for writes in group {
        for (blob, path) in writes.files {
            let entry = known.entry(blob.digest).or_insert(absent(&blob));
            // Otherwise dropping `path` removes the superfluous copy.
            if !std::mem::replace(&mut entry.file, true) {
                files.push((blob, path));
            }
        }
        for (blob, data) in writes.inline {
            let entry = known.entry(blob.digest).or_insert(absent(&blob));
            if !std::mem::replace(&mut entry.inline, true) {
                changes.data.push((blob.digest, Some(data)));
            }
        }
    }
    if !files.is_empty() {
        shared.files.sync()?;
        for (blob, path) in files {
            shared.files.install(&blob.digest, path.as_path())?;
            path.keep();
        }
        shared.files.sync()?;
    }
    let stored: Vec<Blob> = known.iter().map(|(digest, entry)| Blob { digest: *digest, size: entry.size }).collect();
    changes.entries = known
        .into_iter()
        .filter(|(digest, entry)| before.get(digest) != Some(entry))
        .map(|(digest, entry)| (digest, Some(entry)))
        .collect();
    let counted: Vec<_> = changes.entries.clone();
    shared.apply_stored(&stored, changes)?;
    for (digest, entry) in counted {
        shared.counts.replace(before.get(&digest), entry.as_ref());
    }
    Ok(())
}

fn absent(blob: &Blob) -> Entry {
    Entry { size: blob.size, inline: false, file: false }
}

/// The same error for another writer of the group.
fn repeat(error: &StoreError) -> StoreError {
    match error {
        StoreError::Io { action, path, source } => StoreError::Io {
            action,
            path: path.clone(),
            source: source.raw_os_error().map_or_else(|| source.kind().into(), std::io::Error::from_raw_os_error),
        },
        StoreError::Index { action, path, source } => {
            StoreError::Index { action, path: path.clone(), source: source.clone() }
        }
        other => StoreError::Invalid(other.to_string()),
    }
}
