//! The text of a `git fast-import` stream (git-fast-import(1)): two branches, `base` and `head`, each one commit that
//! holds one side of the changed paths.
//!
//! The stream says `feature done` first and `done` last, so that git refuses one that was cut off.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use aether_cas::transfer::{batches, read_batch};
use aether_cas::{Blob, Store, StoreError, tree};
use bytes::{Bytes, BytesMut};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::changes::{Changes, Entry, Object};

/// Contents up to this size are read into memory, as many at a time as fit a message; larger ones pass through a file.
const SMALL: u64 = 256 << 10;
/// Pieces in which large contents are sent, in bytes.
const PIECE: usize = 256 << 10;

/// Why a stream broke off.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A content cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The spool folder failed.
    #[error("cannot use the spool folder")]
    Spool(#[from] std::io::Error),
    /// Nobody reads any more.
    #[error("the reader has gone away")]
    Gone,
    /// Somebody reads, but has taken nothing for too long.
    #[error("the reader has taken nothing for {} s", patience.as_secs())]
    Stalled {
        /// How long is too long.
        patience: Duration,
    },
}

/// Where a stream goes, piece by piece. Its capacity bounds what is in memory.
pub type Pieces = mpsc::Sender<Bytes>;

/// What the two commits are called.
#[derive(Clone, Debug)]
pub struct Titles {
    /// The old side.
    pub base: String,
    /// The new side.
    pub head: String,
}

/// Where contents pass through, and how long a reader may take.
#[derive(Clone, Copy, Debug)]
pub struct Transfer<'a> {
    /// The folder for contents that are too large for memory; the system's own when absent.
    pub spool: Option<&'a std::path::Path>,
    /// How long one piece may wait for the reader.
    pub patience: Duration,
}

/// Writes the stream of `changes`. On an error the stream lacks its end, which git notices.
///
/// # Errors
/// See [`Error`].
pub async fn write(
    store: Arc<dyn Store>,
    changes: &Changes,
    titles: &Titles,
    transfer: Transfer<'_>,
    out: &Pieces,
) -> Result<(), Error> {
    let mut writer = Writer { out, patience: transfer.patience, text: BytesMut::new(), marks: 0 };
    writer.text.extend_from_slice(b"feature done\n");
    let files = writer.files(&*store, &changes.contents(), transfer.spool).await?;
    let mut targets = HashMap::new();
    for (name, title, side) in [("base", &titles.base, &changes.base), ("head", &titles.head, &changes.head)] {
        for entry in side {
            if let Object::Symlink(target) = &entry.object
                && !targets.contains_key(target)
            {
                let mark = writer.blob(Bytes::copy_from_slice(target)).await?;
                targets.insert(target, mark);
            }
        }
        writer
            .commit(name, title, side, |entry| match &entry.object {
                Object::File { content, executable } => (if *executable { "100755" } else { "100644" }, files[content]),
                Object::Symlink(target) => ("120000", targets[target]),
            })
            .await?;
    }
    writer.text.extend_from_slice(b"done\n");
    writer.flush().await
}

struct Writer<'a> {
    out: &'a Pieces,
    patience: Duration,
    text: BytesMut,
    marks: u64,
}

impl Writer<'_> {
    /// Sends all contents; the result is the mark of each.
    async fn files(
        &mut self,
        store: &dyn Store,
        contents: &[Blob],
        spool: Option<&std::path::Path>,
    ) -> Result<HashMap<Blob, u64>, Error> {
        let mut marks = HashMap::with_capacity(contents.len());
        let (small, large): (Vec<Blob>, Vec<Blob>) = contents.iter().partition(|blob| blob.size <= SMALL);
        for batch in batches(small) {
            for (blob, data) in read_batch(batch, store).await? {
                marks.insert(blob, self.blob(data).await?);
            }
        }
        if large.is_empty() {
            return Ok(marks);
        }
        let folder = match spool {
            Some(spool) => TempDir::new_in(spool)?,
            None => TempDir::new()?,
        };
        for blob in large {
            let path = folder.path().join("content");
            // Verified before the first byte of it leaves.
            store.fetch_to(blob, &path).await?;
            let mark = self.header(blob.size);
            self.flush().await?;
            let mut file = tokio::fs::File::open(&path).await?;
            // An open file needs no name, and the next one gets the same.
            tokio::fs::remove_file(&path).await?;
            let mut left = blob.size;
            while left > 0 {
                let mut piece = BytesMut::with_capacity(PIECE.min(usize::try_from(left).unwrap_or(PIECE)));
                if file.read_buf(&mut piece).await? == 0 {
                    return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
                }
                left = left.saturating_sub(piece.len() as u64);
                self.send(piece.freeze()).await?;
            }
            self.text.extend_from_slice(b"\n");
            marks.insert(blob, mark);
        }
        Ok(marks)
    }

    /// Sends one content; the result is its mark.
    async fn blob(&mut self, data: Bytes) -> Result<u64, Error> {
        let mark = self.header(data.len() as u64);
        self.flush().await?;
        self.send(data).await?;
        self.text.extend_from_slice(b"\n");
        Ok(mark)
    }

    fn header(&mut self, size: u64) -> u64 {
        self.marks += 1;
        self.text.extend_from_slice(format!("blob\nmark :{}\ndata {size}\n", self.marks).as_bytes());
        self.marks
    }

    async fn commit(
        &mut self,
        branch: &str,
        title: &str,
        side: &[Entry],
        object: impl Fn(&Entry) -> (&'static str, u64),
    ) -> Result<(), Error> {
        let head = format!(
            "commit refs/heads/{branch}\ncommitter Aether <aether@aether.dev> 0 +0000\ndata {}\n{title}\n",
            title.len()
        );
        self.text.extend_from_slice(head.as_bytes());
        for entry in side {
            let (mode, mark) = object(entry);
            self.text.extend_from_slice(format!("M {mode} :{mark} ").as_bytes());
            quote(&entry.path, &mut self.text);
            self.text.extend_from_slice(b"\n");
            if self.text.len() > PIECE {
                self.flush().await?;
            }
        }
        self.text.extend_from_slice(b"\n");
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), Error> {
        let text = self.text.split().freeze();
        self.send(text).await
    }

    async fn send(&self, data: Bytes) -> Result<(), Error> {
        if data.is_empty() {
            return Ok(());
        }
        match timeout(self.patience, self.out.send(data)).await {
            Ok(sent) => sent.map_err(|_| Error::Gone),
            Err(_) => Err(Error::Stalled { patience: self.patience }),
        }
    }
}

/// A path as the stream wants it: as it is, or in C's quotes with octal escapes when it has bytes that are not plain.
fn quote(path: &[u8], out: &mut BytesMut) {
    if path.iter().all(|byte| matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\\')) {
        out.extend_from_slice(path);
        return;
    }
    out.extend_from_slice(b"\"");
    for &byte in path {
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            b' '..=b'~' => out.extend_from_slice(&[byte]),
            _ => out.extend_from_slice(format!("\\{byte:03o}").as_bytes()),
        }
    }
    out.extend_from_slice(b"\"");
}

/// What is read before a stream begins, so that a missing content is an error and not a broken stream.
///
/// # Errors
/// The first content that the store lacks, or the store's own.
pub async fn require(store: &dyn Store, contents: &[Blob]) -> Result<(), StoreError> {
    /// Blobs that are asked for in one call.
    const ASK: usize = 16 * 1024;
    for some in contents.chunks(ASK) {
        if let Some(blob) = store.find_missing(some).await?.first() {
            return Err(StoreError::NotFound { blob: *blob, store: "the store".into() });
        }
    }
    Ok(())
}

/// The blob of a tree as status fields write it.
///
/// # Errors
/// A sentence that names the text.
pub fn root(text: &str) -> Result<Blob, String> {
    let blob: Blob = text.parse().map_err(|error: aether_cas::digest::ParseDigestError| error.to_string())?;
    if blob.size > tree::MAX_DIRECTORY_BYTES as u64 {
        return Err(format!("{text} is larger than a directory can be"));
    }
    Ok(blob)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_quoted_only_when_they_must_be() {
        for (path, quoted) in [
            (&b"src/main.rs"[..], "src/main.rs"),
            (b"with space", "with space"),
            (b" leading", " leading"),
            (b"a\nb", r#""a\012b""#),
            (b"quote\"s", r#""quote\"s""#),
            (b"back\\slash", r#""back\\slash""#),
            (b"caf\xe9", r#""caf\351""#),
        ] {
            let mut out = BytesMut::new();
            quote(path, &mut out);
            assert_eq!(out, quoted.as_bytes());
        }
    }

    #[tokio::test]
    async fn a_reader_that_takes_nothing_is_given_up() {
        let store = aether_cas::MemoryStore::default();
        let object = Object::File { content: store.put(&b"contents"[..]), executable: false };
        let changes = Changes { base: Vec::new(), head: vec![Entry { path: b"a".to_vec(), object }] };
        let titles = Titles { base: "base".into(), head: "head".into() };
        let (out, _nobody_reads) = mpsc::channel(1);
        let transfer = Transfer { spool: None, patience: Duration::from_millis(10) };
        let written = write(Arc::new(store), &changes, &titles, transfer, &out).await;
        assert!(matches!(written, Err(Error::Stalled { .. })), "{written:?}");
    }
}
