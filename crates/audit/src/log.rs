//! Where the log is kept: segments as files of one tree in the store, and beside it an anchor that says which tree, and with which
//! line it ends.
//!
//! Appending writes the newest segment anew, then the directory, then moves the anchor. Killed in between, the log is what it was
//! before. Segments that are full are never written again. Of several writers at a time one moves the anchor, and the others
//! begin again with what it holds then, so that no line is lost and none is written twice.
//!
//! What full segments tell is remembered by whoever writes more than once ([`Memory`]), so that a line costs as much in a long log as in
//! a short one.
//!
//! The anchor has the end of the chain beside the tree: whoever can exchange one of them, but not both, is found out.

use std::collections::BTreeMap;
use std::sync::Arc;

use aether_cas::tree::{Attributes, Directory, Mtime, Name, Node};
use aether_cas::{Blob, Store, StoreError};
use bytes::Bytes;
use jiff::Timestamp;

use crate::chain::{self, Broken, Entry, Head, TooLong, Verifier};
use crate::memory::{Known, Memory};

/// A segment of this size takes no more lines.
const FULL: usize = 256 << 10;
/// How often a writer begins again because another was faster. Each time one of them has written something.
const ATTEMPTS: usize = 256;

/// What an anchor holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Where the log ends.
    pub head: Head,
    /// The tree of its segments; `None` before the first line.
    pub root: Option<Blob>,
    /// By which the anchor knows whether it was moved since; `None` before it was ever moved.
    pub version: Option<String>,
}

/// The fields of what is held, as text.
const ROOT: &str = "root";
const LINES: &str = "lines";
const HASH: &str = "hash";

impl Held {
    /// Before the first line.
    pub const NOTHING: Self = Self { head: Head::EMPTY, root: None, version: None };

    /// As fields of text: `root`, `lines` and `hash`.
    pub fn fields(head: Head, root: Blob) -> BTreeMap<String, String> {
        let fields = [(ROOT, root.to_string()), (LINES, head.count.to_string()), (HASH, head.hash.to_string())];
        fields.map(|(name, text)| (name.to_owned(), text)).into()
    }

    /// What such fields say; `None` when they make no sense.
    pub fn read(fields: &BTreeMap<String, String>, version: Option<String>) -> Option<Self> {
        let head = Head { count: fields.get(LINES)?.parse().ok()?, hash: fields.get(HASH)?.parse().ok()? };
        Some(Self { head, root: Some(fields.get(ROOT)?.parse().ok()?), version })
    }
}

/// What was held once, for those who only read: whatever is written meanwhile.
pub struct Seen(pub Held);

#[async_trait::async_trait]
impl Anchor for Seen {
    async fn newest(&self) -> Result<Held, String> {
        Ok(self.0.clone())
    }

    async fn hold(&self, _: &Held, _: Head, _: Blob) -> Result<(), Refusal> {
        Err(Refusal::Failed("this only reads".into()))
    }
}

/// Why an anchor was not moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Somebody else has moved it since it was looked at.
    Conflict,
    /// It cannot be moved, or it is not known whether it was.
    Failed(String),
}

/// What holds the end of the log, for all writers.
#[async_trait::async_trait]
pub trait Anchor: Send + Sync {
    /// What is held.
    async fn newest(&self) -> Result<Held, String>;

    /// Holds this instead of `before`, if that is still held. When this returns, `newest` says so to everybody, and the store
    /// keeps all below the root.
    async fn hold(&self, before: &Held, head: Head, root: Blob) -> Result<(), Refusal>;
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store failed, or lacks a part of the log.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The end of the log cannot be had or held.
    #[error("the end of the audit log: {0}")]
    Anchor(String),
    /// Others wrote all the time.
    #[error("the end of the audit log was moved by others {ATTEMPTS} times")]
    Busy,
    /// What is to be written is more than a line.
    #[error(transparent)]
    TooLong(#[from] TooLong),
    /// The log is no chain.
    #[error("the audit log is broken: {0}")]
    Broken(#[from] Broken),
    /// The tree is none of an audit log.
    #[error("{0} is no audit log")]
    Foreign(Blob),
}

/// The log in a store.
pub struct Log<'a> {
    /// Where the segments are.
    pub store: &'a dyn Store,
    /// What holds the end.
    pub anchor: &'a dyn Anchor,
}

/// The newest segment.
struct Tail {
    number: usize,
    text: Vec<u8>,
    /// The newest time of its lines.
    latest: Timestamp,
}

impl Log<'_> {
    /// Writes these behind what is there, but not those that the log tells of already: whoever writes may have been killed before
    /// it knew that it had. None of them was written before `since`. The new end. What is read on the way stays in `memory`, also when
    /// nobody waits for the end.
    ///
    /// # Errors
    /// See [`Error`]; then nothing was written, except that this is not known when the anchor failed.
    pub async fn append(&self, entries: &[Entry], since: Timestamp, memory: &Memory) -> Result<Head, Error> {
        let since = entries.iter().map(|entry| entry.time).fold(since, Timestamp::min);
        for _ in 0..ATTEMPTS {
            let held = self.anchor.newest().await.map_err(Error::Anchor)?;
            let Some((head, root)) = self.prepare(&held, entries, since, memory).await? else { return Ok(held.head) };
            match self.anchor.hold(&held, head, root).await {
                Ok(()) => return Ok(head),
                Err(Refusal::Conflict) => {}
                Err(Refusal::Failed(why)) => return Err(Error::Anchor(why)),
            }
        }
        Err(Error::Busy)
    }

    /// Stores what the log is with these entries; `None` when it tells of them all.
    async fn prepare(
        &self,
        held: &Held,
        entries: &[Entry],
        since: Timestamp,
        memory: &Memory,
    ) -> Result<Option<(Head, Blob)>, Error> {
        let mut tree = match held.root {
            Some(root) => self.tree(root).await?,
            None => Directory { attributes: attributes(0o755, Mtime::default()), entries: Default::default() },
        };
        let (mut tail, mut head, told) = self.newest_segment(&tree).await?;
        agrees(held.head, head)?;
        let mut fresh: Vec<&Entry> = Vec::new();
        for entry in entries {
            if !told.iter().chain(fresh.iter().copied()).any(|other| other.repeats(entry)) {
                fresh.push(entry);
            }
        }
        for (number, node) in tree.entries.values().enumerate().rev().skip(1) {
            if fresh.is_empty() || is_older(node, since) {
                break;
            }
            let known = self.full(number, node, memory).await?;
            fresh.retain(|entry| !known.tells(entry));
        }
        if fresh.is_empty() {
            return Ok(None);
        }
        for entry in fresh {
            if tail.text.len() >= FULL {
                self.put(&mut tree, &tail).await?;
                tail = Tail { number: tail.number + 1, text: Vec::new(), latest: Timestamp::MIN };
            }
            head = chain::append(&mut tail.text, head, entry)?;
            tail.latest = tail.latest.max(entry.time);
        }
        self.put(&mut tree, &tail).await?;
        let root = tree.blob();
        self.store.write(root, tree.encode()).await?;
        Ok(Some((head, root)))
    }

    /// Reads all of it, and checks that it is one chain which passes these heads and ends where the anchor says. `each` sees the
    /// entries, oldest first.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn verify(
        &self,
        heads: impl IntoIterator<Item = Head>,
        mut each: impl FnMut(Entry),
    ) -> Result<Head, Error> {
        let held = self.anchor.newest().await.map_err(Error::Anchor)?;
        let mut verifier = Verifier::awaiting(heads.into_iter().chain([held.head]));
        if let Some(root) = held.root {
            for node in self.tree(root).await?.entries.values() {
                let segment = self.store.read(content(node)?).await?;
                verifier.segment(&segment)?.into_iter().for_each(&mut each);
            }
        }
        let end = verifier.end()?;
        agrees(held.head, end)?;
        Ok(end)
    }

    /// Shows `each` the entries that were written since then, oldest first, and maybe some before. Where the log begins is not
    /// checked.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn since(&self, since: Timestamp, mut each: impl FnMut(Entry)) -> Result<(), Error> {
        let held = self.anchor.newest().await.map_err(Error::Anchor)?;
        let Some(root) = held.root else { return Ok(()) };
        let tree = self.tree(root).await?;
        let segments = tree.entries.len();
        let old = tree.entries.values().rev().skip(1).position(|node| is_older(node, since));
        let skipped = old.map_or(0, |newer| segments - 1 - newer);
        let mut end = None;
        for node in tree.entries.values().skip(skipped) {
            let (begin, head, told) = chain::tail(&self.store.read(content(node)?).await?)?;
            follows(begin, end.unwrap_or(begin))?;
            end = Some(head);
            told.into_iter().for_each(&mut each);
        }
        Ok(agrees(held.head, end.unwrap_or(Head::EMPTY))?)
    }

    /// Shows `each` what was said of commits since then, oldest first, and maybe some before. Where the log begins is not checked.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn decisions(
        &self,
        since: Timestamp,
        memory: &Memory,
        mut each: impl FnMut(&Entry),
    ) -> Result<(), Error> {
        let held = self.anchor.newest().await.map_err(Error::Anchor)?;
        let Some(root) = held.root else { return Ok(()) };
        let tree = self.tree(root).await?;
        let Some(newest) = tree.entries.values().next_back() else { return Ok(agrees(held.head, Head::EMPTY)?) };
        // The newest grows, and is read each time.
        let mut known = vec![Arc::new(Known::of(&self.store.read(content(newest)?).await?)?)];
        agrees(held.head, known[0].end)?;
        for (number, node) in tree.entries.values().enumerate().rev().skip(1) {
            if is_older(node, since) {
                break;
            }
            let earlier = self.full(number, node, memory).await?;
            follows(known[known.len() - 1].begin, earlier.end)?;
            known.push(earlier);
        }
        known.iter().rev().flat_map(|known| &known.decisions).for_each(&mut each);
        Ok(())
    }

    /// What a full segment tells.
    async fn full(&self, number: usize, node: &Node, memory: &Memory) -> Result<Arc<Known>, Error> {
        let blob = content(node)?;
        if let Some(known) = memory.get(number, blob) {
            return Ok(known);
        }
        let known = Arc::new(Known::of(&self.store.read(blob).await?)?);
        memory.keep(number, blob, known.clone());
        Ok(known)
    }

    /// The newest segment, the end of the log by its word, and what it tells.
    async fn newest_segment(&self, tree: &Directory) -> Result<(Tail, Head, Vec<Entry>), Error> {
        let Some((_, node)) = tree.entries.last_key_value() else {
            return Ok((Tail { number: 1, text: Vec::new(), latest: Timestamp::MIN }, Head::EMPTY, Vec::new()));
        };
        let text = self.store.read(content(node)?).await?.to_vec();
        let (_, head, told) = chain::tail(&text)?;
        let latest = told.iter().map(|entry| entry.time).fold(Timestamp::MIN, Timestamp::max);
        Ok((Tail { number: tree.entries.len(), text, latest }, head, told))
    }

    /// The directory of the segments, whose names are their numbers.
    async fn tree(&self, root: Blob) -> Result<Directory, Error> {
        let data = self.store.read(root).await?;
        let tree = Directory::decode(&data).map_err(|_| Error::Foreign(root))?;
        let named = tree.entries.keys().zip(1..).all(|(name, number)| name.as_bytes() == text(number).as_bytes());
        if named { Ok(tree) } else { Err(Error::Foreign(root)) }
    }

    async fn put(&self, tree: &mut Directory, segment: &Tail) -> Result<(), Error> {
        let content = Blob::of(&segment.text);
        self.store.write(content, Bytes::copy_from_slice(&segment.text)).await?;
        let node = Node::File { content, attributes: attributes(0o644, mtime(segment.latest)), link_group: None };
        let name = Name::new(text(segment.number)).map_err(|error| StoreError::Invalid(error.to_string()))?;
        tree.entries.insert(name, node);
        Ok(())
    }
}

/// Whether all lines of a segment are older, so that it tells of nothing since then.
fn is_older(segment: &Node, since: Timestamp) -> bool {
    segment.attributes().is_some_and(|of| of.mtime < mtime(since))
}

/// Whether a segment begins where the one before it ends.
fn follows(begin: Head, end: Head) -> Result<(), Broken> {
    let broken = Broken { line: begin.count + 1, problem: "it does not follow from the segment before it" };
    if begin == end { Ok(()) } else { Err(broken) }
}

/// Whether the log ends where the anchor says.
fn agrees(held: Head, found: Head) -> Result<(), Broken> {
    let broken = |line, problem| Err(Broken { line, problem });
    if held.count < found.count {
        return broken(held.count + 1, "it is behind the end that is written down in the cluster");
    }
    if held.count > found.count {
        return broken(found.count + 1, "it is missing: the end that is written down in the cluster is behind it");
    }
    if held.hash == found.hash {
        Ok(())
    } else {
        broken(found.count, "it is another than is written down in the cluster")
    }
}

/// The name of a segment: names in a tree are in the order of their bytes, and so in that of their numbers.
fn text(number: usize) -> String {
    format!("{number:010}.jsonl")
}

fn content(node: &Node) -> Result<Blob, Error> {
    node.content().ok_or_else(|| Error::Store(StoreError::Invalid("a segment of the audit log is no file".into())))
}

fn attributes(mode: u32, mtime: Mtime) -> Attributes {
    Attributes { mode, mtime, ..Attributes::default() }
}

/// Rounded down, so that no line is newer than its segment by less than a second.
fn mtime(time: Timestamp) -> Mtime {
    Mtime { seconds: time.as_second(), nanos: 0 }
}
