//! What the tree of an upper costs and counts, on a real mount.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use aether_cas::MemoryStore;
use aether_engine::upper::{Counts, Interpretation, Known, StatCache, StatKey, Upper};

use aether_engine::mount;

use crate::random;
use crate::random::session::{Session, scanned};

#[derive(Default)]
struct Remembered(Mutex<HashMap<StatKey, Known>>);

impl StatCache for Remembered {
    fn get(&self, key: &StatKey) -> Option<Known> {
        self.0.lock().unwrap().get(key).copied()
    }
    fn put(&self, key: &StatKey, known: Known) {
        self.0.lock().unwrap().insert(*key, known);
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
        assert_eq!(again.counts.opened, 0);
        assert_eq!(again.root, first.root);
        assert_eq!(again.contents.len(), 3, "contents are named whether they were read or not");

        fs::write(session.merged().join("two"), "TWO").unwrap();
        let changed = tree(later);
        assert_eq!((changed.counts.opened, changed.counts.read), (1, 1));
        assert_ne!(changed.root, first.root);

        // What stat data does not show makes a file worth opening, but not worth reading.
        let one = session.merged().join("one");
        mount::set_xattr(&one, "user.note", b"attributed").unwrap();
        let noted = tree(later);
        assert_eq!((noted.counts.opened, noted.counts.read), (1, 1), "its change time is another");
        let again = tree(later);
        assert_eq!((again.counts.opened, again.counts.read), (1, 0));
        assert_eq!(again.root, noted.root);
        assert_ne!(noted.root, changed.root);
        fs::set_permissions(&one, fs::Permissions::from_mode(0o600)).unwrap();
        rustix::fs::removexattr(&one, "user.note").unwrap();
        let bare = tree(later);
        assert_eq!((bare.counts.opened, bare.counts.read), (1, 1));
        let again = tree(later);
        assert_eq!((again.counts.opened, again.root), (0, bare.root));
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
        let expected = Counts { changed: 4, deleted: 2, directories: 2, own_bytes: 5, opened: 3, read: 1, skipped: 1 };
        assert_eq!(Counts { read: 1, ..tree.counts }, expected);
        assert_eq!(tree.contents.len(), 1);
        drop(socket);
        session.end();
    });
}
