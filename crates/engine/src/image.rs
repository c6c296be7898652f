//! Images: one EROFS file per (tree, owner) that holds the metadata of the tree and none of its contents.
//!
//! A non-empty regular file is an inode of its size without data, with `trusted.overlay.metacopy` empty and
//! `trusted.overlay.redirect` = `/ab/cdef...`, so that overlayfs looks its content up in the data-only layers. The
//! format and its writer are composefs' (format V1, which keeps nanoseconds); we use its form without fs-verity digests.
//!
//! The tree lies in the image's directory [`TREE`]: the root of a composefs image also holds 256 whiteouts (`00` to
//! `ff`), which must not be seen in a session.
//!
//! Promise: an image file appears complete and synced under its name, and is never written again.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread;

use aether_cas::Blob;
use aether_cas::tree::{Attributes, Directories, Node, Owner, Summary};
use composefs::erofs::format::FormatVersion;
use composefs::erofs::writer::{ValidatedFileSystem, mkfs_erofs_versioned};
use composefs::fsverity::Sha256HashValue;
use composefs::generic_tree::{LeafId, Stat};
use composefs::tree::{Directory, FileSystem, Inode, LeafContent, RegularFile};

use crate::crash::crash_point;
use crate::error::{Context, Error, Result};
use crate::state::ImageId;

/// The directory of a mounted image that is the tree.
pub const TREE: &str = "tree";

/// A tree may be 2048 directories deep, and composefs recurses; pages of a stack that are not used cost nothing.
const STACK: usize = 256 << 20;
/// Extended attributes of one inode that many inodes share are counted in one byte in EROFS.
const MOST_XATTRS: usize = 255;

/// Where in `images` an image lies.
pub fn path(images: &Path, id: ImageId) -> PathBuf {
    images.join(format!("{id}.erofs"))
}

/// Builds the image `id` in the directory `images` and returns its size in bytes with the tree's. An image that is
/// there already is taken as it is: it was renamed into place complete.
///
/// # Errors
/// `Store` where a message of the tree is not there; `Invalid` for what EROFS cannot hold, with the path.
pub fn build(images: &Path, id: ImageId, directories: &dyn Directories) -> Result<(u64, Summary)> {
    let target = path(images, id);
    if let Ok(metadata) = fs::metadata(&target) {
        let summary = aether_cas::tree::summary(&id.root, directories)
            .map_err(|error| Error::store(format!("read the tree {}", id.root), error))?;
        return Ok((metadata.len(), summary));
    }
    let (bytes, summary) = encode(id.root, id.owner(), directories)?;
    let unfinished = images.join(format!(".new-{id}-{}", uuid::Uuid::new_v4()));
    let mut file = File::create(&unfinished).at("create", &unfinished)?;
    file.write_all(&bytes).at("write", &unfinished)?;
    file.sync_all().at("sync", &unfinished)?;
    crash_point!("image.written");
    fs::rename(&unfinished, &target).at("rename", &unfinished)?;
    File::open(images).and_then(|directory| directory.sync_all()).at("sync", images)?;
    crash_point!("image.renamed");
    Ok((bytes.len() as u64, summary))
}

/// The bytes of the image of a tree.
pub fn encode(root: Blob, owner: Owner, directories: &dyn Directories) -> Result<(Box<[u8]>, Summary)> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("image".into())
            .stack_size(STACK)
            .spawn_scoped(scope, || encode_here(root, owner, directories))
            .at("start a thread for", "image")?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn encode_here(root: Blob, owner: Owner, directories: &dyn Directories) -> Result<(Box<[u8]>, Summary)> {
    let mut builder = Builder {
        directories,
        owner,
        fs: FileSystem::new(Stat { st_mode: 0o755, ..Stat::uninitialized() }),
        links: HashMap::new(),
        summary: Summary::default(),
    };
    let tree = builder.directory(&root, Path::new(""))?;
    // The image's own root is never seen; giving it the tree's time keeps the smallest time of the image meaningful.
    builder.fs.root.stat = Stat { xattrs: BTreeMap::new(), ..tree.stat.clone() };
    builder.fs.root.insert(OsStr::new(TREE), Inode::Directory(Box::new(tree)));
    let summary = builder.summary;
    let fs = ValidatedFileSystem::new(builder.fs)
        .map_err(|error| Error::Invalid { what: format!("tree {root}"), reason: format!("{error:#}") })?;
    Ok((mkfs_erofs_versioned(&fs, FormatVersion::V1), summary))
}

struct Builder<'a> {
    directories: &'a dyn Directories,
    owner: Owner,
    fs: FileSystem<Sha256HashValue>,
    links: HashMap<u64, LeafId>,
    summary: Summary,
}

impl Builder<'_> {
    fn directory(&mut self, blob: &Blob, path: &Path) -> Result<Directory<Sha256HashValue>> {
        let message = self
            .directories
            .directory(blob)
            .map_err(|error| Error::store(format!("read directory {}", shown(path)), error))?;
        self.summary.directories += 1;
        let mut directory = Directory::new(self.stat(&message.attributes, path)?);
        for (name, node) in &message.entries {
            let path = path.join(name.as_os_str());
            let inode = match node {
                Node::Directory(blob) => Inode::Directory(Box::new(self.directory(blob, &path)?)),
                Node::File { content, attributes, link_group } => {
                    self.summary.files += 1;
                    self.summary.bytes += content.size;
                    self.leaf(attributes, *link_group, &path, || match content.size {
                        0 => LeafContent::Regular(RegularFile::Inline(Box::default())),
                        size => {
                            // Only the bytes of the name matter: without fs-verity nobody compares them with contents.
                            let object = Sha256HashValue::from(content.digest.0);
                            LeafContent::Regular(RegularFile::ExternalNoVerity(object, size))
                        }
                    })?
                }
                Node::Symlink { target, attributes, link_group } => {
                    self.summary.others += 1;
                    self.leaf(attributes, *link_group, &path, || {
                        LeafContent::Symlink(OsStr::from_bytes(target).into())
                    })?
                }
                Node::Fifo { attributes, link_group } => {
                    self.summary.others += 1;
                    self.leaf(attributes, *link_group, &path, || LeafContent::Fifo)?
                }
            };
            directory.insert(name.as_os_str(), inode);
        }
        Ok(directory)
    }

    fn leaf(
        &mut self,
        attributes: &Attributes,
        group: Option<u64>,
        path: &Path,
        content: impl FnOnce() -> LeafContent<Sha256HashValue>,
    ) -> Result<Inode<Sha256HashValue>> {
        if let Some(leaf) = group.and_then(|group| self.links.get(&group)) {
            return Ok(Inode::leaf(*leaf));
        }
        let stat = self.stat(attributes, path)?;
        let leaf = self.fs.push_leaf(stat, content());
        if let Some(group) = group {
            self.links.insert(group, leaf);
        }
        Ok(Inode::leaf(leaf))
    }

    fn stat(&self, attributes: &Attributes, path: &Path) -> Result<Stat> {
        if attributes.xattrs.len() > MOST_XATTRS {
            return Err(Error::Invalid {
                what: shown(path),
                reason: format!(
                    "has {} extended attributes; an image holds {MOST_XATTRS} for a file",
                    attributes.xattrs.len()
                ),
            });
        }
        let owner = attributes.owner.unwrap_or(self.owner);
        Ok(Stat {
            st_mode: attributes.mode,
            st_uid: owner.uid,
            st_gid: owner.gid,
            st_mtim_sec: attributes.mtime.seconds,
            st_mtim_nsec: attributes.mtime.nanos,
            xattrs: attributes
                .xattrs
                .iter()
                .map(|(name, value)| (OsStr::from_bytes(name).into(), value.as_slice().into()))
                .collect(),
        })
    }
}

fn shown(path: &Path) -> String {
    if path.as_os_str().is_empty() { "/".into() } else { format!("/{}", path.display()) }
}
