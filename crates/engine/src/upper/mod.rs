//! An upper -> the tree of what the session shows.
//!
//! Walks the upper with the image's tree beside it. The cost follows what is in the upper: a subtree of the image that
//! the upper does not mention is taken over as one digest without being read, and a moved directory costs its own
//! message. What the marks in the upper mean is in [`interpretation`]; this module owns the walk.
//!
//! Promise: for an upper that nobody writes to, the tree equals what [`crate::scan`] reads through the merged view,
//! except for the names of hard-link groups, and that a group of the image stays named in members whose fellows have
//! been copied up ([`aether_cas::tree::same_tree`] compares accordingly).

pub mod interpretation;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use aether_cas::tree::{Directories, Directory, Name, Node, Owner};
use aether_cas::{Blob, Digest};
use bytes::Bytes;
use rayon::prelude::*;
use rustix::fs::{FileType, Stat};

pub use interpretation::Interpretation;
use interpretation::{Marks, Origin, Shown};

use crate::draft::{Draft, Entry, Inode};
use crate::error::{Context, Error, Result};
use crate::{scan, walk};

const OPAQUE: &[u8] = b"trusted.overlay.opaque";
const REDIRECT: &[u8] = b"trusted.overlay.redirect";
const METACOPY: &[u8] = b"trusted.overlay.metacopy";

/// A file changed more recently than this before the snapshot is not remembered in the stat cache: the kernel's coarse
/// clock may give a later change of the same size the same times. Ten ticks of the slowest kernel clock (100 Hz).
const RACY: Duration = Duration::from_millis(100);

/// Remembers digests by stat data, so that an unchanged file is not read again at the next checkpoint.
///
/// Inode numbers mean something only within one session: forks give the same numbers to different files in the same
/// instant. An implementation therefore belongs to one session.
pub trait StatCache: Sync {
    /// What is known of the file that had this stat data.
    fn get(&self, key: &StatKey) -> Option<Known>;
    /// Remembers it.
    fn put(&self, key: &StatKey, known: Known);
}

/// What is remembered of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Digest of its content.
    pub digest: Digest,
    /// It has no extended attribute that counts, so its stat data says the rest and it need not be opened. (Setting one
    /// changes the change time.)
    pub plain: bool,
}

/// What identifies an unchanged file in a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct StatKey {
    /// Inode number.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// Modification time: seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Change time, which no caller can set: seconds and nanoseconds.
    pub ctime: (i64, u32),
}

impl StatKey {
    fn of(stat: &Stat) -> Self {
        Self {
            inode: stat.st_ino,
            size: stat.st_size as u64,
            mtime: (stat.st_mtime, stat.st_mtime_nsec as u32),
            ctime: (stat.st_ctime, stat.st_ctime_nsec as u32),
        }
    }
}

/// A stat cache that remembers nothing.
pub struct NoCache;

impl StatCache for NoCache {
    fn get(&self, _: &StatKey) -> Option<Known> {
        None
    }
    fn put(&self, _: &StatKey, _: Known) {}
}

/// An upper and what it lies on.
pub struct Upper<'a> {
    /// The upper directory of a snapshot, or of a session that is not mounted. Nothing may write to it.
    pub path: &'a Path,
    /// Root of the image's tree.
    pub lower: Blob,
    /// Whose files need no mention in a tree: the owner that the image was made for.
    pub owner: Owner,
    /// Reads messages of the image's tree.
    pub directories: &'a dyn Directories,
    /// Digests of files that have not changed since an earlier digest of this session.
    pub cache: &'a dyn StatCache,
    /// When the snapshot was taken.
    pub taken: SystemTime,
    /// How the kernel's marks are read.
    pub interpretation: Interpretation,
}

/// The tree of an upper, and what is needed to store it.
#[derive(Debug)]
pub struct Tree {
    /// Root of the tree.
    pub root: Blob,
    /// Messages that differ from those of the lower directory they replace, children before parents, root last.
    pub directories: Vec<(Blob, Bytes)>,
    /// Every distinct content in the upper that is not empty, and a file beneath the upper that has it.
    pub contents: Vec<(Blob, PathBuf)>,
    /// How much that is.
    pub counts: Counts,
}

/// How much an upper changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Names of files, symbolic links and fifos that the upper has: new, written, moved or changed in attributes.
    pub changed: u64,
    /// Names that the upper takes away from the image (a file moved away counts here, and as changed where it is now).
    pub deleted: u64,
    /// Directories that the upper mentions, its root included.
    pub directories: u64,
    /// Bytes of contents in the upper, a hard-linked file once.
    pub own_bytes: u64,
    /// Files that had to be opened; the others were recognised by their stat data alone.
    pub opened: u64,
    /// Of those, files that had to be read.
    pub read: u64,
    /// Sockets and device nodes, which a tree cannot hold.
    pub skipped: u64,
}

/// A regular file of the upper, still to be understood.
struct Unread {
    directory: usize,
    name: Name,
    path: PathBuf,
    inode: Inode,
    stat: Stat,
}

/// What became of it.
struct Understood {
    node: Node,
    /// Its content, if that is in the upper.
    own: Option<Blob>,
    opened: bool,
    read: bool,
}

impl Upper<'_> {
    /// Computes the tree.
    ///
    /// # Errors
    /// `Io` names the file of the upper that could not be read; `Damaged` names a file whose content the upper says is
    /// in the image, where it is not; `Store` where a message of the image's tree cannot be had.
    pub fn tree(&self) -> Result<Tree> {
        let root = walk::open_root(self.path)?;
        let mut walked = self.walk(root.as_fd())?;
        let mut counts = walked.counts;

        let hashed = Mutex::default();
        let understood = std::mem::take(&mut walked.unread)
            .into_par_iter()
            .map(|file| self.understand(root.as_fd(), &walked.lowers, &hashed, &file).map(|found| (file, found)))
            .collect::<Result<Vec<_>>>()?;

        let mut contents = Vec::new();
        let (mut digests, mut inodes) = (HashSet::new(), HashSet::new());
        for (file, found) in understood {
            counts.changed += 1;
            counts.opened += u64::from(found.opened);
            counts.read += u64::from(found.read);
            if let Some(content) = found.own {
                if inodes.insert(file.inode) {
                    counts.own_bytes += content.size;
                }
                if content.size > 0 && digests.insert(content.digest) {
                    contents.push((content, file.path));
                }
            }
            walked.draft.directories[file.directory].entries.insert(file.name, Entry::Leaf(found.node, file.inode));
        }

        let lower: HashSet<Blob> = walked.lowers.iter().flatten().map(|lower| lower.blob).collect();
        let mut directories = Vec::new();
        let root = walked.draft.finish(&self.lower.digest.0, |_, blob, message| {
            if !lower.contains(&blob) {
                directories.push((blob, message));
            }
            Ok(())
        })?;
        Ok(Tree { root, directories, contents, counts })
    }

    /// Walks the directories of the upper and everything in them but the contents of files.
    fn walk(&self, root: BorrowedFd<'_>) -> Result<Walked> {
        let mut walked = Walked::default();
        walked.add(self.directory(root, PathBuf::new(), |_| Ok(Some(self.lower)))?)?;
        let mut next = 0;
        // Directories found are appended, so this visits all of them and parents come first.
        while next < walked.draft.directories.len() {
            self.entries(root, next, &mut walked)?;
            next += 1;
        }
        Ok(walked)
    }

    fn entries(&self, root: BorrowedFd<'_>, number: usize, walked: &mut Walked) -> Result<()> {
        let path = walked.draft.directories[number].path.clone();
        let lower = walked.lowers[number].clone();
        let at = self.path.join(&path);
        let directory = walk::open_directory(root, &path).at("open directory", &at)?;
        walked.counts.directories += 1;
        for name in walk::names(directory.as_fd()).at("list", &at)? {
            let below = walk::join(&path, &name);
            let at = self.path.join(&below);
            let stat = walk::stat(directory.as_fd(), &name).at("stat", &at)?;
            let kind = FileType::from_raw_mode(stat.st_mode);
            let tree_name = scan::tree_name(&name, &at)?;
            let marks = Marks { kind, device: stat.st_rdev, opaque: false, redirect: None, metacopy: false };
            match (self.interpretation.shown)(&marks) {
                Shown::Upper => {}
                Shown::Lower => continue,
                Shown::Nothing => {
                    walked.counts.deleted += 1;
                    walked.draft.directories[number].entries.remove(&tree_name);
                    continue;
                }
            }
            let inode = (stat.st_dev, stat.st_ino);
            let plain = || walk::attributes(&stat, Default::default(), self.owner, None);
            let entry = match kind {
                FileType::Directory => {
                    let origin = |marks: &Marks| {
                        let origin = (self.interpretation.directory)(marks);
                        Ok(match self.resolve(lower.as_ref(), &tree_name, &origin)? {
                            Some(Node::Directory(blob)) => Some(blob),
                            _ => None,
                        })
                    };
                    Entry::Directory(walked.add(self.directory(root, below, origin)?)?)
                }
                FileType::RegularFile => {
                    let file = Unread { directory: number, name: tree_name.clone(), path: below, inode, stat };
                    walked.unread.push(file);
                    // Put there when it has been read; until then the lower one must not show.
                    walked.draft.directories[number].entries.remove(&tree_name);
                    continue;
                }
                FileType::Symlink => {
                    let target = walk::read_link(directory.as_fd(), &name).at("read the symbolic link", &at)?;
                    walked.counts.changed += 1;
                    Entry::Leaf(Node::Symlink { target, attributes: plain(), link_group: None }, inode)
                }
                FileType::Fifo => {
                    walked.counts.changed += 1;
                    Entry::Leaf(Node::Fifo { attributes: plain(), link_group: None }, inode)
                }
                _ => {
                    walked.counts.skipped += 1;
                    walked.draft.directories[number].entries.remove(&tree_name);
                    continue;
                }
            };
            walked.draft.directories[number].entries.insert(tree_name, entry);
        }
        Ok(())
    }

    /// A directory of the upper: its attributes, and its lower half, which `lower` finds from its marks.
    fn directory(
        &self,
        root: BorrowedFd<'_>,
        path: PathBuf,
        lower: impl FnOnce(&Marks) -> Result<Option<Blob>>,
    ) -> Result<Found> {
        let at = self.path.join(&path);
        let directory = walk::open_directory(root, &path).at("open directory", &at)?;
        let stat = rustix::fs::fstat(&directory).at("stat", &at)?;
        let xattrs = walk::xattrs(directory.as_fd()).at("read the extended attributes of", &at)?;
        let marks = Marks {
            kind: FileType::Directory,
            device: 0,
            opaque: xattrs.get(OPAQUE).is_some_and(|value| value == b"y"),
            redirect: xattrs.get(REDIRECT).cloned(),
            metacopy: false,
        };
        let lower = match lower(&marks)? {
            Some(blob) => Some(Lower { blob, directory: self.message(&blob)? }),
            None => None,
        };
        Ok(Found { path, attributes: walk::attributes(&stat, xattrs, self.owner, None), lower })
    }

    /// Finds the content of a regular file.
    fn understand(
        &self,
        root: BorrowedFd<'_>,
        lowers: &[Option<Lower>],
        hashed: &Mutex<HashMap<Inode, Blob>>,
        file: &Unread,
    ) -> Result<Understood> {
        let remembered = self.cache.get(&StatKey::of(&file.stat));
        if let Some(Known { digest, plain: true }) = remembered {
            let content = Blob { digest, size: file.stat.st_size as u64 };
            let attributes = walk::attributes(&file.stat, Default::default(), self.owner, None);
            let node = Node::File { content, attributes, link_group: None };
            return Ok(Understood { node, own: Some(content), opened: false, read: false });
        }
        let at = self.path.join(&file.path);
        let open = File::from(walk::open_file(root, &file.path).at("open", &at)?);
        let stat = &file.stat;
        let xattrs = walk::xattrs(open.as_fd()).at("read the extended attributes of", &at)?;
        let marks = Marks {
            kind: FileType::RegularFile,
            device: 0,
            opaque: false,
            redirect: xattrs.get(REDIRECT).cloned(),
            metacopy: xattrs.contains_key(METACOPY),
        };
        let attributes = walk::attributes(stat, xattrs, self.owner, None);
        let plain = attributes.xattrs.is_empty();
        let file_node = |content| Node::File { content, attributes, link_group: None };

        let origin = (self.interpretation.content)(&marks);
        if origin != Origin::Nowhere {
            let lower = lowers[file.directory].as_ref();
            return match self.resolve(lower, &file.name, &origin)? {
                Some(Node::File { content, .. }) => {
                    Ok(Understood { node: file_node(content), own: None, opened: true, read: false })
                }
                _ => Err(Error::Damaged {
                    what: at.display().to_string(),
                    detail: format!("its content should be in the image, at {origin:?}, but there is no file there"),
                }),
            };
        }

        let known = hashed.lock().expect("no holder panics").get(&file.inode).copied();
        let (content, read) = match known {
            Some(content) => (content, false),
            None => match remembered {
                Some(known) => (Blob { digest: known.digest, size: stat.st_size as u64 }, false),
                None => (self.content(&open, stat, plain).at("read", &at)?, true),
            },
        };
        hashed.lock().expect("no holder panics").insert(file.inode, content);
        Ok(Understood { node: file_node(content), own: Some(content), opened: true, read })
    }

    /// Reads a file of the upper, and remembers its digest if the file cannot change unseen.
    fn content(&self, file: &File, stat: &Stat, plain: bool) -> std::io::Result<Blob> {
        let key = StatKey::of(stat);
        let content = Blob::of_reader(file)?;
        let changed = Duration::new(key.ctime.0.max(0) as u64, key.ctime.1);
        let taken = self.taken.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        if content.size == key.size && changed + RACY < taken {
            self.cache.put(&key, Known { digest: content.digest, plain });
        }
        Ok(content)
    }

    /// What the image has at an origin.
    fn resolve(&self, parent: Option<&Lower>, name: &Name, origin: &Origin) -> Result<Option<Node>> {
        let below = |name: &[u8]| parent.and_then(|lower| lower.directory.entries.get(name)).cloned();
        match origin {
            Origin::Nowhere => Ok(None),
            Origin::SameName => Ok(below(name.as_bytes())),
            Origin::Sibling(name) => Ok(below(name)),
            Origin::Path(path) => self.at_path(path),
        }
    }

    /// What the image has at an absolute path.
    fn at_path(&self, path: &[u8]) -> Result<Option<Node>> {
        let mut node = Node::Directory(self.lower);
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            let Node::Directory(blob) = &node else { return Ok(None) };
            match self.message(blob)?.entries.get(name) {
                Some(next) => node = next.clone(),
                None => return Ok(None),
            }
        }
        Ok(Some(node))
    }

    fn message(&self, blob: &Blob) -> Result<Arc<Directory>> {
        self.directories.directory(blob).map_err(|error| Error::store(format!("read directory {blob}"), error))
    }
}

/// A directory of the image.
#[derive(Clone)]
struct Lower {
    blob: Blob,
    directory: Arc<Directory>,
}

/// A directory of the upper, just found.
struct Found {
    path: PathBuf,
    attributes: aether_cas::tree::Attributes,
    lower: Option<Lower>,
}

/// What the walk has gathered.
#[derive(Default)]
struct Walked {
    draft: Draft,
    /// The lower half of each directory of the draft.
    lowers: Vec<Option<Lower>>,
    unread: Vec<Unread>,
    counts: Counts,
}

impl Walked {
    /// Adds a directory that starts out as its lower half shows it.
    fn add(&mut self, found: Found) -> Result<usize> {
        let number = self.draft.add(found.path, found.attributes)?;
        if let Some(lower) = &found.lower {
            let kept = lower.directory.entries.iter().map(|(name, node)| (name.clone(), Entry::Kept(node.clone())));
            self.draft.directories[number].entries.extend(kept);
        }
        self.lowers.push(found.lower);
        Ok(number)
    }
}
