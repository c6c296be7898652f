//! What a scan reads, leaves out and hands over. Needs no root and no mount.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use aether_cas::tree::{Directories, Mtime, Node, Owner, walk};
use aether_cas::{Blob, MemoryStore, StoreError};
use aether_engine::Result;
use aether_engine::scan::{Options, Progress, Scanned, Sink, scan};
use bytes::Bytes;
use rustix::fs::{CWD, Mode, OFlags};

#[derive(Default)]
struct Kept {
    store: MemoryStore,
    contents: Mutex<BTreeMap<PathBuf, Blob>>,
    directories: Mutex<Vec<Blob>>,
}

impl Sink for Kept {
    fn content(&self, content: &Blob, path: &Path, _: &File) -> Result<()> {
        self.contents.lock().unwrap().insert(path.to_owned(), *content);
        Ok(())
    }
    fn directory(&self, blob: &Blob, message: Bytes) -> Result<()> {
        assert_eq!(self.store.put(message), *blob);
        self.directories.lock().unwrap().push(*blob);
        Ok(())
    }
}

fn me() -> Owner {
    Owner { uid: rustix::process::getuid().as_raw(), gid: rustix::process::getgid().as_raw() }
}

fn scanned(directory: &Path, mtime: Option<Mtime>) -> (Scanned, Kept) {
    let kept = Kept::default();
    let found = scan(directory, Options { owner: me(), mtime, progress: None }, &kept).unwrap();
    (found, kept)
}

fn leaves(root: &Blob, store: &MemoryStore) -> BTreeMap<PathBuf, Node> {
    let mut leaves = BTreeMap::new();
    walk(root, store, |path, node| {
        leaves.insert(path.to_owned(), node.clone());
        Ok::<(), StoreError>(())
    })
    .unwrap();
    leaves
}

#[test]
fn kinds_links_and_what_a_tree_cannot_hold() {
    let directory = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::create_dir(at("sub")).unwrap();
    fs::write(at("file"), "content").unwrap();
    fs::write(at("same"), "content").unwrap();
    fs::write(at("empty"), "").unwrap();
    fs::hard_link(at("file"), at("sub/linked")).unwrap();
    symlink(outside.path(), at("out")).unwrap();
    rustix::fs::mkfifoat(CWD, at("fifo"), Mode::from_raw_mode(0o600)).unwrap();
    let _socket = UnixListener::bind(at("socket")).unwrap();

    let (found, kept) = scanned(directory.path(), None);
    let counts = found.counts;
    assert_eq!((counts.files, counts.directories, counts.symlinks, counts.fifos, counts.skipped), (4, 2, 1, 1, 1));
    assert_eq!(counts.bytes, 21);
    let contents = kept.contents.into_inner().unwrap();
    assert_eq!(
        contents.values().collect::<Vec<_>>(),
        [&Blob::of(b"content")],
        "each content once, the empty one never"
    );
    assert_eq!(kept.directories.lock().unwrap().last(), Some(&found.root), "the root comes last");

    let leaves = leaves(&found.root, &kept.store);
    assert!(matches!(leaves[Path::new("out")], Node::Symlink { .. }), "a symbolic link is not followed");
    assert!(leaves.keys().all(|path| !path.ends_with("secret")));
    let group = |name: &str| leaves[Path::new(name)].link_group();
    assert!(group("file").is_some());
    assert_eq!(group("file"), group("sub/linked"));
    assert_eq!(group("same"), None);
    assert!(leaves.values().filter_map(Node::attributes).all(|attributes| attributes.owner.is_none()));
}

#[test]
fn a_fixed_time_makes_equal_trees_of_equal_directories() {
    let copies = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let mtime = Mtime { seconds: 1_600_000_000, nanos: 0 };
    let roots = copies.map(|copy| {
        fs::create_dir(copy.path().join("sub")).unwrap();
        fs::write(copy.path().join("sub/file"), "content").unwrap();
        fs::hard_link(copy.path().join("sub/file"), copy.path().join("linked")).unwrap();
        let (fixed, kept) = scanned(copy.path(), Some(mtime));
        assert_eq!(kept.store.directory(&fixed.root).unwrap().attributes.mtime, mtime);
        assert_ne!(scanned(copy.path(), None).0.root, fixed.root);
        fixed.root
    });
    assert_eq!(roots[0], roots[1]);
}

#[test]
fn progress_ends_with_everything() {
    let directory = tempfile::tempdir().unwrap();
    for number in 0..3000 {
        fs::write(directory.path().join(number.to_string()), number.to_string()).unwrap();
    }
    let last = Mutex::new(Progress::default());
    let progress = |now: Progress| {
        let mut last = last.lock().unwrap();
        if now.files > last.files {
            *last = now;
        }
    };
    let options = Options { owner: me(), mtime: None, progress: Some(&progress) };
    let found = scan(directory.path(), options, &Kept::default()).unwrap();
    assert_eq!(*last.lock().unwrap(), Progress { files: 3000, files_total: 3000, bytes: found.counts.bytes });
}

#[test]
fn paths_longer_than_the_kernel_takes_are_read() {
    let directory = tempfile::tempdir().unwrap();
    let name = "n".repeat(200);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut at: OwnedFd = rustix::fs::open(directory.path(), flags, Mode::empty()).unwrap();
    for _ in 0..40 {
        rustix::fs::mkdirat(&at, OsStr::new(&name), Mode::RWXU).unwrap();
        at = rustix::fs::openat(&at, OsStr::new(&name), flags, Mode::empty()).unwrap();
    }
    let file = rustix::fs::openat(&at, "deep", OFlags::WRONLY | OFlags::CREATE, Mode::RUSR).unwrap();
    rustix::io::write(&file, b"deep").unwrap();

    let (found, kept) = scanned(directory.path(), None);
    assert_eq!((found.counts.files, found.counts.directories), (1, 41));
    assert_eq!(kept.contents.into_inner().unwrap().into_values().collect::<Vec<_>>(), [Blob::of(b"deep")]);
}

#[test]
fn what_cannot_be_read_is_named() {
    let missing = Path::new("/there/is/no/such/directory");
    let options = Options { owner: me(), mtime: None, progress: None };
    let error = scan(missing, options, &Kept::default()).unwrap_err();
    assert!(error.is_not_found());
    assert!(error.to_string().contains("/there/is/no/such/directory"), "{error}");
}
