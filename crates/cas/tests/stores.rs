//! Every kind of store against the conformance suite, and what is particular to the local one.
//! (The remote store runs the suite against a store node, in `store-node/tests`.)

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use aether_cas::{
    Blob, LocalConfig, LocalStore, MemoryStore, Store, StoreError,
    testing::{blob, bytes, conformance, directory, file},
    tree::{Directories, Node},
};
use tempfile::TempDir;

fn open(folder: &Path, inline_limit: u64) -> Result<LocalStore, StoreError> {
    LocalStore::open(LocalConfig { objects: folder.join("objects"), index: folder.join("index"), inline_limit })
}

fn fresh(inline_limit: u64) -> (TempDir, LocalStore) {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path(), inline_limit).unwrap();
    (folder, store)
}

/// Pretends that the last user of the store did not close it.
fn crash(folder: &Path) {
    let index = folder.join("index");
    let options = rocksdb::Options::default();
    let families = rocksdb::DB::list_cf(&options, &index).unwrap();
    let db = rocksdb::DB::open_cf(&options, index, families).unwrap();
    assert!(db.get(b"clean").unwrap().is_some(), "it was closed");
    db.delete(b"clean").unwrap();
}

fn set_writable(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
}

#[tokio::test]
async fn memory_conforms() {
    conformance(&MemoryStore::new()).await;
}

#[tokio::test]
async fn local_with_inline_blobs_conforms() {
    let (folder, store) = fresh(16 << 10);
    conformance(&store).await;
    drop(store);
    // Once more on what it has become, after a reopen.
    let store = open(folder.path(), 16 << 10).unwrap();
    assert_eq!(store.read(blob(1000, 1).0).await.unwrap().len(), 1);
    assert_eq!(store.read(blob(1009, 9 << 20).0).await.unwrap().len(), 9 << 20);
    let report = store.fsck(false).unwrap();
    assert!(report.is_healthy() && report.stray_files.is_empty(), "{report:?}");
    let statistics = store.statistics();
    assert_eq!(statistics.inline_blobs + statistics.file_blobs, report.blobs);
    assert_eq!(statistics.inline_bytes + statistics.file_bytes, report.bytes);
}

#[tokio::test]
async fn local_with_files_only_conforms() {
    let (_folder, store) = fresh(0);
    conformance(&store).await;
    assert_eq!(store.statistics().inline_blobs, 0);
    let left = fs::read_dir(store.objects().join(".tmp")).unwrap().count();
    assert_eq!(left, 0, "temporary files are gone");
}

#[test]
fn objects_are_read_only_files_named_by_digest() {
    let (_folder, store) = fresh(0);
    let (blob, data) = blob(1, 1000);
    store.put_batch(vec![(blob, data.clone())]).unwrap();
    let path = store.object_path(&blob.digest);
    assert_eq!(path, store.objects().join(blob.digest.object_path()));
    assert_eq!(fs::read(&path).unwrap(), data);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o444);
}

#[test]
fn survives_reopening_and_refuses_a_second_opener() {
    let (folder, store) = fresh(100);
    let (small, small_data) = blob(1, 100);
    let (large, large_data) = blob(2, 101);
    store.put_batch(vec![(small, small_data.clone()), (large, large_data.clone())]).unwrap();
    let error = open(folder.path(), 100).unwrap_err();
    assert!(matches!(error, StoreError::Index { action: "open", .. }), "{error}");
    assert_eq!(store.read_blob(&small).unwrap(), small_data, "the first one is unharmed");
    let before = store.statistics();
    drop(store);

    let store = open(folder.path(), 100).unwrap();
    assert_eq!(store.read_blob(&small).unwrap(), small_data);
    assert_eq!(store.read_blob(&large).unwrap(), large_data);
    assert_eq!(store.statistics(), before);
}

#[test]
fn refuses_an_unknown_format() {
    let (folder, store) = fresh(0);
    drop(store);
    let options = rocksdb::Options::default();
    let index = folder.path().join("index");
    let families = rocksdb::DB::list_cf(&options, &index).unwrap();
    let db = rocksdb::DB::open_cf(&options, index, families).unwrap();
    db.put(b"format", b"99").unwrap();
    drop(db);
    for _ in 0..2 {
        let error = open(folder.path(), 0).unwrap_err();
        assert!(matches!(&error, StoreError::UnknownFormat { found, .. } if found == "99"), "{error}");
    }
}

#[test]
fn leftovers_of_a_crash_are_swept_and_lost_files_forgotten() {
    let (folder, store) = fresh(0);
    let blobs: Vec<_> = (0..4).map(|n| blob(n, 5000)).collect();
    store.put_batch(blobs.clone()).unwrap();
    let paths: Vec<PathBuf> = blobs.iter().map(|(b, _)| store.object_path(&b.digest)).collect();
    let leftover = store.temporary_path();
    fs::write(&leftover, b"half").unwrap();
    drop(store);
    crash(folder.path());
    // What a file system may do to files in a power cut.
    set_writable(&paths[1]);
    fs::write(&paths[1], b"").unwrap();
    fs::remove_file(&paths[2]).unwrap();

    let store = open(folder.path(), 0).unwrap();
    assert!(!leftover.exists());
    let names: Vec<Blob> = blobs.iter().map(|(b, _)| *b).collect();
    assert_eq!(store.missing(&names).unwrap(), [names[1], names[2]]);
    assert_eq!(store.statistics().file_blobs, 2);
    store.put_batch(blobs.clone()).unwrap();
    for (blob, data) in &blobs {
        assert_eq!(store.read_blob(blob).unwrap(), data);
    }
}

#[test]
fn a_damaged_copy_is_reported_set_aside_and_replaced() {
    let (_folder, store) = fresh(0);
    let (blob, data) = blob(1, 3000);
    store.put_batch(vec![(blob, data.clone())]).unwrap();
    let path = store.object_path(&blob.digest);
    set_writable(&path);
    let mut bad = data.to_vec();
    bad[1500] ^= 0x10;
    fs::write(&path, &bad).unwrap();

    let error = store.read_blob(&blob).unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { blob: b, .. } if b == blob), "{error}");
    assert!(matches!(store.read_blob(&blob), Err(StoreError::NotFound { .. })));
    assert_eq!(store.missing(&[blob]).unwrap(), [blob]);
    let aside = store.objects().join(".damaged").join(blob.digest.to_string());
    assert_eq!(fs::read(aside).unwrap(), bad);

    store.put_batch(vec![(blob, data.clone())]).unwrap();
    assert_eq!(store.read_blob(&blob).unwrap(), data);
    assert_eq!(store.statistics().file_blobs, 1);
}

#[test]
fn adopts_files_that_others_wrote() {
    let (_folder, store) = fresh(0);
    let (a, a_data) = blob(1, 3000);
    let (b, b_data) = blob(2, 10);
    let path = |data: &[u8]| {
        let path = store.temporary_path();
        fs::write(&path, data).unwrap();
        path
    };
    let (pa, pb) = (path(&a_data), path(&b_data));
    store.adopt_batch(vec![(a, pa.clone()), (b, pb.clone())]).unwrap();
    assert!(!pa.exists() && !pb.exists());
    assert_eq!(store.read_blob(&a).unwrap(), a_data);
    assert_eq!(store.read_blob(&b).unwrap(), b_data);

    // Again: the copy is superfluous and goes; the object stays the same file.
    use std::os::unix::fs::MetadataExt;
    let inode = fs::metadata(store.object_path(&a.digest)).unwrap().ino();
    let pa = path(&a_data);
    store.adopt_batch(vec![(a, pa.clone())]).unwrap();
    assert!(!pa.exists());
    assert_eq!(fs::metadata(store.object_path(&a.digest)).unwrap().ino(), inode);

    let (c, _) = blob(3, 77);
    let wrong = path(b"not 77 bytes");
    let error = store.adopt_batch(vec![(c, wrong)]).unwrap_err();
    assert!(error.to_string().contains("12 bytes"), "{error}");
    assert_eq!(store.missing(&[c]).unwrap(), [c]);
}

#[test]
fn a_directory_does_not_pass_for_a_file_with_the_same_bytes() {
    let (_folder, store) = fresh(0);
    let directory = directory([("f", file(Blob::of(b"x")))]);
    let blob = store.put_directory(&directory).unwrap();
    assert_eq!(*store.directory(&blob).unwrap(), directory);
    assert_eq!(store.missing(&[blob]).unwrap(), []);
    assert_eq!(store.missing_contents(&[blob]).unwrap(), [blob]);
    assert!(!store.object_path(&blob.digest).exists());

    store.put_batch(vec![(blob, directory.encode())]).unwrap();
    assert_eq!(store.missing_contents(&[blob]).unwrap(), []);
    assert!(store.object_path(&blob.digest).exists());
    let statistics = store.statistics();
    assert_eq!((statistics.inline_blobs, statistics.file_blobs), (1, 1));

    // Removal takes both forms.
    store.remove(&[blob]).unwrap();
    assert_eq!(store.missing(&[blob]).unwrap(), [blob]);
    assert!(!store.object_path(&blob.digest).exists());
    assert!(matches!(store.directory(&blob), Err(StoreError::NotFound { .. })));
}

#[test]
fn a_blob_that_is_no_directory_is_named() {
    let (_folder, store) = fresh(100);
    let (blob, data) = blob(1, 50);
    store.put_batch(vec![(blob, data)]).unwrap();
    let error = store.directory(&blob).unwrap_err();
    assert!(matches!(error, StoreError::NotADirectory { .. }));
    assert!(error.to_string().contains(&blob.to_string()), "{error}");
}

#[tokio::test]
async fn pieces_become_a_blob_only_when_whole() {
    let (_folder, store) = fresh(100);
    for length in [100, 5000] {
        let (blob, data) = blob(length as u64, length);
        let mut ingest = store.begin(blob).unwrap();
        ingest.append(&data[..40]).unwrap();
        assert_eq!(ingest.written(), 40);
        let error = ingest.append(&data[..length - 39]).unwrap_err();
        assert!(error.to_string().contains(&format!("sent of {length}")), "{error}");
        ingest.append(&data[40..]).unwrap();
        assert_eq!(store.missing(&[blob]).unwrap(), [blob]);
        ingest.finish().await.unwrap();
        assert_eq!(store.read_blob(&blob).unwrap(), data);

        let (other, data) = aether_cas::testing::blob(1 + length as u64, length);
        let mut short = store.begin(other).unwrap();
        short.append(&data[..40]).unwrap();
        assert!(matches!(short.finish().await, Err(StoreError::Mismatch { .. })));
        let mut dropped = store.begin(other).unwrap();
        dropped.append(&data).unwrap();
        drop(dropped);
        assert_eq!(store.missing(&[other]).unwrap(), [other]);
    }
    let left = fs::read_dir(store.objects().join(".tmp")).unwrap().count();
    assert_eq!(left, 0);
}

#[test]
fn roots_are_pinned_listed_and_forgotten() {
    let (folder, store) = fresh(1000);
    let a = store.put_directory(&directory([("a", file(Blob::EMPTY))])).unwrap();
    let b = store.put_directory(&directory([("b", file(Blob::EMPTY))])).unwrap();
    let absent = Blob::of(b"absent");
    assert!(matches!(store.pin("uid-1", "Checkpoint", "", absent), Err(StoreError::NotFound { .. })));
    for (owner, kind, name) in [("", "k", ""), ("u", "", ""), ("u\0", "k", ""), ("u", "k", "\0")] {
        assert!(matches!(store.pin(owner, kind, name, a), Err(StoreError::Invalid(_))));
    }
    store.pin("uid-1", "SourceRevision", "r1", a).unwrap();
    store.pin("uid-1", "SourceRevision", "r2", a).unwrap();
    store.pin("uid-1", "SourceRevision", "r2", b).unwrap();
    store.pin("uid-2", "SessionHead", "", a).unwrap();
    drop(store);

    let store = open(folder.path(), 1000).unwrap();
    let list = |owner, kind| -> Vec<(String, String, Blob)> {
        let roots = store.roots(owner, kind).unwrap();
        assert!(roots.iter().all(|root| root.pinned_at > 1_500_000_000));
        roots.into_iter().map(|r| (r.owner_uid, r.name, r.tree)).collect()
    };
    let of = |owner: &str, name: &str, tree| (owner.to_owned(), name.to_owned(), tree);
    assert_eq!(list(None, None), [of("uid-1", "r1", a), of("uid-1", "r2", b), of("uid-2", "", a)]);
    assert_eq!(list(Some("uid-2"), None), [of("uid-2", "", a)]);
    assert_eq!(list(None, Some("SessionHead")), [of("uid-2", "", a)]);
    assert_eq!(store.unpin("uid-1", None, Some("r1")).unwrap(), 1);
    assert_eq!(store.unpin("uid-1", Some("SessionHead"), None).unwrap(), 0);
    assert_eq!(store.unpin("uid-1", None, None).unwrap(), 1);
    assert_eq!(list(None, None), [of("uid-2", "", a)]);
}

#[test]
fn fsck_finds_damage_strays_and_incomplete_roots() {
    let (_folder, store) = fresh(10);
    let (good, good_data) = blob(1, 3000);
    let (bad, bad_data) = blob(2, 3000);
    let absent = Blob::of(&bytes(3, 3000));
    store.put_batch(vec![(good, good_data), (bad, bad_data.clone())]).unwrap();
    let tree = |content| {
        let below = store.put_directory(&directory([("f", file(content))])).unwrap();
        store.put_directory(&directory([("d", Node::Directory(below))])).unwrap()
    };
    let (complete, damaged, lacking) = (tree(good), tree(bad), tree(absent));
    for (name, root) in [("complete", complete), ("damaged", damaged), ("lacking", lacking)] {
        store.pin("u", "k", name, root).unwrap();
    }
    let path = store.object_path(&bad.digest);
    set_writable(&path);
    fs::write(&path, bytes(4, 3000)).unwrap();
    let stray = store.object_path(&absent.digest);
    fs::write(&stray, b"left by a crash").unwrap();

    for repair in [false, true] {
        let report = store.fsck(repair).unwrap();
        assert_eq!(report.blobs, 8);
        assert_eq!(report.damaged, [bad]);
        assert_eq!(report.stray_files, std::slice::from_ref(&stray));
        assert_eq!(report.repaired, repair);
        let roots: Vec<_> =
            report.incomplete_roots.iter().map(|i| (i.root.name.as_str(), i.problem.as_str())).collect();
        let [("damaged", first), ("lacking", second)] = roots[..] else { panic!("{roots:?}") };
        assert!(first.contains(&bad.to_string()), "{first}");
        assert!(second.contains(&absent.to_string()), "{second}");
        assert!(!report.is_healthy());
    }
    assert!(!stray.exists());
    assert_eq!(store.missing(&[bad]).unwrap(), [bad], "so a client uploads it again");
    store.put_batch(vec![(bad, bad_data)]).unwrap();
    store.unpin("u", None, Some("lacking")).unwrap();
    let report = store.fsck(false).unwrap();
    assert!(report.is_healthy() && report.stray_files.is_empty(), "{report:?}");
}

#[test]
fn many_writers_share_commits() {
    let (_folder, store) = fresh(1000);
    std::thread::scope(|scope| {
        for writer in 0..8u64 {
            let store = &store;
            scope.spawn(move || {
                for n in 0..20 {
                    let batch: Vec<_> =
                        (0..10).map(|k| blob(writer % 4 * 10_000 + n * 10 + k, 500 + 100 * k as usize)).collect();
                    let names: Vec<Blob> = batch.iter().map(|(b, _)| *b).collect();
                    store.put_batch(batch).unwrap();
                    assert_eq!(store.missing(&names).unwrap(), []);
                }
            });
        }
    });
    let report = store.fsck(false).unwrap();
    assert!(report.is_healthy() && report.stray_files.is_empty(), "{report:?}");
    assert_eq!(report.blobs, 4 * 200);
}
