//! Directories that are put together from paths.

use std::collections::BTreeMap;

use aether_cas::Blob;
use aether_cas::tree::{Attributes, Directory, MAX_DEPTH, MemoryDirectories, Mtime, Name, Node};
use aether_engine::scan::Counts;

use crate::failure::{Failure, Reason};

/// A directory that is not encoded yet.
pub(crate) struct Folder {
    mtime: Mtime,
    folders: BTreeMap<Name, Folder>,
    files: BTreeMap<Name, Node>,
}

impl Folder {
    /// An empty one.
    pub(crate) fn new(mtime: Mtime) -> Self {
        Self { mtime, folders: BTreeMap::new(), files: BTreeMap::new() }
    }

    /// The folder at this path below, made if it is not there. No folder on the way is older than `mtime`.
    pub(crate) fn folder(&mut self, path: &[u8], mtime: Mtime) -> Result<&mut Self, Failure> {
        self.descend(path.split(|byte| *byte == b'/'), mtime)
    }

    fn descend<'a>(&mut self, path: impl Iterator<Item = &'a [u8]>, mtime: Mtime) -> Result<&mut Self, Failure> {
        self.mtime = self.mtime.max(mtime);
        path.enumerate().try_fold(self, |folder, (depth, part)| {
            if depth + 2 >= MAX_DEPTH {
                return Err(invalid(format!("directories are nested more than {MAX_DEPTH} deep")));
            }
            let below = folder.folders.entry(name(part)?).or_insert_with(|| Self::new(mtime));
            below.mtime = below.mtime.max(mtime);
            Ok(below)
        })
    }

    /// Puts a node at this path below. No folder on the way is older than it.
    pub(crate) fn insert(&mut self, path: &[u8], node: Node) -> Result<(), Failure> {
        let mtime = node.attributes().map_or(self.mtime, |attributes| attributes.mtime);
        let mut parts = path.split(|byte| *byte == b'/');
        let last = name(parts.next_back().unwrap_or_default())?;
        self.descend(parts, mtime)?.files.insert(last, node);
        Ok(())
    }

    /// Encodes the folder and all below it.
    pub(crate) fn finish(self, mode: u32, into: &MemoryDirectories, counts: &mut Counts) -> Result<Blob, Failure> {
        counts.directories += 1;
        let attributes = Attributes { mode, mtime: self.mtime, ..Attributes::default() };
        let mut directory = Directory { attributes, entries: self.files };
        for (name, below) in self.folders {
            let below = below.finish(mode, into, counts)?;
            if directory.entries.insert(name.clone(), Node::Directory(below)).is_some() {
                return Err(invalid(format!("there is both a file and a directory of the name {name}")));
            }
        }
        directory.check().map_err(|error| invalid(error.to_string()))?;
        Ok(into.insert(directory))
    }
}

/// What may be the name of an entry.
pub(crate) fn name(bytes: &[u8]) -> Result<Name, Failure> {
    Name::new(bytes)
        .map_err(|error| invalid(format!("{:?} cannot be the name of a file: {error}", String::from_utf8_lossy(bytes))))
}

fn invalid(message: String) -> Failure {
    Failure::new(Reason::Invalid, message)
}
