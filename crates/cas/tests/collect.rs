//! Collection of a local store: what it keeps, what it deletes, and what may happen while it runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    ops::ControlFlow,
    path::Path,
    time::Duration,
};

use aether_cas::{
    Blob, LocalConfig, LocalStore, StoreError,
    collect::{Pace, Phase, Progress, Verdict},
    testing::{blob, bytes, directory, file},
    tree::{Directory, Node},
};
use tempfile::TempDir;

const HOUR: Duration = Duration::from_secs(3600);
/// A lease that has ended when it begins.
const NONE: Duration = Duration::ZERO;

fn config(folder: &Path) -> LocalConfig {
    LocalConfig { objects: folder.join("objects"), index: folder.join("index"), inline_limit: 1000 }
}

fn open(folder: &TempDir, lease: Duration) -> LocalStore {
    LocalStore::open_collected(config(folder.path()), lease).unwrap()
}

fn fresh(lease: Duration) -> (TempDir, LocalStore) {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, lease);
    (folder, store)
}

/// Stores a tree of two directories with a small and a large content; returns its root and all its blobs.
fn put_tree(store: &LocalStore, seed: u64) -> (Blob, BTreeSet<Blob>) {
    let (small, small_data) = blob(seed, 100);
    let (large, large_data) = blob(seed + 1, 5000);
    let below = directory([("large", file(large))]);
    let root = directory([("small", file(small)), ("below", Node::Directory(below.blob()))]);
    store.put_batch(vec![(small, small_data), (large, large_data)]).unwrap();
    put(store, &below);
    put(store, &root);
    (root.blob(), BTreeSet::from([small, large, below.blob(), root.blob()]))
}

/// As a client does it, which does not know of directories.
fn put(store: &LocalStore, directory: &Directory) {
    store.put_batch(vec![(directory.blob(), directory.encode())]).unwrap();
}

fn held(store: &LocalStore) -> BTreeSet<Blob> {
    let mut held = BTreeSet::new();
    store
        .for_each(|blob, _| {
            held.insert(blob);
            Ok(())
        })
        .unwrap();
    held
}

fn collect_watched(
    store: &LocalStore,
    mut watch: impl FnMut(&Progress) -> ControlFlow<()>,
) -> Result<Progress, StoreError> {
    store.collect(Pace::new(None), &mut watch)
}

fn collect(store: &LocalStore) -> Progress {
    collect_watched(store, |_| ControlFlow::Continue(())).unwrap()
}

/// Collects, and does something once when the phase begins.
fn collect_with(store: &LocalStore, phase: Phase, act: impl FnOnce()) -> Progress {
    let mut act = Some(act);
    let progress = collect_watched(store, |progress| {
        if progress.phase == phase
            && let Some(act) = act.take()
        {
            act();
        }
        ControlFlow::Continue(())
    });
    assert!(act.is_none(), "the phase came");
    progress.unwrap()
}

fn verdicts(store: &LocalStore) -> BTreeMap<Blob, Verdict> {
    let mut verdicts = BTreeMap::new();
    store
        .explain(
            &mut |blob, verdict| {
                verdicts.insert(blob, verdict);
                ControlFlow::Continue(())
            },
            &mut |_| ControlFlow::Continue(()),
        )
        .unwrap();
    verdicts
}

#[test]
fn a_pin_keeps_its_tree_and_the_rest_goes() {
    let (_folder, store) = fresh(NONE);
    let (kept, kept_blobs) = put_tree(&store, 10);
    let (gone, gone_blobs) = put_tree(&store, 20);
    store.pin("uid-1", "Checkpoint", "", kept).unwrap();
    store.pin("uid-2", "Checkpoint", "", gone).unwrap();
    let progress = collect(&store);
    assert_eq!((progress.deleted.blobs, progress.condemned.blobs), (0, 0));
    assert_eq!(progress.examined.blobs, 8);

    store.unpin("uid-2", None, None).unwrap();
    let progress = collect(&store);
    assert_eq!(held(&store), kept_blobs);
    assert_eq!(progress.deleted.blobs, 4);
    assert_eq!(progress.deleted.bytes, gone_blobs.iter().map(|blob| blob.size).sum::<u64>());
    assert_eq!(progress.directories, 2);
    let report = store.fsck(false).unwrap();
    assert!(report.is_healthy() && report.stray_files.is_empty(), "{report:?}");
    let held = store.statistics();
    assert_eq!(
        (held.inline_blobs + held.file_blobs, held.inline_bytes + held.file_bytes),
        (report.blobs, report.bytes)
    );
    assert!(!store.objects().join(".marks").exists());
    // What was deleted can come back.
    put_tree(&store, 20);
    store.pin("uid-2", "Checkpoint", "", gone).unwrap();
    assert_eq!(collect(&store).deleted.blobs, 0);
}

#[test]
fn what_was_stored_or_said_to_be_present_is_kept_until_the_lease_ends() {
    let (folder, store) = fresh(HOUR);
    let (root, blobs) = put_tree(&store, 10);
    assert_eq!(collect(&store).condemned.blobs, 0, "stored within the hour");
    drop(store);

    // The leases given from now on end at once, those given do not.
    let store = open(&folder, NONE);
    let (_, other) = put_tree(&store, 20);
    collect(&store);
    assert_eq!(held(&store), blobs);
    assert!(held(&store).is_disjoint(&other));
    drop(store);

    // No lease but that of an answer about the root: it holds for all below.
    let (folder, store) = fresh(NONE);
    let (again, blobs) = put_tree(&store, 10);
    assert_eq!(again, root);
    drop(store);
    let store = open(&folder, HOUR);
    assert_eq!(store.missing(&[root]).unwrap(), []);
    drop(store);
    let store = open(&folder, NONE);
    collect(&store);
    assert_eq!(held(&store), blobs);
}

#[test]
fn asking_again_writes_nothing_and_a_node_s_store_keeps_no_leases() {
    let (folder, store) = fresh(HOUR);
    let (root, blobs) = put_tree(&store, 10);
    let all: Vec<Blob> = blobs.into_iter().collect();
    let size =
        || fs::read_dir(folder.path().join("index")).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
    let before: u64 = size();
    for _ in 0..100 {
        assert_eq!(store.missing(&all).unwrap(), []);
        assert!(store.contains(&root).unwrap());
    }
    assert_eq!(size(), before, "the leases are young");
    drop(store);

    let store = LocalStore::open(config(folder.path())).unwrap();
    store.pin("uid", "Checkpoint", "", root).unwrap();
    let error = collect_watched(&store, |_| ControlFlow::Continue(())).unwrap_err();
    assert!(error.to_string().contains("not open for being collected"), "{error}");
}

#[test]
fn the_condemned_are_missing_but_readable_and_storing_them_again_saves_them() {
    let (_folder, store) = fresh(NONE);
    let (_, blobs) = put_tree(&store, 10);
    let (saved, data) = blob(10, 100);
    let (large, large_data) = blob(11, 5000);
    let act = || {
        let all: Vec<Blob> = blobs.iter().copied().collect();
        assert_eq!(store.missing(&all).unwrap(), all);
        assert!(!store.contains(&saved).unwrap());
        assert_eq!(store.read_blob(&saved).unwrap(), data);
        store.put_batch(vec![(saved, data.clone()), (large, large_data.clone())]).unwrap();
        assert_eq!(store.missing(&[saved, large]).unwrap(), []);
    };
    // In the midst of deletion it is not too late.
    let progress = collect_with(&store, Phase::Sweep, act);
    assert_eq!(progress.deleted.blobs, 2);
    assert_eq!(held(&store), BTreeSet::from([saved, large]));
    assert_eq!(store.read_blob(&large).unwrap(), large_data);
}

#[test]
fn a_pin_saves_a_condemned_tree_until_the_sentence_and_is_refused_after() {
    for phase in [Phase::Condemn, Phase::Rescue] {
        let (_folder, store) = fresh(NONE);
        let (root, blobs) = put_tree(&store, 10);
        let progress = collect_with(&store, phase, || store.pin("uid", "Checkpoint", "", root).unwrap());
        assert_eq!((progress.condemned.blobs, progress.rescued, progress.deleted.blobs), (4, 4, 0), "{phase:?}");
        assert_eq!(held(&store), blobs);
    }
    let (_folder, store) = fresh(NONE);
    let (root, _) = put_tree(&store, 10);
    collect_with(&store, Phase::Sweep, || {
        let error = store.pin("uid", "Checkpoint", "", root).unwrap_err();
        assert!(matches!(error, StoreError::NotFound { .. }), "{error}");
    });
    assert!(held(&store).is_empty());
    assert!(store.roots(None, None).unwrap().is_empty());
}

/// The pin comes between the second marking and the sentence: only the count of appeals tells.
#[test]
fn an_appeal_in_the_last_moment_is_heard() {
    let (_folder, store) = fresh(NONE);
    let (root, blobs) = put_tree(&store, 10);
    let mut pages = 0;
    let progress = collect_watched(&store, |progress| {
        // Called when the phase begins, and then after the one page of condemned blobs was found not to be marked.
        pages += u32::from(progress.phase == Phase::Rescue);
        if progress.phase == Phase::Rescue && pages == 2 {
            assert_eq!(progress.rescued, 0);
            store.pin("uid", "Checkpoint", "", root).unwrap();
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!((progress.deleted.blobs, progress.rescued), (0, 4));
    assert_eq!(held(&store), blobs);
}

/// A directory is said to be present when what is below it is condemned already, but itself not yet.
#[test]
fn a_lease_given_during_the_condemning_saves_all_below() {
    let (folder, store) = fresh(NONE);
    let (root, blobs) = put_tree(&store, 10);
    drop(store);
    let store = open(&folder, HOUR);
    collect_with(&store, Phase::Condemn, || assert_eq!(store.missing(&[root]).unwrap(), []));
    assert_eq!(held(&store), blobs);
    assert_eq!(store.missing(&blobs.iter().copied().collect::<Vec<_>>()).unwrap(), [], "none is condemned");
}

#[test]
fn below_a_pin_that_is_incomplete_anything_may_be_so_nothing_goes() {
    let (_folder, store) = fresh(NONE);
    let (kept, _) = put_tree(&store, 10);
    let (_, rest) = put_tree(&store, 20);
    store.pin("uid", "Checkpoint", "c", kept).unwrap();
    let below = directory([("large", file(blob(11, 5000).0))]);
    store.remove(&[below.blob()]).unwrap();
    let progress = collect(&store);
    assert_eq!((progress.condemned.blobs, progress.deleted.blobs), (0, 0));
    assert_eq!(progress.incomplete.len(), 1);
    assert_eq!(progress.incomplete[0].root.name, "c");
    assert!(progress.incomplete[0].problem.contains(&below.blob().to_string()));
    assert!(held(&store).is_superset(&rest));
    // Brought back, or unpinned: it goes on.
    put(&store, &below);
    assert_eq!(collect(&store).deleted.blobs, 4);
}

#[test]
fn a_pin_that_comes_with_a_gap_below_what_was_leased_stops_the_collection() {
    let (folder, store) = fresh(NONE);
    let (_, loose) = put_tree(&store, 20);
    drop(store);
    let store = open(&folder, HOUR);
    let gap = directory([("gone", Node::Directory(blob(9, 50).0))]);
    put(&store, &gap);
    let progress = collect_with(&store, Phase::Rescue, || store.pin("uid", "Checkpoint", "c", gap.blob()).unwrap());
    assert_eq!((progress.condemned.blobs, progress.deleted.blobs, progress.incomplete.len()), (4, 0, 1));
    assert!(held(&store).is_superset(&loose));
    // With no such pin a gap below a lease stops nothing, whatever else is pinned meanwhile.
    store.unpin("uid", None, None).unwrap();
    let pinned = directory([("content", file(Blob::EMPTY))]);
    put(&store, &pinned);
    collect_with(&store, Phase::Rescue, || store.pin("uid", "Checkpoint", "d", pinned.blob()).unwrap());
    assert_eq!(held(&store), BTreeSet::from([gap.blob(), pinned.blob()]));
}

#[test]
fn what_an_older_version_stored_is_left_alone_for_one_lease() {
    let folder = tempfile::tempdir().unwrap();
    let store = LocalStore::open(config(folder.path())).unwrap();
    put_tree(&store, 10);
    drop(store);
    let store = open(&folder, HOUR);
    let progress = collect(&store);
    assert!(progress.protected_until.is_some() && progress.condemned.blobs == 0);
    drop(store);
    let store = open(&folder, NONE);
    assert_eq!(collect(&store).condemned.blobs, 0, "the time was set once");

    let folder = tempfile::tempdir().unwrap();
    let store = LocalStore::open(config(folder.path())).unwrap();
    put_tree(&store, 10);
    drop(store);
    let store = open(&folder, NONE);
    assert_eq!(collect(&store).deleted.blobs, 4);
}

#[test]
fn a_dry_run_gives_the_reason_of_each_blob_and_changes_nothing() {
    let (folder, store) = fresh(NONE);
    let (pinned, pinned_blobs) = put_tree(&store, 10);
    let (_, loose) = put_tree(&store, 20);
    store.pin("uid", "SessionHead", "", pinned).unwrap();
    drop(store);
    let store = open(&folder, HOUR);
    let (_, leased) = put_tree(&store, 30);
    for (blob, verdict) in verdicts(&store) {
        match verdict {
            Verdict::Pinned(root) => assert!(root.owner_uid == "uid" && pinned_blobs.contains(&blob)),
            Verdict::Leased(until) => assert!(until > 0 && leased.contains(&blob)),
            Verdict::Unreachable => assert!(loose.contains(&blob)),
            Verdict::Condemned(_) => panic!("{blob}"),
        }
    }
    assert_eq!(held(&store).len(), 12);
    let error = collect_watched(&store, |progress| match progress.phase {
        Phase::Rescue => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    assert!(matches!(error, Err(StoreError::Closed(_))), "{error:?}");
    for (blob, verdict) in verdicts(&store) {
        assert_eq!(loose.contains(&blob), matches!(verdict, Verdict::Condemned(_)), "{blob} {verdict:?}");
    }
}

/// Broken off anywhere and reopened, a collection does the rest and no more.
#[test]
fn what_was_broken_off_is_finished() {
    let store_with_garbage = || {
        let (folder, store) = fresh(NONE);
        let (root, blobs) = put_tree(&store, 10);
        for seed in [20, 30, 40] {
            put_tree(&store, seed);
        }
        store.pin("uid", "Checkpoint", "", root).unwrap();
        (folder, store, blobs)
    };
    let mut whole = 0;
    let (_folder, store, _) = store_with_garbage();
    collect_watched(&store, |_| {
        whole += 1;
        ControlFlow::Continue(())
    })
    .unwrap();
    assert!(whole > 8, "{whole}");
    for stop_at in 1..=whole {
        let (folder, store, blobs) = store_with_garbage();
        let mut calls = 0;
        let stopped = collect_watched(&store, |_| {
            calls += 1;
            if calls == stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(stopped.is_err(), "{stop_at} of {whole}");
        drop(store);
        let store = open(&folder, NONE);
        collect(&store);
        assert_eq!(held(&store), blobs, "stopped at call {stop_at} of {whole}");
        assert!(store.fsck(false).unwrap().is_healthy());
    }
}

fn disk_usage(folder: &Path) -> u64 {
    let mut bytes = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let metadata = entry.metadata().unwrap();
        bytes += if metadata.is_dir() { disk_usage(&entry.path()) } else { metadata.len() };
    }
    bytes
}

#[test]
fn the_space_is_given_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.inline_limit = 16 << 10;
    let store = LocalStore::open_collected(config.clone(), NONE).unwrap();
    // Of all sizes: in rows, in blob files of the index, and as files.
    let mut kept = None;
    for round in 0..20 {
        let batch: Vec<_> = (0..60)
            .flat_map(|n| [1000, 12_000, 40_000].map(|size| blob(round * 1000 + n * 3 + size as u64 % 7, size)))
            .collect();
        let names: Vec<String> = (0..batch.len()).map(|n| n.to_string()).collect();
        let tree = directory(names.iter().zip(&batch).map(|(name, (blob, _))| (name.as_str(), file(*blob))));
        store.put_batch(batch).unwrap();
        put(&store, &tree);
        kept = Some(tree.blob());
    }
    store.pin("uid", "Checkpoint", "", kept.unwrap()).unwrap();
    drop(store);
    // What was in the log of the index is in its tables now.
    let store = LocalStore::open_collected(config.clone(), NONE).unwrap();
    let before = disk_usage(folder.path());
    let logical = |store: &LocalStore| store.statistics().inline_bytes + store.statistics().file_bytes;
    let stored = logical(&store);
    let progress = collect(&store);
    let after = disk_usage(folder.path());
    let left = logical(&store);
    assert_eq!(progress.deleted.bytes, stored - left);
    assert!(left * 15 < stored, "{left} of {stored}");
    assert!(after < before / 8, "{after} of {before} bytes on disk, {left} of {stored} stored");
    assert_eq!(store.read_blob(&blob(19_000 + 1000 % 7, 1000).0).unwrap(), bytes(19_000 + 1000 % 7, 1000));
}
