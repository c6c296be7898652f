//! A directory into the store: what it holds is uploaded while it is scanned, as far as the store does not have it.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use aether_cas::transfer::{FileSource, Object, upload_found, upload_tree};
use aether_cas::tree::{Directory, MemoryDirectories, Owner};
use aether_cas::{Blob, Store, StoreError};
use aether_engine::scan::{Counts, Options, Scanned, Sink, scan};
use bytes::Bytes;
use tokio::sync::mpsc::{Sender, channel};
use tokio_stream::wrappers::ReceiverStream;

use crate::failure::{Failure, Reason};
use crate::report::{Phase, Reporter};

/// Contents that may wait to be asked about. Their bytes are in memory only if they are few.
const WAITING: usize = 32;

/// A content, and where its bytes are.
pub(crate) type Found = (Blob, Object);

/// A tree that is in the store.
#[derive(Clone, Copy, Debug)]
pub struct Stored {
    /// Its root.
    pub root: Blob,
    /// What is in it.
    pub counts: Counts,
}

/// A tree of which the contents are in the store.
pub(crate) struct Built {
    /// Its root.
    pub(crate) root: Blob,
    /// What is in it.
    pub(crate) counts: Counts,
    /// Its directories, and where contents were found that are files.
    pub(crate) source: FileSource,
}

/// Sends each content on its way, and remembers where it was.
struct Collect {
    directory: PathBuf,
    directories: MemoryDirectories,
    files: Mutex<HashMap<Blob, PathBuf>>,
    found: Sender<Found>,
}

impl Sink for Collect {
    fn content(&self, content: &Blob, path: &Path, _: &File) -> aether_engine::Result<()> {
        let path = self.directory.join(path);
        self.files.lock().expect("no holder panics").insert(*content, path.clone());
        self.found
            .blocking_send((*content, Object::File(path)))
            .map_err(|_| aether_engine::Error::store("upload", StoreError::Closed("the upload".into())))
    }

    fn directory(&self, blob: &Blob, message: Bytes) -> aether_engine::Result<()> {
        let directory = Directory::decode(&message)
            .map_err(|error| aether_engine::Error::store(format!("keep directory {blob}"), error))?;
        self.directories.insert(directory);
        Ok(())
    }
}

/// Stores the tree at `directory`. Whoever owns `directory` counts as the owner of the tree, so that everything of
/// theirs belongs to a session's owner later. Modification times are kept.
///
/// # Errors
/// The first file that cannot be read, or what the store said.
pub async fn store(directory: &Path, to: &dyn Store, reporter: Arc<Reporter>) -> Result<Stored, Failure> {
    let (sender, found) = found();
    let (scanned, uploaded) = tokio::join!(scan_into(directory, sender, &reporter), upload_found(found, to));
    uploaded.map_err(|error| Failure::other("upload to the store", error))?;
    let (scanned, source) = scanned?;
    finish(Built { root: scanned.root, counts: scanned.counts, source }, to, &reporter).await
}

/// A way for contents that were found to those who upload them.
pub(crate) fn found() -> (Sender<Found>, ReceiverStream<Found>) {
    let (sender, receiver) = channel(WAITING);
    (sender, ReceiverStream::new(receiver))
}

/// Scans `directory`, and hands its contents to `found`.
pub(crate) async fn scan_into(
    directory: &Path,
    found: Sender<Found>,
    reporter: &Arc<Reporter>,
) -> Result<(Scanned, FileSource), Failure> {
    let about = std::fs::metadata(directory)
        .map_err(|error| Failure::new(Reason::Invalid, format!("cannot read {}: {error}", directory.display())))?;
    if !about.is_dir() {
        return Err(Failure::new(Reason::Invalid, format!("{} is not a directory", directory.display())));
    }
    let owner = Owner { uid: about.uid(), gid: about.gid() };
    let sink = Collect {
        directory: directory.to_owned(),
        directories: MemoryDirectories::new(),
        files: Mutex::default(),
        found,
    };
    let (from, listener) = (directory.to_owned(), reporter.clone());
    let scanned = tokio::task::spawn_blocking(move || {
        listener.progress(Phase::Scanning, 0, None, 0);
        let progress = |now: aether_engine::scan::Progress| {
            listener.progress(Phase::Scanning, now.files, Some(now.files_total), now.bytes)
        };
        let scanned = scan(&from, Options { owner, mtime: None, progress: Some(&progress) }, &sink)?;
        Ok::<_, aether_engine::Error>((scanned, sink))
    });
    let (scanned, sink) =
        scanned.await.map_err(|error| Failure::other("scan", error))?.map_err(|error| Failure::other("scan", error))?;
    if scanned.counts.skipped > 0 {
        tracing::warn!(skipped = scanned.counts.skipped, "sockets and device nodes are not imported");
    }
    let files = sink.files.into_inner().expect("no holder panics");
    Ok((scanned, FileSource { directories: sink.directories, files }))
}

/// Stores the directories of a tree.
pub(crate) async fn finish(built: Built, to: &dyn Store, reporter: &Reporter) -> Result<Stored, Failure> {
    let progress = |now: aether_cas::transfer::Progress| {
        reporter.progress(Phase::Uploading, now.files, Some(now.files_total), now.bytes)
    };
    upload_tree(built.root, Arc::new(built.source), to, &progress)
        .await
        .map_err(|error| Failure::other("upload to the store", error))?;
    Ok(Stored { root: built.root, counts: built.counts })
}
