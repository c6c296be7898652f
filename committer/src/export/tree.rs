//! The tree that leaves, and other trees made of it.
//!
//! What is called `.git` stays: reviewers are not shown it, and what is in it can make git run programs.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;

use aether_cas::tree::walk::bottom_up;
use aether_cas::tree::{Attributes, Directories, Directory, MemoryDirectories, Mtime, Node, walk};
use aether_cas::{Blob, StoreError};

use crate::losses::Losses;

const GIT: &str = ".git";
const REPOSITORY: &str = "repositories (.git) are left out, because reviewers are not shown them";
const OWNER: &str =
    "files of others than the session's owner belong to whom everything belongs, because only root gives files away";

/// The tree without anything called `.git`, at whatever depth.
pub(super) fn shown(root: &Blob, directories: &MemoryDirectories, losses: &mut Losses) -> Result<Blob, StoreError> {
    walk(root, directories, |path, _| {
        // What is below one is counted with it.
        if path.ends_with(GIT) && path.iter().filter(|name| *name == GIT).count() == 1 {
            losses.add(REPOSITORY, path.as_os_str().as_bytes());
        }
        Ok::<(), StoreError>(())
    })?;
    rewritten(root, directories, |directory| directory.entries.retain(|name, _| name.as_bytes() != GIT.as_bytes()))
}

/// The tree for somebody who can give no files away.
pub(super) fn without_owners(
    root: &Blob,
    directories: &MemoryDirectories,
    losses: &mut Losses,
) -> Result<Blob, StoreError> {
    walk(root, directories, |path, node| {
        let owner = match node {
            Node::Directory(blob) => directories.directory(blob)?.attributes.owner,
            node => node.attributes().and_then(|attributes| attributes.owner),
        };
        if owner.is_some() {
            losses.add(OWNER, path.as_os_str().as_bytes());
        }
        Ok::<(), StoreError>(())
    })?;
    rewritten(root, directories, |directory| each(directory, |attributes| attributes.owner = None))
}

/// A tree without what file systems keep more or less exactly, and without the numbers of hard links.
pub(super) fn comparable(root: &Blob, directories: &MemoryDirectories) -> Result<Blob, StoreError> {
    rewritten(root, directories, |directory| {
        each(directory, |attributes| attributes.mtime = Mtime::default());
        for node in directory.entries.values_mut() {
            if let Node::File { link_group, .. } | Node::Symlink { link_group, .. } | Node::Fifo { link_group, .. } =
                node
            {
                *link_group = None;
            }
        }
    })
}

/// The tree with other directories.
fn rewritten(
    root: &Blob,
    directories: &MemoryDirectories,
    change: impl Fn(&mut Directory),
) -> Result<Blob, StoreError> {
    let mut names: HashMap<Blob, Blob> = HashMap::new();
    for (blob, directory) in bottom_up(root, directories, |_| false)? {
        let mut directory = (*directory).clone();
        change(&mut directory);
        for node in directory.entries.values_mut() {
            if let Node::Directory(below) = node {
                *below = names[below];
            }
        }
        names.insert(blob, directories.insert(directory));
    }
    Ok(names[root])
}

/// Changes the attributes of a directory, and of all in it that is none.
fn each(directory: &mut Directory, change: impl Fn(&mut Attributes)) {
    change(&mut directory.attributes);
    for node in directory.entries.values_mut() {
        if let Node::File { attributes, .. } | Node::Symlink { attributes, .. } | Node::Fifo { attributes, .. } = node {
            change(attributes);
        }
    }
}
