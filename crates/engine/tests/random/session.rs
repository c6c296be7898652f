//! A session on a real overlay mount, made as the product makes it, on whatever tree a test wants below.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use aether_cas::tree::{Attributes, Directories, Directory, Node, Owner};
use aether_cas::{Blob, MemoryStore};
use aether_engine::error::Result;
use aether_engine::scan::{self, Scanned, Sink};
use aether_engine::upper::{self, Interpretation, NoCache, Upper};
use bytes::Bytes;
use rustix::fs::{AtFlags, CWD, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// Whose files need no mention; some operations give files to others.
pub const OWNER: Owner = Owner { uid: 0, gid: 0 };

/// Everything a scan hands out, kept in memory.
pub struct Keep<'a>(pub &'a MemoryStore);

impl Sink for Keep<'_> {
    fn content(&self, content: &Blob, path: &Path, file: &fs::File) -> Result<()> {
        use std::os::unix::fs::FileExt;
        let mut data = vec![0; content.size as usize];
        file.read_exact_at(&mut data, 0).expect("read what was just hashed");
        assert_eq!(self.0.put(data), *content, "{} is what it was hashed to", path.display());
        Ok(())
    }

    fn directory(&self, blob: &Blob, message: Bytes) -> Result<()> {
        assert_eq!(self.0.put(message), *blob);
        Ok(())
    }
}

/// Reads a directory file by file.
pub fn scanned(directory: &Path, store: &MemoryStore) -> Result<Scanned> {
    scan::scan(directory, scan::Options { owner: OWNER, mtime: None, progress: None }, &Keep(store))
}

/// A mounted session.
pub struct Session {
    home: PathBuf,
    lower: Blob,
}

impl Session {
    /// Makes a lower directory of the tree `lower`, an upper that starts like its root, and mounts them.
    pub fn new(home: &Path, lower: Blob, store: &MemoryStore) -> Self {
        for name in ["image", "upper", "work", "merged"] {
            fs::create_dir_all(home.join(name)).expect("make a session's directory");
        }
        mount("image", home.join("image"), "tmpfs", MountFlags::empty(), c"mode=0755").expect("mount a lower");
        materialise(&lower, store, &home.join("image"));
        let root = store.directory(&lower).expect("the root of the lower tree");
        set_attributes(&home.join("upper"), &root.attributes);
        let session = Self { home: home.to_owned(), lower };
        session.mount();
        session
    }

    /// Where a user works.
    pub fn merged(&self) -> PathBuf {
        self.home.join("merged")
    }

    fn mount(&self) {
        let home = self.home.display();
        let options = format!(
            "lowerdir={home}/image,upperdir={home}/upper,workdir={home}/work,\
             index=off,nfs_export=off,xino=off,metacopy=on,redirect_dir=on"
        );
        let options = std::ffi::CString::new(options).expect("no zero byte in a path");
        mount("overlay", self.merged(), "overlay", MountFlags::NOSUID | MountFlags::NODEV, options.as_c_str())
            .expect("mount the overlay");
    }

    fn unmount(&self) {
        unmount(self.merged(), UnmountFlags::empty()).expect("unmount the overlay");
    }

    /// As a pod that ends and another that begins.
    pub fn remount(&self) {
        self.unmount();
        self.mount();
    }

    /// The tree of the upper; new messages and contents go to the store.
    pub fn tree(&self, store: &MemoryStore, interpretation: Interpretation) -> Result<upper::Tree> {
        let path = self.home.join("upper");
        let upper = Upper {
            path: &path,
            lower: self.lower,
            owner: OWNER,
            directories: store,
            cache: &NoCache,
            taken: SystemTime::now(),
            interpretation,
        };
        let tree = upper.tree()?;
        for (blob, message) in &tree.directories {
            assert_eq!(store.put(message.clone()), *blob);
        }
        for (content, below) in &tree.contents {
            assert_eq!(store.put(fs::read(path.join(below)).expect("read a content")), *content);
        }
        Ok(tree)
    }

    /// Unmounts and removes all of it.
    pub fn end(self) {
        self.unmount();
        unmount(self.home.join("image"), UnmountFlags::empty()).expect("unmount the lower");
        fs::remove_dir_all(&self.home).expect("remove the session");
    }
}

/// Writes a tree out as plain files.
fn materialise(root: &Blob, store: &MemoryStore, at: &Path) {
    let mut groups = std::collections::HashMap::new();
    let mut todo = vec![(*root, at.to_owned())];
    let mut made: Vec<(PathBuf, Attributes)> = Vec::new();
    while let Some((blob, path)) = todo.pop() {
        let directory: std::sync::Arc<Directory> = store.directory(&blob).expect("a directory of the tree");
        for (name, node) in &directory.entries {
            let path = path.join(std::ffi::OsStr::from_bytes(name.as_bytes()));
            if let Some(first) = node.link_group().and_then(|group| groups.get(&group)) {
                fs::hard_link(first, &path).expect("link");
                continue;
            }
            match node {
                Node::Directory(blob) => {
                    fs::create_dir(&path).expect("mkdir");
                    todo.push((*blob, path));
                    continue;
                }
                Node::File { content, .. } => {
                    let data = aether_cas::transfer::Objects::object(store, content).expect("a content of the tree");
                    let aether_cas::transfer::Object::Bytes(data) = data else { panic!("memory holds bytes") };
                    fs::write(&path, data).expect("write");
                }
                Node::Symlink { target, .. } => {
                    std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(target), &path).expect("symlink");
                }
                Node::Fifo { .. } => rustix::fs::mkfifoat(CWD, &path, Mode::empty()).expect("mkfifo"),
            }
            set_attributes(&path, node.attributes().expect("no directory"));
            if let Some(group) = node.link_group() {
                groups.insert(group, path);
            }
        }
        made.push((path, directory.attributes.clone()));
    }
    for (path, attributes) in made.iter().rev() {
        set_attributes(path, attributes);
    }
}

/// Gives an entry its attributes.
pub fn set_attributes(path: &Path, attributes: &Attributes) {
    let owner = attributes.owner.unwrap_or(OWNER);
    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
    rustix::fs::chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).expect("chown");
    if !path.is_symlink() {
        rustix::fs::chmod(path, Mode::from_raw_mode(attributes.mode)).expect("chmod");
    }
    for (name, value) in &attributes.xattrs {
        rustix::fs::lsetxattr(path, name.as_slice(), value, XattrFlags::empty()).expect("setxattr");
    }
    let time = Timespec { tv_sec: attributes.mtime.seconds, tv_nsec: i64::from(attributes.mtime.nanos) };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).expect("utimens");
}
