//! What a restore in place promises to processes that live through it, on a real mount.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use aether_cas::tree::{Directories, Directory};
use aether_cas::{Blob, MemoryStore, StoreError};
use aether_engine::restore::{self, Room};
use aether_engine::upper::Interpretation;

use crate::random;
use crate::random::session::{OWNER, Session, scanned};

/// A session on a base that `make` fills.
fn session(scratch: &Path, store: &MemoryStore, make: impl FnOnce(&Path)) -> (Session, Blob) {
    let base = scratch.join("base");
    fs::create_dir(&base).unwrap();
    make(&base);
    let root = scanned(&base, store).unwrap().root;
    (Session::new(&scratch.join("session"), root, store), root)
}

fn tree(session: &Session, store: &MemoryStore) -> Blob {
    session.tree(store, Interpretation::default()).unwrap().root
}

/// Where a process whose working directory this is would find itself.
fn place(directory: &File) -> std::path::PathBuf {
    fs::read_link(format!("/proc/self/fd/{}", directory.as_raw_fd())).unwrap()
}

#[test]
fn open_files_keep_their_contents_and_working_directories_move_back() {
    random::alone(|scratch| {
        let store = MemoryStore::new();
        let (session, base) = session(scratch, &store, |base| {
            for name in ["src/deep/er", "one", "two", "stays"] {
                fs::create_dir_all(base.join(name)).unwrap();
            }
            for name in ["src/deep/er/file", "src/deep/other", "one/first", "one/last", "two/second", "stays/file"] {
                fs::write(base.join(name), name.repeat(100)).unwrap();
            }
        });
        let root = session.merged();
        let directories = ["src/deep", "one", "two", "stays"].map(|name| (name, File::open(root.join(name)).unwrap()));

        fs::create_dir(root.join("elsewhere")).unwrap();
        fs::rename(root.join("src/deep"), root.join("elsewhere/shallow")).unwrap();
        fs::write(root.join("elsewhere/shallow/er/new"), "new").unwrap();
        fs::rename(root.join("one"), root.join("aside")).unwrap();
        fs::rename(root.join("two"), root.join("one")).unwrap();
        fs::rename(root.join("aside"), root.join("two")).unwrap();
        fs::write(root.join("stays/file"), "changed").unwrap();
        let mut open = File::open(root.join("stays/file")).unwrap();
        let before = fs::metadata(root.join("stays")).unwrap().ino();

        let now = tree(&session, &store);
        let plan = restore::plan(&now, &base, &store).unwrap();
        let done = plan.apply(&root, OWNER, &store, None).unwrap();

        let after = tree(&session, &store);
        restore::verify(&after, &base, &store).unwrap();
        restore::verify(&scanned(&root, &store).unwrap().root, &base, &store).unwrap();
        for (name, directory) in &directories {
            assert_eq!(place(directory), root.join(name), "whoever works in {name} is there again");
        }
        assert_eq!(fs::metadata(root.join("stays")).unwrap().ino(), before);
        let mut contents = String::new();
        open.read_to_string(&mut contents).unwrap();
        assert_eq!(contents, "changed", "who has the file open keeps what was in it");
        assert_eq!(fs::read_to_string(root.join("stays/file")).unwrap(), "stays/file".repeat(100));
        assert_eq!(done.moved, 3);
        assert_eq!(done.bytes, 1000, "no byte of a moved directory was written");
        drop((open, directories));
        session.end();
    });
}

#[test]
fn with_too_little_room_nothing_is_touched() {
    random::alone(|scratch| {
        let store = MemoryStore::new();
        let (session, base) = session(scratch, &store, |base| {
            fs::write(base.join("large"), vec![7; 100_000]).unwrap();
            fs::write(base.join("small"), "small").unwrap();
        });
        let root = session.merged();
        fs::write(root.join("large"), "").unwrap();
        fs::remove_file(root.join("small")).unwrap();
        let now = tree(&session, &store);
        let plan = restore::plan(&now, &base, &store).unwrap();
        for limit in [Room { bytes: 99_000, inodes: 10 }, Room { bytes: 1 << 30, inodes: 1 }] {
            let error = plan.apply(&root, OWNER, &store, Some(limit)).unwrap_err();
            assert_eq!(error.io_kind(), Some(ErrorKind::StorageFull), "{error}");
            assert!(error.to_string().contains("raise the session's limit"), "{error}");
            assert_eq!(tree(&session, &store), now);
        }
        plan.apply(&root, OWNER, &store, Some(Room { bytes: 1 << 30, inodes: 2 })).unwrap();
        restore::verify(&tree(&session, &store), &base, &store).unwrap();
        session.end();
    });
}

#[test]
fn a_link_that_leads_out_is_not_followed() {
    random::alone(|scratch| {
        let store = MemoryStore::new();
        let (session, base) = session(scratch, &store, |base| {
            fs::create_dir(base.join("directory")).unwrap();
            fs::write(base.join("directory/file"), "base").unwrap();
        });
        let outside = scratch.join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "outside").unwrap();
        let root = session.merged();
        fs::write(root.join("directory/file"), "changed").unwrap();
        let plan = restore::plan(&tree(&session, &store), &base, &store).unwrap();

        // Somebody who was not frozen after all.
        fs::rename(root.join("directory"), root.join("away")).unwrap();
        symlink(&outside, root.join("directory")).unwrap();
        let error = plan.apply(&root, OWNER, &store, None).unwrap_err();
        assert!(error.to_string().contains("directory"), "{error}");
        assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "outside");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
        session.end();
    });
}

#[test]
fn a_restore_that_was_cut_off_is_completed_by_doing_it_again() {
    random::alone(|scratch| {
        let store = MemoryStore::new();
        let (session, base) = session(scratch, &store, |base| {
            for name in ["one", "two"] {
                fs::create_dir(base.join(name)).unwrap();
                fs::write(base.join(name).join(name), name).unwrap();
            }
            fs::write(base.join("last"), "last").unwrap();
        });
        let root = session.merged();
        fs::rename(root.join("one"), root.join("three")).unwrap();
        fs::remove_file(root.join("last")).unwrap();
        let now = tree(&session, &store);
        let lost = store.remove(&Blob::of(b"last"));
        assert!(lost);
        let error = restore::plan(&now, &base, &store).unwrap().apply(&root, OWNER, &store, None).unwrap_err();
        assert!(error.to_string().contains("last"), "{error}");

        store.put("last");
        let now = tree(&session, &store);
        restore::plan(&now, &base, &store).unwrap().apply(&root, OWNER, &store, None).unwrap();
        restore::verify(&tree(&session, &store), &base, &store).unwrap();
        session.end();
    });
}

/// Counts what is read from it.
struct Counted<'a>(&'a MemoryStore, AtomicUsize);

impl Directories for Counted<'_> {
    fn directory(&self, blob: &Blob) -> Result<Arc<Directory>, StoreError> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.directory(blob)
    }
}

#[test]
fn the_cost_follows_the_difference() {
    random::alone(|scratch| {
        let store = MemoryStore::new();
        let (session, base) = session(scratch, &store, |base| {
            for number in 0..400 {
                let directory = base.join(format!("top{}/inner{number}", number % 20));
                fs::create_dir_all(&directory).unwrap();
                fs::write(directory.join("file"), number.to_string()).unwrap();
            }
        });
        let root = session.merged();
        fs::write(root.join("top3/inner43/file"), "changed").unwrap();
        fs::rename(root.join("top4"), root.join("top5/inner5/moved")).unwrap();

        let counted = Counted(&store, AtomicUsize::new(0));
        let upper = scratch.join("session/upper");
        let tree = session.upper(&upper, &counted, Interpretation::default()).tree().unwrap();
        assert!(counted.1.into_inner() < 12, "the tree of the upper reads what the upper mentions");
        assert_eq!((tree.counts.changed, tree.counts.read, tree.counts.own_bytes), (1, 1, 7));
        // The root, the four directories above the changes; the moved one is as it was.
        assert_eq!(tree.directories.len(), 5, "and makes messages for what changed");
        tree.directories.iter().for_each(|(blob, message)| assert_eq!(store.put(message.clone()), *blob));

        let counted = Counted(&store, AtomicUsize::new(0));
        let plan = restore::plan(&tree.root, &base, &counted).unwrap();
        assert!(counted.1.into_inner() < 60, "the plan reads what differs");
        let done = plan.apply(&root, OWNER, &store, None).unwrap();
        assert_eq!((done.moved, done.changed, done.removed), (1, 1, 0));
        restore::verify(&self::tree(&session, &store), &base, &store).unwrap();
        session.end();
    });
}

/// Once both were under one temporary name (found by the random restores).
#[test]
fn regression_a_link_in_the_root_while_directories_are_put_aside() {
    random::alone(|scratch| {
        let store = MemoryStore::new();
        let (session, base) = session(scratch, &store, |base| {
            fs::create_dir_all(base.join("directory/inner")).unwrap();
            fs::write(base.join("name"), "linked").unwrap();
            fs::hard_link(base.join("name"), base.join("directory/inner/name")).unwrap();
        });
        let root = session.merged();
        fs::write(root.join("name"), "parted").unwrap();
        fs::rename(root.join("directory/inner"), root.join("directory/moved")).unwrap();
        let plan = restore::plan(&tree(&session, &store), &base, &store).unwrap();
        let done = plan.apply(&root, OWNER, &store, None).unwrap();
        assert_eq!(done.moved, 1);
        restore::verify(&tree(&session, &store), &base, &store).unwrap();
        let inode = |name: &str| fs::metadata(root.join(name)).unwrap().ino();
        assert_eq!(inode("name"), inode("directory/inner/name"), "the two names are one file again");
        session.end();
    });
}
