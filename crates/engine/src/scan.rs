//! Any directory -> a tree, by reading all of it.
//!
//! The importer uses it on a working copy; the property test uses it on a merged view, as the obviously right answer
//! to which the one computed from an upper is compared.
//!
//! Kept: names as bytes, types, modes, symbolic links, contents, modification times in nanoseconds (or one fixed time
//! for all), `user.*` xattrs, hard-link groups by (device, inode), fifos, and owners where they differ from the given
//! one. Sockets and device nodes are left out and counted. The walk never follows a symbolic link. A directory that
//! changes under the scan may come out as a mixture; contents are still what their digest says or the sink's own
//! verification fails.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use aether_cas::tree::{Attributes, Mtime, Name, Node, Owner};
use aether_cas::{Blob, Digest};
use bytes::Bytes;
use rayon::prelude::*;
use rustix::fs::{FileType, Stat};

use crate::draft::{Draft, Entry, Inode};
use crate::error::{Context, Error, Result};
use crate::walk;

/// Takes what a scan finds, so that nothing is held in memory for longer than it takes to hash it.
pub trait Sink: Sync {
    /// The content of a file, once for each distinct content that is not empty. Called from many threads at once;
    /// `file` is open for reading at an undefined position, `path` is relative to the scanned directory.
    fn content(&self, content: &Blob, path: &Path, file: &File) -> Result<()>;

    /// A directory message, after everything it refers to; the root comes last.
    fn directory(&self, blob: &Blob, message: Bytes) -> Result<()>;
}

/// How to scan.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    /// Whose files need no mention in the tree.
    pub owner: Owner,
    /// One modification time for every entry; `None` keeps what the files say.
    pub mtime: Option<Mtime>,
    /// Called now and then, from any thread, with what was hashed so far.
    pub progress: Option<&'a (dyn Fn(Progress) + Sync)>,
}

/// How far a scan is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Regular files hashed.
    pub files: u64,
    /// Regular files there are.
    pub files_total: u64,
    /// Bytes hashed.
    pub bytes: u64,
}

/// What a scan found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Names of regular files.
    pub files: u64,
    /// Directories, the root included.
    pub directories: u64,
    /// Names of symbolic links.
    pub symlinks: u64,
    /// Names of fifos.
    pub fifos: u64,
    /// Bytes in regular files, hard-linked ones once for each name.
    pub bytes: u64,
    /// Sockets and device nodes, which a tree cannot hold.
    pub skipped: u64,
}

/// A scanned directory.
#[derive(Clone, Copy, Debug)]
pub struct Scanned {
    /// Its tree.
    pub root: Blob,
    /// What is in it.
    pub counts: Counts,
}

/// A regular file still to be read.
struct Unread {
    directory: usize,
    name: Name,
    path: PathBuf,
    inode: Inode,
}

/// Reads all of `directory` and returns its tree.
///
/// # Errors
/// The first file or directory that cannot be read, or the first refusal of the sink, named by its path.
pub fn scan(directory: &Path, options: Options<'_>, sink: &dyn Sink) -> Result<Scanned> {
    let root = walk::open_root(directory)?;
    let (mut draft, unread, mut counts) = list(root.as_fd(), directory, options)?;

    let reader = Reader {
        root: root.as_fd(),
        at: directory,
        options,
        sink,
        total: unread.len() as u64,
        seen: Mutex::default(),
        files: AtomicU64::new(0),
        bytes: AtomicU64::new(0),
    };
    let read = unread.into_par_iter().map(|file| reader.read(file)).collect::<Result<Vec<_>>>()?;
    for (file, node) in read {
        counts.files += 1;
        draft.directories[file.directory].entries.insert(file.name, Entry::Leaf(node, file.inode));
    }
    counts.bytes = reader.bytes.into_inner();

    let root = draft.finish(b"", |_, blob, message| sink.directory(&blob, message))?;
    Ok(Scanned { root, counts })
}

/// Walks the hierarchy without opening a file.
fn list(root: BorrowedFd<'_>, at: &Path, options: Options<'_>) -> Result<(Draft, Vec<Unread>, Counts)> {
    let mut draft = Draft::default();
    let mut unread = Vec::new();
    let mut counts = Counts::default();
    let (stat, xattrs) = about_directory(root, at, Path::new(""))?;
    draft.add(PathBuf::new(), walk::attributes(&stat, xattrs, options.owner, options.mtime))?;
    let mut next = 0;
    // Directories found are appended, so this visits all of them and parents come first.
    while next < draft.directories.len() {
        counts.directories += 1;
        let path = draft.directories[next].path.clone();
        let context = |action, path: &Path| (action, at.join(path));
        let directory = walk::open_directory(root, &path).map_err(|e| failed(context("open directory", &path), e))?;
        let names = walk::names(directory.as_fd()).map_err(|e| failed(context("list", &path), e))?;
        for name in names {
            let below = walk::join(&path, &name);
            let stat = walk::stat(directory.as_fd(), &name).map_err(|e| failed(context("stat", &below), e))?;
            let inode = (stat.st_dev, stat.st_ino);
            let plain = || walk::attributes(&stat, Default::default(), options.owner, options.mtime);
            let name_in_tree = tree_name(&name, &at.join(&below))?;
            let entry = match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => {
                    let (stat, xattrs) = about_directory(root, at, &below)?;
                    Entry::Directory(draft.add(below, walk::attributes(&stat, xattrs, options.owner, options.mtime))?)
                }
                FileType::RegularFile => {
                    unread.push(Unread { directory: next, name: name_in_tree, path: below, inode });
                    continue;
                }
                FileType::Symlink => {
                    counts.symlinks += 1;
                    let target = walk::read_link(directory.as_fd(), &name)
                        .map_err(|e| failed(context("read the symbolic link", &below), e))?;
                    Entry::Leaf(Node::Symlink { target, attributes: plain(), link_group: None }, inode)
                }
                FileType::Fifo => {
                    counts.fifos += 1;
                    Entry::Leaf(Node::Fifo { attributes: plain(), link_group: None }, inode)
                }
                _ => {
                    counts.skipped += 1;
                    continue;
                }
            };
            draft.directories[next].entries.insert(name_in_tree, entry);
        }
        next += 1;
    }
    Ok((draft, unread, counts))
}

type Xattrs = std::collections::BTreeMap<Vec<u8>, Vec<u8>>;

/// Stat data and xattrs of a directory, from one descriptor.
fn about_directory(root: BorrowedFd<'_>, at: &Path, path: &Path) -> Result<(Stat, Xattrs)> {
    let directory = walk::open_directory(root, path).at("open directory", at.join(path))?;
    let stat = rustix::fs::fstat(&directory).at("stat", at.join(path))?;
    let xattrs = walk::xattrs(directory.as_fd()).at("read the extended attributes of", at.join(path))?;
    Ok((stat, xattrs))
}

fn failed((action, path): (&'static str, PathBuf), error: io::Error) -> Error {
    Error::io(action, path, error)
}

/// A name as a tree holds it.
pub(crate) fn tree_name(name: &[u8], path: &Path) -> Result<Name> {
    Name::new(name).map_err(|error| Error::Invalid { what: path.display().to_string(), reason: error.to_string() })
}

/// Reads files, from many threads.
struct Reader<'a> {
    root: BorrowedFd<'a>,
    at: &'a Path,
    options: Options<'a>,
    sink: &'a dyn Sink,
    total: u64,
    seen: Mutex<HashSet<Digest>>,
    files: AtomicU64,
    bytes: AtomicU64,
}

impl Reader<'_> {
    fn read(&self, file: Unread) -> Result<(Unread, Node)> {
        let path = self.at.join(&file.path);
        let open = File::from(walk::open_file(self.root, &file.path).at("open", &path)?);
        let stat = rustix::fs::fstat(&open).at("stat", &path)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Error::Invalid {
                what: path.display().to_string(),
                reason: "it stopped being a regular file while it was scanned".into(),
            });
        }
        let xattrs = walk::xattrs(open.as_fd()).at("read the extended attributes of", &path)?;
        let attributes: Attributes = walk::attributes(&stat, xattrs, self.options.owner, self.options.mtime);
        let content = Blob::of_reader(&open).at("read", &path)?;
        if content.size > 0 && self.seen.lock().expect("no holder panics").insert(content.digest) {
            self.sink.content(&content, &file.path, &open)?;
        }
        let bytes = self.bytes.fetch_add(content.size, Ordering::Relaxed) + content.size;
        let files = self.files.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some(progress) = self.options.progress {
            progress(Progress { files, files_total: self.total, bytes });
        }
        Ok((file, Node::File { content, attributes, link_group: None }))
    }
}
