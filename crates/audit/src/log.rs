//! Where the log is kept: segments as files of one tree in the store, the root of which one pin holds.
//!
//! Appending writes the newest segment anew, then the directory, then moves the pin. Killed in between, the log is what it was
//! before. Segments that are full are never written again. There is one writer at a time: the operator's leader.

use aether_cas::tree::{Attributes, Directory, Name, Node};
use aether_cas::{Blob, Store, StoreError};
use bytes::Bytes;

use crate::chain::{self, Broken, Entry, Head, Verifier};

/// A segment of this size takes no more lines.
const FULL: usize = 256 << 10;

/// What holds the newest root of the log, as a pin under one owner does.
#[async_trait::async_trait]
pub trait Anchor: Send + Sync {
    /// The root that is held; `None` before the first line.
    async fn newest(&self) -> Result<Option<Blob>, String>;

    /// Holds `root` instead. When this returns, `newest` says so to everybody, and the store keeps all below it.
    async fn hold(&self, root: Blob) -> Result<(), String>;
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store failed, or lacks a part of the log.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The newest root cannot be had or held.
    #[error("the root of the audit log: {0}")]
    Anchor(String),
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
    /// What holds the newest root.
    pub anchor: &'a dyn Anchor,
}

impl Log<'_> {
    /// Writes these behind what is there, but not those that the newest segment tells of already: whoever writes may have been
    /// killed before it knew that it had. The new end.
    ///
    /// # Errors
    /// See [`Error`]; then nothing was written.
    pub async fn append(&self, entries: &[Entry]) -> Result<Head, Error> {
        let newest = self.anchor.newest().await.map_err(Error::Anchor)?;
        let mut tree = match newest {
            Some(root) => self.tree(root).await?,
            None => Directory { attributes: attributes(0o755), entries: Default::default() },
        };
        let (mut segment, mut head, mut told) = match tree.entries.last_key_value() {
            None => (Vec::new(), Head::EMPTY, Vec::new()),
            Some((_, node)) => {
                let segment = self.store.read(content(node)?).await?.to_vec();
                let (head, told) = chain::tail(&segment)?;
                (segment, head, told)
            }
        };
        let mut number = tree.entries.len().max(1);
        let mut changed = false;
        for entry in entries {
            if told.iter().any(|other| other.repeats(entry)) {
                continue;
            }
            if segment.len() >= FULL {
                self.put(&mut tree, number, &segment).await?;
                number += 1;
                segment.clear();
            }
            head = chain::append(&mut segment, head, entry)?;
            told.push(entry.clone());
            changed = true;
        }
        if changed {
            self.put(&mut tree, number, &segment).await?;
            let root = tree.blob();
            self.store.write(root, tree.encode()).await?;
            self.anchor.hold(root).await.map_err(Error::Anchor)?;
        }
        Ok(head)
    }

    /// Reads all of it, and checks that it is one chain which passes these heads. `each` sees the entries, oldest first.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn verify(
        &self,
        heads: impl IntoIterator<Item = Head>,
        mut each: impl FnMut(Entry),
    ) -> Result<Head, Error> {
        let mut verifier = Verifier::awaiting(heads);
        if let Some(root) = self.anchor.newest().await.map_err(Error::Anchor)? {
            for node in self.tree(root).await?.entries.values() {
                let segment = self.store.read(content(node)?).await?;
                verifier.segment(&segment)?.into_iter().for_each(&mut each);
            }
        }
        Ok(verifier.end()?)
    }

    /// The directory of the segments, whose names are their numbers.
    async fn tree(&self, root: Blob) -> Result<Directory, Error> {
        let data = self.store.read(root).await?;
        let tree = Directory::decode(&data).map_err(|_| Error::Foreign(root))?;
        let named = tree.entries.keys().zip(1..).all(|(name, number)| name.as_bytes() == text(number).as_bytes());
        if named { Ok(tree) } else { Err(Error::Foreign(root)) }
    }

    async fn put(&self, tree: &mut Directory, number: usize, segment: &[u8]) -> Result<(), Error> {
        let content = Blob::of(segment);
        self.store.write(content, Bytes::copy_from_slice(segment)).await?;
        let node = Node::File { content, attributes: attributes(0o644), link_group: None };
        let name = Name::new(text(number)).map_err(|error| StoreError::Invalid(error.to_string()))?;
        tree.entries.insert(name, node);
        Ok(())
    }
}

/// The name of a segment: names in a tree are in the order of their bytes, and so in that of their numbers.
fn text(number: usize) -> String {
    format!("{number:010}.jsonl")
}

fn content(node: &Node) -> Result<Blob, Error> {
    node.content().ok_or_else(|| Error::Store(StoreError::Invalid("a segment of the audit log is no file".into())))
}

fn attributes(mode: u32) -> Attributes {
    Attributes { mode, ..Attributes::default() }
}
