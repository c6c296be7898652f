//! A directory into the store: scanned as a whole, then uploaded as far as the store does not have it.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use aether_cas::transfer::{FileSource, upload_tree};
use aether_cas::tree::{Directory, MemoryDirectories, Owner};
use aether_cas::{Blob, Store};
use aether_engine::scan::{Counts, Options, Sink, scan};
use bytes::Bytes;

use crate::failure::{Failure, Reason};
use crate::report::{Phase, Reporter};

/// A tree that is in the store.
#[derive(Clone, Copy, Debug)]
pub struct Stored {
    /// Its root.
    pub root: Blob,
    /// What is in it.
    pub counts: Counts,
}

/// Remembers where each content is, so that it can be sent when all is known.
struct Collect {
    directory: PathBuf,
    directories: MemoryDirectories,
    files: Mutex<HashMap<Blob, PathBuf>>,
}

impl Sink for Collect {
    fn content(&self, content: &Blob, path: &Path, _: &File) -> aether_engine::Result<()> {
        self.files.lock().expect("no holder panics").insert(*content, self.directory.join(path));
        Ok(())
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
    let about = std::fs::metadata(directory)
        .map_err(|error| Failure::new(Reason::Invalid, format!("cannot read {}: {error}", directory.display())))?;
    if !about.is_dir() {
        return Err(Failure::new(Reason::Invalid, format!("{} is not a directory", directory.display())));
    }
    let owner = Owner { uid: about.uid(), gid: about.gid() };
    let sink =
        Collect { directory: directory.to_owned(), directories: MemoryDirectories::new(), files: Mutex::default() };
    let from = directory.to_owned();
    let listener = reporter.clone();
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
    let source =
        FileSource { directories: sink.directories, files: sink.files.into_inner().expect("no holder panics") };
    let progress = |now: aether_cas::transfer::Progress| {
        reporter.progress(Phase::Uploading, now.files, Some(now.files_total), now.bytes)
    };
    upload_tree(scanned.root, Arc::new(source), to, &progress)
        .await
        .map_err(|error| Failure::other("upload to the store", error))?;
    Ok(Stored { root: scanned.root, counts: scanned.counts })
}
