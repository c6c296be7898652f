//! What the tree of an upper costs and counts, on a real mount.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use aether_cas::{Digest, MemoryStore};
use aether_engine::upper::{Counts, Interpretation, StatCache, StatKey, Upper};

use crate::random;
use crate::random::session::{Session, scanned};

#[derive(Default)]
struct Remembered(Mutex<HashMap<StatKey, Digest>>);

impl StatCache for Remembered {
    fn get(&self, key: &StatKey) -> Option<Digest> {
        self.0.lock().unwrap().get(key).copied()
    }
    fn put(&self, key: &StatKey, digest: Digest) {
        self.0.lock().unwrap().insert(*key, digest);
    }
}

#[test]
fn unchanged_files_are_not_read_again() {
    random::alone(|scratch| {
        let store = MemoryStore::new();
        fs::create_dir(scratch.join("base")).unwrap();
        let base = scanned(&scratch.join("base"), &store).unwrap().root;
        let session = Session::new(&scratch.join("session"), base, &store);
        for name in ["one", "two", "three"] {
            fs::write(session.merged().join(name), name).unwrap();
        }
        let path = scratch.join("session/upper");
        let cache = Remembered::default();
        let tree = |taken: SystemTime| {
            let upper = session.upper(&path, &store, Interpretation::default());
            Upper { cache: &cache, taken, ..upper }.tree().unwrap()
        };
        let now = SystemTime::now();
        assert_eq!(tree(now).counts.read, 3);
        assert_eq!(tree(now).counts.read, 3, "a file written at the time of the snapshot may change unseen");
        let later = now + Duration::from_secs(1);
        let first = tree(later);
        assert_eq!(first.counts.read, 3);
        let again = tree(later);
        assert_eq!((again.counts.read, again.counts.changed, again.counts.own_bytes), (0, 3, 11));
        assert_eq!(again.root, first.root);
        assert_eq!(again.contents.len(), 3, "contents are named whether they were read or not");

        fs::write(session.merged().join("two"), "TWO").unwrap();
        let changed = tree(later);
        assert_eq!(changed.counts.read, 1);
        assert_ne!(changed.root, first.root);
        session.end();
    });
}

#[test]
fn changes_are_counted_by_kind() {
    random::alone(|scratch| {
        let store = MemoryStore::new();
        let base = scratch.join("base");
        fs::create_dir_all(base.join("directory")).unwrap();
        for name in ["gone", "kept", "moved", "written", "directory/inner"] {
            fs::write(base.join(name), name).unwrap();
        }
        let base = scanned(&base, &store).unwrap().root;
        let session = Session::new(&scratch.join("session"), base, &store);
        let root = session.merged();
        assert_eq!(session.tree(&store, Interpretation::default()).unwrap().root, base, "nothing changed yet");

        fs::remove_file(root.join("gone")).unwrap();
        fs::rename(root.join("moved"), root.join("directory/moved")).unwrap();
        fs::write(root.join("written"), "12345").unwrap();
        fs::hard_link(root.join("written"), root.join("linked")).unwrap();
        symlink("written", root.join("link")).unwrap();
        let socket = UnixListener::bind(root.join("socket")).unwrap();
        let tree = session.tree(&store, Interpretation::default()).unwrap();
        // `moved` keeps its content in the image; written, linked and link are the other names.
        let expected = Counts { changed: 4, deleted: 2, directories: 2, own_bytes: 5, read: 1, skipped: 1 };
        assert_eq!(Counts { read: 1, ..tree.counts }, expected);
        assert_eq!(tree.contents.len(), 1);
        drop(socket);
        session.end();
    });
}
