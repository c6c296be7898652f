//! A folder of an S3 bucket: what its listing shows, read object by object, as one tree.
//!
//! The tree is that of one listing: each object is read only as the one that was listed, and the bucket is listed again when all
//! are read. Where something changed meanwhile, it is read anew; a bucket that never rests is refused, not mixed.
//!
//! Files have mode 0644 and the time that the service says they were written, folders have 0755 and the time of the newest file
//! below. So the same objects are the same root, whenever they are imported.
//!
//! Memory: [`READERS`] objects of a message each beside those that wait to be sent. A larger object is a file of `scratch` while it
//! is sent, at most [`LARGE`] at a time.

mod bucket;
mod listing;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use aether_cas::digest::BlobHasher;
use aether_cas::transfer::{BATCH_BYTES, FileSource, Object, upload_found};
use aether_cas::tree::{Attributes, MemoryDirectories, Mtime, Node};
use aether_cas::{Blob, Store};
use aether_engine::scan::Counts;
use bytes::BytesMut;
use futures::{StreamExt, TryStreamExt, stream};
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::Sender;

use crate::cli::S3;
use crate::failure::{Failure, Reason};
use crate::folder::Folder;
use crate::report::{Phase, Reporter};
use crate::scan::{self, Built, Found, Stored};
use bucket::Bucket;
use listing::{Entries, Listed};

/// Objects that are read at a time.
const READERS: usize = 16;
/// Of these, objects that are too large for memory.
const LARGE: usize = 4;
/// How often a bucket may change under an import.
const ROUNDS: u32 = 5;
/// After the first change; it doubles.
const PAUSE: Duration = Duration::from_millis(500);
const FILE_MODE: u32 = 0o644;
const FOLDER_MODE: u32 = 0o755;

/// What became of an import.
#[derive(Clone, Debug)]
pub enum Imported {
    /// The tree of the listing with this digest is in the store.
    Tree(String, Stored),
    /// The listing is the one that is known; no object was read.
    Unchanged(String),
}

/// What was read of an object, by its key.
type Known = HashMap<String, (Listed, Blob)>;

/// Stores the tree of a bucket's folder. `scratch` is for large objects.
///
/// # Errors
/// With the reason for the source's conditions, and the service's own words.
pub async fn import(asked: &S3, scratch: &Path, to: &dyn Store, reporter: Arc<Reporter>) -> Result<Imported, Failure> {
    let bucket = Bucket::open(asked)?;
    let work = Work { bucket: &bucket, scratch, to, reporter: &reporter, large: Semaphore::new(LARGE) };
    let mut known = Known::new();
    let (mut pause, mut changed) = (PAUSE, String::new());
    let mut listing = bucket.list().await?;
    for _ in 0..ROUNDS {
        let digest = listing.digest();
        if asked.unless_listing.as_ref() == Some(&digest) {
            return Ok(Imported::Unchanged(digest));
        }
        if listing.is_empty() {
            // More often a slip than a wish; and who emptied a bucket by mistake keeps the revisions that are there.
            let message = format!("there is no object in {}: check spec.s3.prefix", bucket.place());
            return Err(Failure::new(Reason::Invalid, message));
        }
        let entries = listing.entries()?;
        let read = work.read(&entries, &mut known).await?;
        let again = bucket.list().await?;
        let Some(key) = read.or_else(|| listing.difference(&again).map(str::to_owned)) else {
            let built = build(&entries, &known)?;
            return Ok(Imported::Tree(digest, scan::finish(built, to, &reporter).await?));
        };
        tracing::warn!(key, "{} changed while it was read; what changed is read again", bucket.place());
        changed = key;
        listing = again;
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
    let message = format!(
        "{} changed each of the {ROUNDS} times that it was read, at last {changed:?}: import it when nobody writes to it",
        bucket.place()
    );
    Err(Failure::new(Reason::ImportFailed, message))
}

struct Work<'a> {
    bucket: &'a Bucket,
    scratch: &'a Path,
    to: &'a dyn Store,
    reporter: &'a Reporter,
    large: Semaphore,
}

impl Work<'_> {
    /// Reads what is not known and sends what the store does not have. Returns the first key that is no longer what was listed.
    async fn read(&self, entries: &Entries<'_>, known: &mut Known) -> Result<Option<String>, Failure> {
        let is_known = |object: &Listed| {
            known.get(&object.key).is_some_and(|(read, _)| read.etag == object.etag && read.size == object.size)
        };
        let wanted: Vec<&Listed> =
            entries.files.iter().map(|(_, object)| *object).filter(|object| !is_known(object)).collect();
        let total = wanted.len() as u64;
        self.reporter.progress(Phase::Scanning, 0, Some(total), 0);
        let (sender, found) = scan::found();
        let read = async move {
            let sender = &sender;
            let mut reads = stream::iter(wanted)
                .map(|object| async move { Ok::<_, Failure>((object, self.read_one(object, sender).await?)) })
                .buffer_unordered(READERS);
            let (mut files, mut bytes) = (0, 0);
            while let Some((object, content)) = reads.try_next().await? {
                let Some(content) = content else { return Ok(Some(object.key.clone())) };
                known.insert(object.key.clone(), (object.clone(), content));
                files += 1;
                bytes += content.size;
                self.reporter.progress(Phase::Scanning, files, Some(total), bytes);
            }
            Ok(None)
        };
        let (changed, uploaded) = tokio::join!(read, upload_found(found, self.to));
        uploaded.map_err(|error| Failure::other("upload to the store", error))?;
        changed
    }

    /// Reads one object and has it sent. `None`: it is not what was listed.
    async fn read_one(&self, object: &Listed, found: &Sender<Found>) -> Result<Option<Blob>, Failure> {
        if object.size == 0 {
            return Ok(Some(Blob::of(&[])));
        }
        if object.size > BATCH_BYTES {
            return self.read_large(object).await;
        }
        let Some(mut pieces) = self.bucket.read(object).await? else { return Ok(None) };
        let mut data = BytesMut::with_capacity(object.size as usize);
        while let Some(piece) = pieces.try_next().await.map_err(|error| self.bucket.broke_off(object, &error))? {
            data.extend_from_slice(&piece);
            if data.len() as u64 > object.size {
                return Ok(None);
            }
        }
        let content = Blob::of(&data);
        if content.size != object.size {
            return Ok(None);
        }
        let sent = found.send((content, Object::Bytes(data.freeze()))).await;
        sent.map_err(|_| Failure::other("read the bucket", "the upload has ended"))?;
        Ok(Some(content))
    }

    /// The same by way of a file, which goes as soon as it is sent: a bucket may be larger than the disk.
    async fn read_large(&self, object: &Listed) -> Result<Option<Blob>, Failure> {
        let _permit = self.large.acquire().await.map_err(|error| Failure::other("read a large object", error))?;
        let Some(mut pieces) = self.bucket.read(object).await? else { return Ok(None) };
        let unkept = |error: std::io::Error| Failure::other("keep a large object", error);
        let (file, path) = tempfile::NamedTempFile::new_in(self.scratch).map_err(unkept)?.into_parts();
        let mut file = tokio::fs::File::from_std(file);
        let mut hasher = BlobHasher::new();
        while let Some(piece) = pieces.try_next().await.map_err(|error| self.bucket.broke_off(object, &error))? {
            hasher.update(&piece);
            if hasher.size() > object.size {
                return Ok(None);
            }
            file.write_all(&piece).await.map_err(unkept)?;
        }
        file.flush().await.map_err(unkept)?;
        let content = hasher.finish();
        if content.size != object.size {
            return Ok(None);
        }
        let unsent = |error| Failure::other("upload to the store", error);
        if !self.to.find_missing(&[content]).await.map_err(unsent)?.is_empty() {
            self.to.write_file(content, &path).await.map_err(unsent)?;
        }
        Ok(Some(content))
    }
}

/// The tree of what was read.
fn build(entries: &Entries<'_>, known: &Known) -> Result<Built, Failure> {
    let mut root = Folder::new(Mtime::default());
    let mut counts = Counts::default();
    for (path, object) in &entries.folders {
        root.folder(path.as_bytes(), object.modified)?;
    }
    for (path, object) in &entries.files {
        let content = known[&object.key].1;
        let attributes = Attributes { mode: FILE_MODE, mtime: object.modified, ..Attributes::default() };
        root.insert(path.as_bytes(), Node::File { content, attributes, link_group: None })?;
        counts.files += 1;
        counts.bytes += content.size;
    }
    let directories = MemoryDirectories::new();
    let root = root.finish(FOLDER_MODE, &directories, &mut counts)?;
    Ok(Built { root, counts, source: FileSource { directories, files: HashMap::new() } })
}
