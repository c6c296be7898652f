//! Trees on their way between stores: complete, in order, and only what is missing.

use std::{
    collections::HashSet,
    path::Path,
    sync::{Arc, Mutex},
};

use aether_cas::{
    Blob, LocalConfig, LocalStore, MemoryStore, Store, StoreError,
    store::Result,
    testing::{bytes, directory, file},
    transfer::{self, FileSource, Progress, Transferred},
    tree::{Directories, Directory, Node, walk},
};
use async_trait::async_trait;
use bytes::Bytes;
use tempfile::TempDir;

/// A store that checks the order of what it gets, and counts calls and answers.
#[derive(Default)]
struct Checked {
    store: MemoryStore,
    asked: Mutex<Vec<Blob>>,
    read: Mutex<Vec<Blob>>,
    /// Fails every write from this one on.
    fail_from: Option<usize>,
    writes: Mutex<usize>,
}

#[async_trait]
impl Store for Checked {
    async fn find_missing(&self, blobs: &[Blob]) -> Result<Vec<Blob>> {
        self.asked.lock().unwrap().extend(blobs);
        self.store.find_missing(blobs).await
    }

    async fn read(&self, blob: Blob) -> Result<Bytes> {
        self.read.lock().unwrap().push(blob);
        self.store.read(blob).await
    }

    async fn read_batch(&self, blobs: &[Blob]) -> Result<Vec<Bytes>> {
        self.read.lock().unwrap().extend(blobs);
        self.store.read_batch(blobs).await
    }

    async fn fetch_to(&self, blob: Blob, path: &Path) -> Result<()> {
        self.read.lock().unwrap().push(blob);
        self.store.fetch_to(blob, path).await
    }

    async fn write_batch(&self, blobs: Vec<(Blob, Bytes)>) -> Result<()> {
        let number = {
            let mut writes = self.writes.lock().unwrap();
            *writes += 1;
            *writes
        };
        if self.fail_from.is_some_and(|from| number >= from) {
            return Err(StoreError::Invalid("told to fail".to_owned()));
        }
        for (_, data) in &blobs {
            let Ok(directory) = Directory::decode(data) else {
                continue;
            };
            for (name, node) in &directory.entries {
                let below = match node {
                    Node::Directory(blob) => *blob,
                    other => other.content().unwrap_or(Blob::EMPTY),
                };
                let missing = self.store.find_missing(&[below]).await.unwrap();
                assert_eq!(missing, [], "{name} came after the directory that names it");
            }
        }
        self.store.write_batch(blobs).await
    }

    async fn write_file(&self, blob: Blob, path: &Path) -> Result<()> {
        self.store.write_file(blob, path).await
    }
}

fn local() -> (TempDir, LocalStore) {
    let folder = tempfile::tempdir().unwrap();
    let store = LocalStore::open(LocalConfig {
        objects: folder.path().join("objects"),
        index: folder.path().join("index"),
        inline_limit: 0,
    })
    .unwrap();
    (folder, store)
}

/// Eight directories of 25 small files below one of three levels, one of which is shared by two
/// levels, with a large and an empty file. `changed` makes one small file differ.
fn tree(store: &MemoryStore, changed: u64) -> Blob {
    let leaf = |n: u64| {
        let names: Vec<String> = (0..25).map(|f| format!("f{f}")).collect();
        let files = names.iter().enumerate().map(|(f, name)| {
            let seed = if (n, f) == (3, 7) { changed } else { n * 100 + f as u64 };
            let length = 200 + 3000 * f;
            (name.as_str(), file(store.put(bytes(seed, length))))
        });
        store.put_directory(&directory(files))
    };
    let leaves: Vec<Blob> = (0..8).map(leaf).collect();
    let names: Vec<String> = (0..8).map(|n| format!("d{n}")).collect();
    let middle = |range: std::ops::Range<usize>| {
        let entries = range.map(|n| (names[n].as_str(), Node::Directory(leaves[n])));
        store.put_directory(&directory(entries))
    };
    let (left, right) = (middle(0..4), middle(4..8));
    store.put_directory(&directory([
        ("left", Node::Directory(left)),
        ("right", Node::Directory(right)),
        // Also deep below: its depth is not its height.
        ("alias", Node::Directory(leaves[0])),
        ("large", file(store.put(bytes(999, 9 << 20)))),
        ("empty", file(Blob::EMPTY)),
    ]))
}

fn all_blobs(root: Blob, directories: &dyn Directories) -> HashSet<Blob> {
    let mut all = HashSet::from([root]);
    walk(&root, directories, |_, node| {
        all.insert(match node {
            Node::Directory(blob) => *blob,
            other => other.content().unwrap_or(Blob::EMPTY),
        });
        Ok::<(), StoreError>(())
    })
    .unwrap();
    all.remove(&Blob::EMPTY);
    all
}

#[tokio::test]
async fn an_upload_is_complete_ordered_and_counted() {
    let from = MemoryStore::new();
    let root = tree(&from, 307);
    let to = Checked::default();
    let progress = Mutex::new(Vec::new());
    let on_progress = |now: Progress| progress.lock().unwrap().push(now);
    let moved = transfer::upload_tree(root, Arc::new(from.clone()), &to, &on_progress).await.unwrap();
    // 200 small files and a large one; the empty one needs no moving. 8 leaves, 2 middles, the root.
    assert_eq!((moved.files, moved.directories), (201, 11));
    for blob in all_blobs(root, &from) {
        assert_eq!(to.store.read(blob).await.unwrap(), from.read(blob).await.unwrap());
    }
    let progress = progress.into_inner().unwrap();
    let last = progress.last().unwrap();
    assert_eq!((last.files, last.bytes), (moved.files, moved.bytes));
    assert_eq!((last.files, last.bytes), (last.files_total, last.bytes_total));
    assert!(progress.len() > 2, "it reports on the way");
    assert!(progress.windows(2).all(|w| w[0].bytes <= w[1].bytes));
}

#[tokio::test]
async fn a_second_upload_moves_the_difference_and_looks_nowhere_else() {
    let from = MemoryStore::new();
    let (old, new) = (tree(&from, 307), tree(&from, 5555));
    let to = Checked::default();
    let source = Arc::new(from.clone());
    transfer::upload_tree(old, source.clone(), &to, &|_| {}).await.unwrap();

    to.asked.lock().unwrap().clear();
    let moved = transfer::upload_tree(new, source.clone(), &to, &|_| {}).await.unwrap();
    assert_eq!((moved.files, moved.directories), (1, 3));
    // The way to the change and its neighbours, and the files of the one directory that is new.
    let asked = to.asked.lock().unwrap().len();
    assert!(asked < 50, "{asked} blobs were asked about");

    to.asked.lock().unwrap().clear();
    let moved = transfer::upload_tree(new, source, &to, &|_| {}).await.unwrap();
    assert_eq!(moved, Transferred::default());
    assert_eq!(*to.asked.lock().unwrap(), [new], "one question is enough");
}

#[tokio::test]
async fn an_upload_that_broke_off_leaves_no_root_and_goes_on_from_there() {
    let from = MemoryStore::new();
    let root = tree(&from, 307);
    let source = Arc::new(from.clone());
    for fail_from in [1, 2, 4, 5] {
        let broken = Checked { fail_from: Some(fail_from), ..Default::default() };
        let error = transfer::upload_tree(root, source.clone(), &broken, &|_| {}).await.unwrap_err();
        assert!(error.to_string().contains("told to fail"), "{error}");
        assert_eq!(broken.store.find_missing(&[root]).await.unwrap(), [root]);

        let there = broken.store.len();
        let to = Checked { store: broken.store.clone(), ..Default::default() };
        let moved = transfer::upload_tree(root, source.clone(), &to, &|_| {}).await.unwrap();
        let all = all_blobs(root, &from).len();
        assert_eq!((moved.files + moved.directories) as usize, all - there);
        for blob in all_blobs(root, &from) {
            to.store.read(blob).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_source_that_lacks_something_fails_the_upload_and_is_named() {
    let from = MemoryStore::new();
    let root = tree(&from, 307);
    let lost = Blob::of(&bytes(105, 200 + 3000 * 5));
    assert!(from.remove(&lost));
    let to = Checked::default();
    let error = transfer::upload_tree(root, Arc::new(from), &to, &|_| {}).await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound { blob, .. } if blob == lost), "{error}");
    assert_eq!(to.store.find_missing(&[root]).await.unwrap(), [root]);
}

#[tokio::test]
async fn files_that_were_scanned_are_uploaded_from_where_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let mut source = FileSource::default();
    let mut add = |name: &str, data: Bytes| {
        let path = folder.path().join(name);
        std::fs::write(&path, &data).unwrap();
        let blob = Blob::of(&data);
        source.files.insert(blob, path);
        file(blob)
    };
    let entries = [("small", add("a", bytes(1, 10))), ("large", add("b", bytes(2, 9 << 20)))];
    let root = source.directories.insert(directory(entries));
    let source = Arc::new(source);
    let to = Checked::default();
    let moved = transfer::upload_tree(root, source.clone(), &to, &|_| {}).await.unwrap();
    assert_eq!((moved.files, moved.bytes), (2, 10 + (9 << 20)));

    // A file that changed since it was scanned must not end under the wrong name.
    std::fs::write(folder.path().join("a"), b"0123456789").unwrap();
    let to = Checked::default();
    let error = transfer::upload_tree(root, source, &to, &|_| {}).await.unwrap_err();
    assert!(matches!(error, StoreError::Mismatch { .. }), "{error}");
    assert_eq!(to.store.find_missing(&[root]).await.unwrap(), [root]);
}

#[tokio::test]
async fn contents_are_uploaded_while_more_are_found_and_only_those_that_are_missing() {
    let folder = tempfile::tempdir().unwrap();
    let contents: Vec<Bytes> = (0..700).map(|n| bytes(n, 100 + 80 * n as usize)).collect();
    let large = [bytes(1000, 9 << 20), bytes(1001, 10 << 20)];
    let to = Checked::default();
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let found = futures::stream::unfold(receiver, async |mut receiver| Some((receiver.recv().await?, receiver)));
    let look = async {
        for (number, data) in contents.iter().enumerate() {
            let blob = Blob::of(data);
            if number % 3 == 0 {
                to.store.put(data.clone());
            }
            let object = if number % 2 == 0 {
                transfer::Object::Bytes(data.clone())
            } else {
                let path = folder.path().join(number.to_string());
                std::fs::write(&path, data).unwrap();
                transfer::Object::File(path)
            };
            sender.send((blob, object)).await.unwrap();
            if number == 600 {
                let written = *to.writes.lock().unwrap();
                assert!(written > 0, "nothing was sent before all was found");
            }
        }
        let path = folder.path().join("large");
        std::fs::write(&path, &large[0]).unwrap();
        sender.send((Blob::of(&large[0]), transfer::Object::File(path))).await.unwrap();
        sender.send((Blob::of(&large[1]), transfer::Object::Bytes(large[1].clone()))).await.unwrap();
        drop(sender);
    };
    let (moved, ()) = tokio::join!(transfer::upload_found(found, &to), look);
    let sent = contents.iter().enumerate().filter(|(number, _)| number % 3 != 0).map(|(_, data)| data);
    let bytes: u64 = sent.chain(&large).map(|data| data.len() as u64).sum();
    assert_eq!(moved.unwrap(), Transferred { files: 466 + 2, bytes, directories: 0 });
    for data in contents.iter().chain(&large) {
        assert_eq!(to.store.read(Blob::of(data)).await.unwrap(), data);
    }
    assert!(*to.writes.lock().unwrap() < 10, "many small ones in few messages");

    let failing = Checked { fail_from: Some(1), ..Checked::default() };
    let found = contents.iter().map(|data| (Blob::of(data), transfer::Object::Bytes(data.clone())));
    let error = transfer::upload_found(futures::stream::iter(found), &failing).await.unwrap_err();
    assert!(error.to_string().contains("told to fail"), "{error}");
}

#[tokio::test]
async fn directories_then_objects_arrive_on_a_node() {
    let store = MemoryStore::new();
    let root = tree(&store, 307);
    let from = Checked { store: store.clone(), ..Default::default() };
    let (_folder, node) = local();
    let moved = transfer::fetch_directories(root, &from, &node).await.unwrap();
    assert_eq!(moved.directories, 11);
    let mut files = HashSet::new();
    walk(&root, &node, |_, node| {
        files.extend(node.content());
        Ok::<(), StoreError>(())
    })
    .unwrap();
    assert_eq!(node.missing_contents(&files.iter().copied().collect::<Vec<_>>()).unwrap().len(), 201);

    let last = Mutex::new(Progress::default());
    let on_progress = |now: Progress| *last.lock().unwrap() = now;
    let moved = transfer::fetch_objects(root, &from, &node, &on_progress).await.unwrap();
    assert_eq!(moved.files, 201);
    assert_eq!(last.into_inner().unwrap().bytes, moved.bytes);
    for content in files {
        if !content.is_empty() {
            let path = node.object_path(&content.digest);
            assert_eq!(Blob::of_file(&path).unwrap(), content);
        }
    }
    // Everything is here: neither step asks the store for anything.
    from.read.lock().unwrap().clear();
    transfer::fetch_directories(root, &from, &node).await.unwrap();
    let moved = transfer::fetch_objects(root, &from, &node, &|_| {}).await.unwrap();
    assert_eq!(moved, Transferred::default());
    assert_eq!(*from.read.lock().unwrap(), []);

    // A related tree costs its difference.
    let next = tree(&store, 5555);
    let moved = transfer::fetch_directories(next, &from, &node).await.unwrap();
    assert_eq!(moved.directories, 3);
    let moved = transfer::fetch_objects(next, &from, &node, &|_| {}).await.unwrap();
    assert_eq!(moved.files, 1);
    assert_eq!(from.read.lock().unwrap().len(), 4);

    // And from the node to another store, as a session's upload does.
    let to = Checked::default();
    let moved = transfer::upload_tree(next, Arc::new(node), &to, &|_| {}).await.unwrap();
    assert_eq!((moved.files, moved.directories), (201, 11));
}

#[tokio::test]
async fn a_tree_that_lacks_a_directory_leaves_nothing_of_it() {
    let store = MemoryStore::new();
    let root = tree(&store, 307);
    let lost =
        store.directory(&root).unwrap().subdirectories().find(|(name, _)| name.as_bytes() == b"right").unwrap().1;
    assert!(store.remove(&lost));
    let (_folder, node) = local();
    let error = transfer::fetch_directories(root, &store, &node).await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound { blob, .. } if blob == lost), "{error}");
    assert_eq!(node.missing(&[root]).unwrap(), [root]);
    assert_eq!(node.statistics().inline_blobs, 0);
}
