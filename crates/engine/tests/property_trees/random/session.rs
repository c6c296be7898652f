//! A session on a real overlay mount: an EROFS image, a data-only layer of objects and an upper, as in the product.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use aether_cas::transfer::{Object, Objects};
use aether_cas::tree::{Attributes, Directories, Owner, walk};
use aether_cas::{Blob, MemoryStore, StoreError};
use aether_engine::error::Result;
use aether_engine::image;
use aether_engine::mount::{Overlay, mount_erofs, unmount};
use aether_engine::scan::{self, Scanned};
use aether_engine::testing::Keep;
use aether_engine::upper::{self, Interpretation, NoCache, Upper};
use rustix::fs::{AtFlags, CWD, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};

/// Whose files need no mention; some operations give files to others.
pub(crate) const OWNER: Owner = Owner { uid: 0, gid: 0 };

/// Reads a directory file by file.
pub(crate) fn scanned(directory: &Path, store: &MemoryStore) -> Result<Scanned> {
    scan::scan(directory, scan::Options { owner: OWNER, mtime: None, progress: None }, &Keep(store))
}

/// A mounted session.
pub(crate) struct Session {
    home: PathBuf,
    lower: Blob,
}

impl Session {
    /// Makes an image of the tree `lower`, an upper that starts like its root, and mounts them.
    pub(crate) fn new(home: &Path, lower: Blob, store: &MemoryStore) -> Self {
        for name in ["image", "objects", "upper", "work", "merged"] {
            fs::create_dir_all(home.join(name)).expect("make a session's directory");
        }
        put_objects(&lower, store, &home.join("objects"));
        let (bytes, _) = image::encode(lower, OWNER, store).expect("encode the image");
        fs::write(home.join("image.erofs"), bytes).expect("write the image");
        mount_erofs(&home.join("image.erofs"), &home.join("image")).expect("mount the image");
        let root = store.directory(&lower).expect("the root of the lower tree");
        set_attributes(&home.join("upper"), &root.attributes);
        let session = Self { home: home.to_owned(), lower };
        session.mount();
        session
    }

    /// Where a user works.
    pub(crate) fn merged(&self) -> PathBuf {
        self.home.join("merged")
    }

    fn mount(&self) {
        let overlay = Overlay {
            name: "session".into(),
            lower: self.home.join("image").join(image::TREE),
            data: vec![self.home.join("objects")],
            upper: Some((self.home.join("upper"), self.home.join("work"))),
        };
        overlay.mount(&self.merged()).expect("mount the overlay");
    }

    fn unmount(&self) {
        unmount(&self.merged()).expect("unmount the overlay");
    }

    /// As a pod that ends and another that begins.
    pub(crate) fn remount(&self) {
        self.unmount();
        self.mount();
    }

    /// The tree of the upper; new messages and contents go to the store.
    pub(crate) fn tree(&self, store: &MemoryStore, interpretation: Interpretation) -> Result<upper::Tree> {
        let path = self.home.join("upper");
        let tree = self.upper(&path, store, interpretation).tree()?;
        for (blob, message) in &tree.directories {
            assert_eq!(store.put(message.clone()), *blob);
        }
        for (content, below) in &tree.contents {
            assert_eq!(store.put(fs::read(path.join(below)).expect("read a content")), *content);
        }
        Ok(tree)
    }

    /// What the tree is computed from, without a stat cache.
    pub(crate) fn upper<'a>(
        &self,
        path: &'a Path,
        directories: &'a dyn Directories,
        interpretation: Interpretation,
    ) -> Upper<'a> {
        Upper {
            path,
            lower: self.lower,
            owner: OWNER,
            directories,
            cache: &NoCache,
            taken: SystemTime::now(),
            interpretation,
        }
    }

    /// Unmounts and removes all of it.
    pub(crate) fn end(self) {
        self.unmount();
        unmount(&self.home.join("image")).expect("unmount the image");
        fs::remove_dir_all(&self.home).expect("remove the session");
    }
}

/// Puts every content of a tree where an image's redirects lead.
fn put_objects(root: &Blob, store: &MemoryStore, objects: &Path) {
    walk(root, store, |_, node| {
        if let Some(content) = node.content().filter(|content| content.size > 0) {
            let Object::Bytes(data) = store.object(&content)? else { panic!("memory holds bytes") };
            let path = objects.join(content.digest.object_path());
            fs::create_dir_all(path.parent().expect("a folder")).expect("make a folder of objects");
            fs::write(&path, data).expect("write an object");
        }
        Ok::<(), StoreError>(())
    })
    .expect("walk the tree");
}

/// Gives an entry its attributes.
pub(crate) fn set_attributes(path: &Path, attributes: &Attributes) {
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
