//! What a collection of a bucket deletes, and what it must not: each danger by itself. All at once is in `property_bucket`.

#[path = "common/bucket.rs"]
mod client;

use std::{
    ops::ControlFlow,
    sync::Arc,
    time::{Duration, Instant},
};

use aether_cas::{
    Blob, Store, StoreError,
    collect::{Pace, Phase, Progress},
    durable::{Terms, Why, format::MAX_SHARED_BLOB},
    testing::{blob, bucket::TestBucket, directory, file},
    tree::Node,
};
use bytes::Bytes;
use client::Client;

/// Leases that end at once: nothing but pins, and what was promised a moment ago, is kept.
const SHORT: Terms =
    Terms { lease: Duration::from_millis(300), view: Duration::from_millis(400), skew: Duration::ZERO };

fn go_on(_: &Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

async fn nodes<const N: usize>(terms: Terms, bucket: &TestBucket) -> [Arc<Client>; N] {
    let mut nodes = Vec::new();
    for _ in 0..N {
        nodes.push(Arc::new(Client::open(terms, bucket.beside()).await.unwrap()));
    }
    nodes.try_into().unwrap_or_else(|_| unreachable!("so many were opened"))
}

/// A directory with files of these contents, and the blobs of both.
fn tree(contents: &[(Blob, Bytes)]) -> (Blob, Bytes) {
    let names: Vec<String> = (0..contents.len()).map(|n| format!("f{n}")).collect();
    let made = directory(names.iter().zip(contents).map(|(name, (blob, _))| (name.as_str(), file(*blob))));
    (made.blob(), made.encode())
}

async fn leases_end(terms: Terms) {
    tokio::time::sleep(terms.lease + Duration::from_millis(50)).await;
}

async fn held(node: &Client) -> Vec<Blob> {
    let mut held = Vec::new();
    for pack in node.durable.packs().unwrap() {
        held.extend(node.durable.pack_entries(pack).unwrap().into_iter().map(|entry| entry.blob));
    }
    held.sort_unstable();
    held
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pinned_stays_and_the_rest_goes_with_its_packs() {
    let bucket = TestBucket::default();
    let [a, b] = nodes(SHORT, &bucket).await;
    // Needed and not, in one pack; some alone in theirs.
    let contents: Vec<_> = (0..20).map(|n| blob(n, 1000)).collect();
    let large = [blob(100, MAX_SHARED_BLOB as usize + 1), blob(101, MAX_SHARED_BLOB as usize + 2)];
    a.write_batch(contents.clone()).await.unwrap();
    a.write_batch(large.to_vec()).await.unwrap();
    let kept: Vec<_> = contents[..5].iter().cloned().chain([large[0].clone()]).collect();
    let (root, message) = tree(&kept);
    let (other, nobody) = tree(&contents[5..]);
    a.write_batch(vec![(root, message), (other, nobody)]).await.unwrap();
    a.durable.pin("uid", "Checkpoint", "", root).await.unwrap();

    // As long as there are leases nothing goes.
    let done = b.collect(0, go_on).await.unwrap();
    assert_eq!((done.condemned.blobs, done.deleted.blobs), (0, 0), "{done:?}");
    leases_end(SHORT).await;
    let done = b.collect(0, go_on).await.unwrap();
    assert_eq!((done.condemned.blobs, done.deleted.blobs), (17, 17), "{done:?}");
    let mut expected: Vec<Blob> = kept.iter().map(|(blob, _)| *blob).chain([root]).collect();
    expected.sort_unstable();
    assert_eq!(held(&b).await, expected);
    for (blob, data) in &kept {
        assert_eq!(b.get(*blob).await.unwrap(), *data);
    }

    // A node that knows little of it yet does not count on what is gone.
    a.durable.refresh(Instant::now()).await.unwrap();
    assert_eq!(a.find_missing(&[root, contents[7].0, other, kept[0].0]).await.unwrap(), [contents[7].0, other]);
    let gone = a.durable.rebuild().await.unwrap();
    assert!(!gone.is_empty() && gone.iter().all(|gone| gone.why == Why::Collected), "{gone:?}");
    let error = a.get(contents[7].0).await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound { .. }), "{error}");
    // And can be given it again.
    a.write_batch(vec![contents[7].clone()]).await.unwrap();
    assert_eq!(a.find_missing(&[contents[7].0]).await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_node_promises_by_an_old_list_of_the_condemned_is_saved() {
    let bucket = TestBucket::default();
    let [a, b] = nodes(SHORT, &bucket).await;
    let contents = vec![blob(1, 1000), blob(2, MAX_SHARED_BLOB as usize + 1)];
    let (root, message) = tree(&contents);
    a.write_batch(contents.clone()).await.unwrap();
    a.write_batch(vec![(root, message)]).await.unwrap();
    leases_end(SHORT).await;
    // So that its list is a little old when the packs are condemned.
    a.find_missing(&[]).await.unwrap();
    let (node, here) = (a.clone(), tokio::runtime::Handle::current());
    let mut asked = false;
    let done = b
        .collect(0, move |progress| {
            if progress.phase == Phase::Adopt && !asked {
                asked = true;
                let missing = here.block_on(node.find_missing(&[root])).unwrap();
                assert_eq!(missing, [], "its list is young enough");
                here.block_on(node.durable.pin("uid", "Checkpoint", "", root)).unwrap();
            }
            ControlFlow::Continue(())
        })
        .await
        .unwrap();
    assert_eq!((done.condemned.blobs, done.rescued, done.deleted.blobs), (3, 3, 0), "{done:?}");
    for (blob, data) in contents {
        assert_eq!(b.get(blob).await.unwrap(), data);
    }
    a.durable.refresh(Instant::now()).await.unwrap();
    assert_eq!(a.find_missing(&[root]).await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn when_a_collection_has_looked_again_nobody_promises_what_it_deletes() {
    let bucket = TestBucket::default();
    let [a, b] = nodes(SHORT, &bucket).await;
    let contents = vec![blob(1, 1000)];
    let (root, message) = tree(&contents);
    a.write_batch(contents).await.unwrap();
    a.write_batch(vec![(root, message)]).await.unwrap();
    leases_end(SHORT).await;
    // Its list of the condemned is as new as it can be, and without what follows.
    a.durable.rebuild().await.unwrap();
    let (node, here) = (a.clone(), tokio::runtime::Handle::current());
    let mut asked = false;
    let done = b
        .collect(0, move |progress| {
            if progress.phase == Phase::Sweep && !asked {
                asked = true;
                assert_eq!(here.block_on(node.find_missing(&[root])).unwrap(), [root]);
            }
            ControlFlow::Continue(())
        })
        .await
        .unwrap();
    assert_eq!(done.deleted.blobs, 2, "{done:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_is_stored_anew_or_written_down_for_all_nodes() {
    let bucket = TestBucket::default();
    let [a, b] = nodes(SHORT, &bucket).await;
    // Once in two packs, once on somebody's disk, once large, once nowhere else.
    let (twice, on_disk, large, lost) =
        (blob(1, 1000), blob(2, 1000), blob(3, MAX_SHARED_BLOB as usize + 1), blob(4, 1000));
    b.write_batch(vec![twice.clone()]).await.unwrap();
    for one in [&twice, &on_disk, &large, &lost] {
        a.write_batch(vec![one.clone()]).await.unwrap();
    }
    b.durable.rebuild().await.unwrap();
    let damage = async |blob: Blob| {
        let place = b.durable.places(&blob).unwrap().pop().unwrap();
        bucket.damage(&format!("here/packs/{}", place.pack), place.entry.offset + 3).await;
        place
    };
    let mut places = Vec::new();
    for one in [&twice, &on_disk, &large, &lost] {
        places.push(damage(one.0).await);
    }
    let scrub = async |node: &Arc<Client>, healer: Option<(Blob, Bytes)>, until: u64| {
        let node = node.clone();
        let scrubbing = tokio::task::spawn_blocking(move || {
            let heal = |blob: &Blob| Ok(healer.as_ref().filter(|(name, _)| name == blob).map(|(_, data)| data.clone()));
            let mut told = 0;
            node.durable.scrub(Pace::new(None), &heal, &mut |_| {
                told += 1;
                if told == until { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
        });
        scrubbing.await.unwrap().unwrap()
    };
    // Broken off, within the first pack too, and gone on with.
    let state = scrub(&b, Some(on_disk.clone()), 1).await;
    assert!(state.is_running() && state.state.blobs == 0, "{state:?}");
    assert!(b.durable.scrub_state().unwrap().is_running(), "who asks knows that it is to be gone on with");
    let state = scrub(&b, Some(on_disk.clone()), 3).await;
    assert!(state.is_running() && state.state.blobs == 2, "{state:?}");
    let state = scrub(&b, Some(on_disk.clone()), u64::MAX).await;
    assert!(!state.is_running());
    let state = state.state;
    assert_eq!((state.passes, state.blobs, state.damaged, state.healed), (1, 5, 4, 2), "{state:?}");
    for node in [&a, &b] {
        let found: Vec<Blob> = node.durable.damages().await.unwrap().into_iter().map(|damage| damage.blob).collect();
        let mut expected = [large.0, lost.0];
        expected.sort_unstable();
        assert_eq!(found, expected);
    }
    let [fresh] = nodes(SHORT, &bucket).await;
    assert_eq!(fresh.find_missing(&[twice.0, on_disk.0, large.0, lost.0]).await.unwrap(), [large.0, lost.0]);
    for one in [&twice, &on_disk] {
        assert_eq!(fresh.get(one.0).await.unwrap(), one.1);
    }
    // One is stored again, the other one's object restored.
    a.write_batch(vec![lost.clone()]).await.unwrap();
    bucket.damage(&format!("here/packs/{}", places[2].pack), places[2].entry.offset + 3).await;
    fresh.durable.rebuild().await.unwrap();
    assert_eq!(fresh.durable.damages().await.unwrap(), []);
    assert_eq!(fresh.find_missing(&[large.0, lost.0]).await.unwrap(), []);
    assert_eq!(fresh.get(large.0).await.unwrap(), large.1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_nobody_needs_goes_however_little_waste_it_is() {
    let bucket = TestBucket::default();
    let [a, b] = nodes(SHORT, &bucket).await;
    let (needed, content) = (blob(1, 1000), blob(2, 1000));
    a.write_batch(vec![needed.clone()]).await.unwrap();
    a.write_batch(vec![content.clone()]).await.unwrap();
    let (dead, message) = tree(std::slice::from_ref(&content));
    // The pack of the directories is needed but for the one.
    let many: Vec<(Blob, Bytes)> = (0..40).map(|n| tree(&vec![needed.clone(); n + 1])).collect();
    let names: Vec<String> = (0..many.len()).map(|n| format!("d{n}")).collect();
    let root = directory(names.iter().zip(&many).map(|(name, (blob, _))| (name.as_str(), Node::Directory(*blob))));
    let all: Vec<_> = many.into_iter().chain([(dead, message), (root.blob(), root.encode())]).collect();
    a.write_batch(all).await.unwrap();
    a.durable.pin("uid", "Checkpoint", "", root.blob()).await.unwrap();
    leases_end(SHORT).await;
    let done = b.collect(100, go_on).await.unwrap();
    assert_eq!(done.deleted.blobs, 1, "contents may stay as waste: {done:?}");
    let done = b.collect(50, go_on).await.unwrap();
    assert_eq!(done.deleted.blobs, 1, "{done:?}");
    a.durable.refresh(Instant::now()).await.unwrap();
    assert_eq!(a.find_missing(&[dead, content.0, root.blob()]).await.unwrap(), [dead, content.0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_keeps_what_is_below_it_as_long_as_it_is_new() {
    let terms = Terms { lease: Duration::from_secs(2), ..SHORT };
    let bucket = TestBucket::default();
    let [a, b] = nodes(terms, &bucket).await;
    let content = blob(1, 1000);
    let begin = Instant::now();
    a.write_batch(vec![content.clone()]).await.unwrap();
    tokio::time::sleep(terms.lease * 3 / 4).await;
    let (root, message) = tree(std::slice::from_ref(&content));
    a.write_batch(vec![(root, message)]).await.unwrap();
    tokio::time::sleep((terms.lease + Duration::from_millis(100)).saturating_sub(begin.elapsed())).await;
    let done = b.collect(0, go_on).await.unwrap();
    assert_eq!(done.deleted.blobs, 0, "{done:?}");
    assert_eq!(a.find_missing(&[root]).await.unwrap(), []);
    assert_eq!(b.get(content.0).await.unwrap(), content.1);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_copies_one_is_kept_and_it_is_a_good_one() {
    for damaged in [false, true] {
        let bucket = TestBucket::default();
        let [a, b, c] = nodes(SHORT, &bucket).await;
        let contents = vec![blob(1, 1000), blob(2, 2000)];
        let (root, message) = tree(&contents);
        for node in [&a, &b] {
            node.write_batch(contents.clone()).await.unwrap();
        }
        a.write_batch(vec![(root, message)]).await.unwrap();
        a.durable.pin("uid", "Checkpoint", "", root).await.unwrap();
        c.durable.rebuild().await.unwrap();
        assert_eq!(c.durable.packs().unwrap().len(), 3);
        if damaged {
            let newest = c.durable.places(&contents[0].0).unwrap().pop().unwrap();
            bucket.damage(&format!("here/packs/{}", newest.pack), newest.entry.offset + 3).await;
        }
        leases_end(SHORT).await;
        c.collect(10, go_on).await.unwrap();
        leases_end(SHORT).await;
        let left = c.collect(10, go_on).await.unwrap();
        assert_eq!(left.deleted.blobs, 0, "{left:?}");
        let [fresh] = nodes(SHORT, &bucket).await;
        for (blob, data) in &contents {
            assert_eq!(fresh.get(*blob).await.unwrap(), *data);
        }
        assert_eq!(fresh.durable.packs().unwrap().len(), if damaged { 3 } else { 2 });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn below_a_pin_that_is_incomplete_anything_may_be_so_nothing_goes() {
    let bucket = TestBucket::default();
    let [a, b] = nodes(SHORT, &bucket).await;
    let content = blob(1, 1000);
    a.write_batch(vec![content.clone()]).await.unwrap();
    let (below, _) = tree(std::slice::from_ref(&content));
    let root = directory([("d", Node::Directory(below))]);
    a.write_batch(vec![(root.blob(), root.encode())]).await.unwrap();
    a.durable.pin("uid", "Checkpoint", "", root.blob()).await.unwrap();
    leases_end(SHORT).await;
    let done = b.collect(0, go_on).await.unwrap();
    assert_eq!((done.incomplete.len(), done.deleted.blobs), (1, 0), "{done:?}");
    assert!(done.incomplete[0].problem.contains(&below.to_string()));
    assert_eq!(b.find_missing(&[content.0]).await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_small_packs_become_one() {
    let bucket = TestBucket::default();
    let [a, b] = nodes(SHORT, &bucket).await;
    let contents: Vec<_> = (0..80).map(|n| blob(n, 100)).collect();
    for content in &contents {
        a.write_batch(vec![content.clone()]).await.unwrap();
    }
    let (root, message) = tree(&contents);
    a.write_batch(vec![(root, message)]).await.unwrap();
    a.durable.pin("uid", "Checkpoint", "", root).await.unwrap();
    leases_end(SHORT).await;
    let done = b.collect(25, go_on).await.unwrap();
    assert_eq!((done.condemned.blobs, done.deleted.blobs), (0, 0), "{done:?}");
    let [fresh] = nodes(SHORT, &bucket).await;
    assert!(fresh.durable.packs().unwrap().len() <= 4, "{:?}", fresh.durable.packs());
    for (blob, data) in &contents {
        assert_eq!(fresh.get(*blob).await.unwrap(), *data);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_the_condemned_that_cannot_be_read_is_not_taken_for_none() {
    let bucket = TestBucket::default();
    let [a] = nodes(Terms { view: Duration::ZERO, ..SHORT }, &bucket).await;
    let content = blob(1, 1000);
    a.write_batch(vec![content.clone()]).await.unwrap();
    bucket.put_text("here/condemned/1700000000000-0123456789abcdef-00000001", "{\"version\":7}").await;
    let error = a.find_missing(&[content.0]).await.unwrap_err().to_string();
    assert!(error.contains("condemned/17000") && error.contains("version 7"), "{error}");
}
