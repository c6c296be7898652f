//! The scrub of a local store: finds what was flipped, keeps its place, and says whom it concerns.

use std::{
    cell::Cell,
    fs,
    num::NonZeroU64,
    ops::ControlFlow,
    os::unix::fs::{PermissionsExt, symlink},
    path::PathBuf,
    time::Duration,
};

use aether_cas::{
    Blob, LocalConfig, LocalStore, StoreError,
    collect::Pace,
    local::ScrubState,
    testing::{blob, directory, file},
    tree::Node,
};
use tempfile::TempDir;

const HOUR: Duration = Duration::from_secs(3600);

fn open(folder: &TempDir) -> LocalStore {
    let config =
        LocalConfig { objects: folder.path().join("objects"), index: folder.path().join("index"), inline_limit: 1000 };
    LocalStore::open_collected(config, HOUR).unwrap()
}

fn flip(store: &LocalStore, blob: &Blob) {
    let path = store.object_path(&blob.digest);
    let mut data = fs::read(&path).unwrap();
    data[blob.size as usize / 2] ^= 4;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&path, data).unwrap();
}

fn nowhere(_: &Blob) -> Result<bool, StoreError> {
    Ok(false)
}

fn scrub(store: &LocalStore) -> ScrubState {
    store.scrub(Pace::new(None), &nowhere, &mut |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn a_flipped_bit_is_found_and_reported_by_pin_and_path_until_it_is_stored_again() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let (small, small_data) = blob(1, 100);
    let (large, large_data) = blob(2, 50_000);
    let (other, other_data) = blob(3, 50_000);
    store.put_batch(vec![(small, small_data), (large, large_data.clone()), (other, other_data)]).unwrap();
    let below = directory([("large", file(large)), ("twin", file(large)), ("small", file(small))]);
    let whole = directory([("other", file(other)), ("small", file(small))]);
    let root = directory([("a", Node::Directory(below.blob())), ("b", Node::Directory(whole.blob()))]);
    let pinned = store.put_directories([&below, &whole, &root]).unwrap();
    store.pin("session-uid", "SessionHead", "", pinned[2]).unwrap();
    store.pin("checkpoint-uid", "Checkpoint", "", pinned[0]).unwrap();
    store.pin("other-uid", "Checkpoint", "", pinned[1]).unwrap();

    let state = scrub(&store);
    assert_eq!((state.passes, state.blobs, state.damaged, state.is_running()), (1, 6, 0, false));
    assert!(state.ended_at >= state.began_at && state.began_at > 0);
    assert_eq!(store.damages(10).unwrap(), []);

    flip(&store, &large);
    let state = scrub(&store);
    assert_eq!((state.passes, state.damaged, state.healed), (2, 1, 0));
    assert_eq!(store.missing(&[large, other, small]).unwrap(), [large]);
    assert!(folder.path().join("objects/.damaged").join(large.digest.to_string()).exists());
    let damages = store.damages(10).unwrap();
    assert_eq!((damages.len(), damages[0].blob), (1, large));
    assert!(damages[0].reason.contains("digest"), "{}", damages[0].reason);

    let affected = store.affected(&damages, 1).unwrap();
    let found: Vec<_> = affected.iter().map(|a| (a.root.owner_uid.as_str(), a.paths.clone(), a.more)).collect();
    assert_eq!(
        found,
        [
            ("checkpoint-uid", vec![(PathBuf::from("large"), large)], 1),
            ("session-uid", vec![(PathBuf::from("a/large"), large)], 1),
        ]
    );

    store.put_batch(vec![(large, large_data)]).unwrap();
    assert_eq!(store.damages(10).unwrap(), []);
    assert_eq!(store.affected(&[], 10).unwrap(), []);
}

#[test]
fn a_lost_directory_stands_for_all_below() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let below = directory([("empty", file(Blob::EMPTY))]);
    let middle = directory([("below", Node::Directory(below.blob()))]);
    let root = directory([("middle", Node::Directory(middle.blob()))]);
    let blobs = store.put_directories([&below, &middle, &root]).unwrap();
    store.pin("uid", "Checkpoint", "", blobs[2]).unwrap();
    store.remove(&[blobs[0]]).unwrap();
    let affected = store.affected(&[], 10).unwrap();
    assert_eq!(affected.len(), 1);
    assert_eq!(affected[0].paths, [(PathBuf::from("middle/below"), blobs[0])]);
}

#[test]
fn another_copy_heals() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let (large, data) = blob(2, 50_000);
    store.put_batch(vec![(large, data.clone())]).unwrap();
    flip(&store, &large);
    let bucket = |blob: &Blob| store.put_batch(vec![(*blob, data.clone())]).map(|()| true);
    let state = store.scrub(Pace::new(None), &bucket, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!((state.damaged, state.healed), (1, 1));
    assert_eq!(store.read_blob(&large).unwrap(), data);
    assert_eq!(store.damages(10).unwrap(), []);
}

#[test]
fn a_pass_goes_on_where_it_was_broken_off() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(&folder);
    let batch: Vec<_> = (0..40).map(|n| blob(n, if n % 2 == 0 { 100 } else { 5000 })).collect();
    let bytes: u64 = batch.iter().map(|(blob, _)| blob.size).sum();
    store.put_batch(batch).unwrap();
    let mut last = ScrubState::default();
    for round in 1.. {
        let left = Cell::new(20);
        let state = store
            .scrub(Pace::new(None), &nowhere, &mut |_| {
                left.set(left.get() - 1);
                if left.get() == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
            .unwrap();
        assert!(state.bytes > last.bytes, "it gets on");
        last = state;
        drop(store);
        store = open(&folder);
        assert_eq!(store.scrub_state().unwrap(), last, "over a restart");
        if !state.is_running() {
            assert!(round > 2);
            break;
        }
    }
    assert_eq!((last.blobs, last.bytes, last.passes), (40, bytes, 1), "each was read once");
}

/// The memory of a process at address 0 is a file that opens, and whose reads fail as those of a bad sector do.
#[test]
fn a_copy_that_the_disk_cannot_read_is_damaged_and_what_is_behind_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let mut contents: Vec<_> = (0..5).map(|n| blob(n, 50_000)).collect();
    contents.sort_by_key(|(blob, _)| blob.digest);
    store.put_batch(contents.clone()).unwrap();
    let unreadable = |blob: &Blob| {
        let path = store.object_path(&blob.digest);
        fs::remove_file(&path).unwrap();
        symlink("/proc/self/mem", &path).unwrap();
    };
    let [(first, _), (second, _)] = [&contents[0], &contents[1]];
    unreadable(first);
    let state = scrub(&store);
    assert_eq!((state.passes, state.blobs, state.damaged), (1, 5, 1));
    let damages = store.damages(10).unwrap();
    assert_eq!((damages.len(), damages[0].blob), (1, *first));
    assert!(damages[0].reason.contains("cannot be read"), "{}", damages[0].reason);

    unreadable(second);
    assert_eq!(store.fsck(false).unwrap().damaged, [*second]);
    let error = store.read_blob(second).unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
    assert_eq!(store.missing(&[*first, *second]).unwrap(), [*first, *second]);
    store.put_batch(contents).unwrap();
    assert_eq!(scrub(&store).damaged, 0);
    assert_eq!(store.damages(10).unwrap(), []);
}

#[test]
fn a_row_of_the_index_that_is_damaged_is_a_damaged_copy() {
    let folder = tempfile::tempdir().unwrap();
    let (objects, index) = (folder.path().join("objects"), folder.path().join("index"));
    let config = LocalConfig { objects, index: index.clone(), inline_limit: 1 << 20 };
    let open = || LocalStore::open_collected(config.clone(), HOUR).unwrap();
    let contents: Vec<_> = (0..5).map(|n| blob(n, 50_000)).collect();
    let store = open();
    store.put_batch(contents.clone()).unwrap();
    drop(store);
    // What was in the log of the index is in its tables now.
    drop(open());
    let (damaged, data) = &contents[2];
    let mut flipped = 0;
    for entry in fs::read_dir(&index).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "blob") {
            continue;
        }
        let mut file = fs::read(&path).unwrap();
        if let Some(at) = file.windows(64).position(|window| window == &data[1000..1064]) {
            file[at] ^= 1;
            fs::write(&path, file).unwrap();
            flipped += 1;
        }
    }
    assert_eq!(flipped, 1);

    let store = open();
    let state = scrub(&store);
    assert_eq!((state.passes, state.blobs, state.damaged), (1, 5, 1));
    assert_eq!(store.missing(&contents.iter().map(|(blob, _)| *blob).collect::<Vec<_>>()).unwrap(), [*damaged]);
    store.put_batch(contents).unwrap();
    assert_eq!(scrub(&store).damaged, 0);
}

#[test]
fn it_keeps_its_pace() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    store.put_batch((0..10).map(|n| blob(n, 50_000)).collect()).unwrap();
    let begin = std::time::Instant::now();
    let pace = Pace::new(NonZeroU64::new(1_000_000));
    let state = store.scrub(pace, &nowhere, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(state.bytes, 500_000);
    assert!(begin.elapsed() >= Duration::from_millis(490), "{:?}", begin.elapsed());
}
