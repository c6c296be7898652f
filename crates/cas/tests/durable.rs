//! The durable tier over a bucket in memory: what it costs in requests, and that the bucket alone is enough.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use aether_cas::{
    Blob, StoreError,
    durable::{Durable, PackName, Terms, Why, format::HEADER_BYTES, spans},
    testing::{blob, bucket::TestBucket, bytes},
};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::{ObjectStoreExt, memory::InMemory, path};

fn terms() -> Terms {
    Terms::new(Duration::from_secs(3600))
}

async fn open(bucket: &Arc<InMemory>, index: &Path) -> Durable {
    Durable::open(bucket.clone(), "memory://test".to_owned(), "some/folder", index, terms()).await.unwrap()
}

/// The blobs, read with as few requests as the places allow; without those that cannot be had.
async fn read(durable: &Durable, blobs: &[Blob]) -> Vec<(Blob, Bytes)> {
    let places = blobs.iter().filter_map(|blob| durable.places(blob).unwrap().pop()).collect();
    let mut found = Vec::new();
    for span in spans(places) {
        found.extend(durable.read_span(span).await.unwrap());
    }
    found.sort();
    found
}

fn names(blobs: &[(Blob, Bytes)]) -> Vec<Blob> {
    blobs.iter().map(|(blob, _)| *blob).collect()
}

fn sorted(mut blobs: Vec<(Blob, Bytes)>) -> Vec<(Blob, Bytes)> {
    blobs.sort();
    blobs
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_of_many_files_costs_few_requests_and_the_bucket_alone_is_enough() {
    const FILES: u64 = 22_695;
    let bucket = Arc::new(InMemory::new());
    let folder = tempfile::tempdir().unwrap();
    let durable = open(&bucket, &folder.path().join("a")).await;
    // As they come from a client: several batches of some MiB at one time. Half of each file compresses well.
    let file = |n: u64| {
        let data: Bytes = [&bytes(n, 200 + n as usize % 2000)[..], &[b'x'; 1000]].concat().into();
        (Blob::of(&data), data)
    };
    let all: Vec<(Blob, Bytes)> = (0..FILES).map(file).collect();
    let total: u64 = all.iter().map(|(blob, _)| blob.size).sum();
    stream::iter(all.chunks(1000))
        .map(|batch| durable.put(batch.to_vec()))
        .buffer_unordered(6)
        .try_collect::<Vec<()>>()
        .await
        .unwrap();
    let written = durable.statistics();
    println!(
        "{FILES} files, {total} bytes: {} requests, {} packs, {} bytes stored",
        written.requests, written.packs, written.stored_bytes
    );
    assert!(written.requests <= 40, "{written:?}");
    assert!(written.stored_bytes < total * 2 / 3, "{written:?} of {total}");

    // Another node, which has nothing but the bucket.
    let other = open(&bucket, &folder.path().join("b")).await;
    assert_eq!(other.missing(&names(&all)).unwrap().len(), all.len());
    other.rebuild().await.unwrap();
    let rebuilt = other.statistics();
    assert!(rebuilt.requests <= 3 + 2 * written.packs, "{rebuilt:?}");
    assert_eq!((rebuilt.packs, rebuilt.stored_bytes), (written.packs, written.stored_bytes));
    assert_eq!(other.missing(&names(&all)).unwrap(), []);
    assert_eq!(read(&other, &names(&all)).await, sorted(all));
    let requests = other.statistics().requests - rebuilt.requests;
    println!("read back with {requests} requests");
    assert!(requests <= 40, "{requests}");
}

#[tokio::test]
async fn what_others_wrote_is_found_and_what_is_gone_is_forgotten() {
    let bucket = Arc::new(InMemory::new());
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (open(&bucket, &folder.path().join("a")).await, open(&bucket, &folder.path().join("b")).await);
    b.rebuild().await.unwrap();
    let first = vec![blob(1, 3000), blob(2, 10)];
    a.put(first.clone()).await.unwrap();
    let asked = Instant::now();
    assert_eq!(b.missing(&names(&first)).unwrap(), names(&first));
    // Many who miss something at one time cost one listing.
    let before = b.statistics().requests;
    let many: Vec<_> = (0..50).map(|_| b.refresh(asked)).collect();
    futures::future::try_join_all(many).await.unwrap();
    assert_eq!(b.statistics().requests - before, 2, "one listing, one footer");
    assert_eq!(read(&b, &names(&first)).await, sorted(first.clone()));

    // A pack that somebody deleted: noticed when it is read, and when the bucket is listed.
    let second = vec![blob(3, 100)];
    a.put(second.clone()).await.unwrap();
    b.refresh(Instant::now()).await.unwrap();
    let packs = a.packs().unwrap();
    assert_eq!(b.packs().unwrap(), packs);
    for pack in packs {
        bucket.delete(&path::Path::from(format!("some/folder/packs/{pack}"))).await.unwrap();
    }
    assert_eq!(read(&b, &names(&second)).await, []);
    assert_eq!(b.missing(&names(&second)).unwrap(), names(&second));
    assert_eq!(b.missing(&names(&first)).unwrap(), []);
    for again in [true, false] {
        let gone = b.rebuild().await.unwrap();
        assert_eq!(
            gone.iter().map(|gone| gone.why).collect::<Vec<_>>(),
            if again { vec![Why::Lost; 2] } else { vec![] }
        );
        assert_eq!(b.missing(&names(&first)).unwrap(), names(&first));
        let lost: Vec<Blob> = gone.iter().flat_map(|gone| b.lost_with(gone.pack).unwrap()).collect();
        assert_eq!(lost.len(), if again { 3 } else { 0 });
        gone.iter().for_each(|gone| b.forget(gone.pack).unwrap());
    }
    assert_eq!(b.statistics().packs, 0);
}

#[tokio::test]
async fn an_index_of_another_bucket_and_a_damaged_one_are_made_anew() {
    let bucket = Arc::new(InMemory::new());
    let folder = tempfile::tempdir().unwrap();
    let durable = open(&bucket, folder.path()).await;
    let blobs = vec![blob(1, 300)];
    durable.put(blobs.clone()).await.unwrap();
    drop(durable);
    // It ends with its writer, which ends soon.
    let again = loop {
        match Durable::open(bucket.clone(), "memory://test".to_owned(), "some/folder", folder.path(), terms()).await {
            Ok(durable) => break durable,
            Err(error) => assert!(matches!(error, StoreError::Index { action: "open", .. }), "{error}"),
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(again.missing(&names(&blobs)).unwrap(), [], "kept");
    drop(again);
    let other = loop {
        match Durable::open(bucket.clone(), "memory://test".to_owned(), "elsewhere", folder.path(), terms()).await {
            Ok(durable) => break durable,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    assert_eq!(other.missing(&names(&blobs)).unwrap(), names(&blobs));
}

#[tokio::test]
async fn of_two_copies_the_good_one_is_found() {
    let bucket = Arc::new(InMemory::new());
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (open(&bucket, &folder.path().join("a")).await, open(&bucket, &folder.path().join("b")).await);
    let blobs = vec![blob(1, 3000), blob(2, 10)];
    a.put(blobs.clone()).await.unwrap();
    b.put(blobs.clone()).await.unwrap();
    a.refresh(Instant::now()).await.unwrap();
    assert_eq!(a.places(&blobs[0].0).unwrap().len(), 2);
    let newest: PackName = a.packs().unwrap().pop().unwrap();
    let key = path::Path::from(format!("some/folder/packs/{newest}"));
    let mut bad = bucket.get(&key).await.unwrap().bytes().await.unwrap().to_vec();
    bad[HEADER_BYTES as usize + 100] ^= 1;
    bucket.put(&key, bad.into()).await.unwrap();

    assert_eq!(read(&a, &names(&blobs)).await, blobs[1..], "the damaged one is left out");
    assert_eq!(read(&a, &names(&blobs)).await, sorted(blobs.clone()), "and then found elsewhere");

    // A pack of which the end is damaged, or that is of another version, holds nothing; the others serve.
    let mut bad = bucket.get(&key).await.unwrap().bytes().await.unwrap().to_vec();
    let version = bad.len() - 12;
    bad[version] = 9;
    bucket.put(&key, bad.into()).await.unwrap();
    let c = open(&bucket, &folder.path().join("c")).await;
    c.rebuild().await.unwrap();
    assert_eq!((c.statistics().packs, c.statistics().unreadable_packs), (1, 1));
    assert_eq!(read(&c, &names(&blobs)).await, sorted(blobs));
}

#[tokio::test]
async fn what_was_mended_is_found_again() {
    let bucket = Arc::new(InMemory::new());
    let folder = tempfile::tempdir().unwrap();
    let durable = open(&bucket, &folder.path().join("a")).await;
    let blobs = vec![blob(1, 3000), blob(2, 10)];
    durable.put(blobs.clone()).await.unwrap();
    let key = path::Path::from(format!("some/folder/packs/{}", durable.packs().unwrap()[0]));
    let good = bucket.get(&key).await.unwrap().bytes().await.unwrap();
    let damage = async |at: usize| {
        let mut bad = good.to_vec();
        bad[at] ^= 1;
        bucket.put(&key, bad.into()).await.unwrap();
    };
    damage(HEADER_BYTES as usize + 100).await;
    let place = durable.places(&blobs[0].0).unwrap().pop().unwrap();
    assert_eq!(read(&durable, &names(&blobs)).await, blobs[1..]);
    assert_eq!(durable.missing(&names(&blobs)).unwrap(), [blobs[0].0]);
    durable.refresh(Instant::now()).await.unwrap();
    assert_eq!(durable.places(&blobs[0].0).unwrap(), []);
    bucket.put(&key, good.clone().into()).await.unwrap();
    assert_eq!(durable.rebuild().await.unwrap(), []);
    assert_eq!(durable.places(&blobs[0].0).unwrap(), [place]);
    assert_eq!(read(&durable, &names(&blobs)).await, sorted(blobs.clone()));

    // The same of a pack as a whole.
    damage(good.len() - 12).await;
    let other = open(&bucket, &folder.path().join("b")).await;
    other.rebuild().await.unwrap();
    assert_eq!((other.statistics().packs, other.statistics().unreadable_packs), (0, 1));
    bucket.put(&key, good.clone().into()).await.unwrap();
    other.rebuild().await.unwrap();
    assert_eq!((other.statistics().packs, other.statistics().unreadable_packs), (1, 0));
    assert_eq!(read(&other, &names(&blobs)).await, sorted(blobs));
}

#[tokio::test]
async fn those_who_waited_for_a_listing_share_its_failure() {
    let bucket = Arc::new(TestBucket::default());
    let folder = tempfile::tempdir().unwrap();
    let durable =
        Durable::open(bucket.clone(), "s3://bucket".to_owned(), "here", folder.path(), terms()).await.unwrap();
    bucket.refuse_lists(true);
    let asked = Instant::now();
    let callers: Vec<_> = (0..20).map(|_| durable.refresh(asked)).collect();
    for result in futures::future::join_all(callers).await {
        let error = result.unwrap_err();
        assert!(error.is_transient() && error.to_string().contains("slow down"), "{error}");
    }
    assert_eq!(durable.statistics().failed_requests, 1);
    // Whoever asks later learns how it is then.
    bucket.refuse_lists(false);
    durable.refresh(Instant::now()).await.unwrap();
    durable.refresh(asked).await.unwrap();
    assert_eq!(durable.statistics().requests, 2);
}

#[tokio::test]
async fn large_blobs_are_sent_in_parts_and_verified() {
    let bucket = Arc::new(InMemory::new());
    let folder = tempfile::tempdir().unwrap();
    let durable = open(&bucket, &folder.path().join("a")).await;
    let path = folder.path().join("file");
    // Around the limits of parts, with what lies before and behind the blob.
    for (n, length) in [5, (8 << 20) - 13, (8 << 20) - 12, 8 << 20, 20 << 20].into_iter().enumerate() {
        let (blob, data) = blob(n as u64, length);
        std::fs::write(&path, &data).unwrap();
        durable.put_file(blob, &path).await.unwrap();
        let place = durable.places(&blob).unwrap().pop().unwrap();
        let pieces = durable.read_pieces(place).await.unwrap().unwrap();
        let pieces: Vec<Bytes> = pieces.try_collect().await.unwrap();
        assert_eq!(pieces.concat(), data, "{length} bytes");
        let fresh = tempfile::tempdir().unwrap();
        let other = open(&bucket, fresh.path()).await;
        other.rebuild().await.unwrap();
        assert_eq!(other.places(&blob).unwrap(), [place]);
    }
    let before = durable.statistics().packs;
    let (wrong, _) = blob(99, 20 << 20);
    for blob in [wrong, Blob { size: wrong.size - 1, ..wrong }, Blob { size: wrong.size + 1, ..wrong }] {
        let error = durable.put_file(blob, &path).await.unwrap_err();
        assert!(matches!(error, StoreError::Mismatch { .. }), "{error}");
    }
    let error = durable.put(vec![(wrong, bytes(1, 10))]).await.unwrap_err();
    assert!(matches!(error, StoreError::Invalid(_)), "{error}");
    let (small, _) = blob(5, 10);
    let error = durable.put(vec![(small, bytes(6, 10))]).await.unwrap_err();
    assert!(matches!(error, StoreError::Mismatch { .. }), "{error}");
    assert_eq!(durable.statistics().packs, before);
}

#[tokio::test]
async fn pins_are_in_the_bucket() {
    let bucket = Arc::new(InMemory::new());
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (open(&bucket, &folder.path().join("a")).await, open(&bucket, &folder.path().join("b")).await);
    let (x, y) = (blob(1, 10).0, blob(2, 10).0);
    for (owner, kind, name) in [("", "k", ""), ("u", "", ""), ("u\0", "k", ""), ("u", "k", "\0")] {
        assert!(matches!(a.pin(owner, kind, name, x).await, Err(StoreError::Invalid(_))));
    }
    a.pin("uid-2", "SessionHead", "", x).await.unwrap();
    a.pin("uid-1", "SourceRevision", "r1", x).await.unwrap();
    a.pin("uid-1", "SourceRevision", "r2", x).await.unwrap();
    // By another node, whatever its clock.
    b.pin("uid-1", "SourceRevision", "r2", y).await.unwrap();
    let list = async |node: &Durable, owner, kind| -> Vec<(String, String, Blob)> {
        let roots = node.roots(owner, kind).await.unwrap();
        assert!(roots.iter().all(|root| root.pinned_at > 1_500_000_000));
        roots.into_iter().map(|r| (r.owner_uid, r.name, r.tree)).collect()
    };
    let of = |owner: &str, name: &str, tree| (owner.to_owned(), name.to_owned(), tree);
    for node in [&a, &b] {
        assert_eq!(list(node, None, None).await, [of("uid-1", "r1", x), of("uid-1", "r2", y), of("uid-2", "", x)]);
        assert_eq!(list(node, Some("uid-2"), None).await, [of("uid-2", "", x)]);
        assert_eq!(list(node, None, Some("SessionHead")).await, [of("uid-2", "", x)]);
    }
    let before = a.statistics().requests;
    a.roots(None, None).await.unwrap();
    assert_eq!(a.statistics().requests - before, 1, "records that were read are kept");
    assert_eq!(b.unpin("uid-1", None, Some("r1")).await.unwrap(), 1);
    assert_eq!(b.unpin("uid-1", Some("SessionHead"), None).await.unwrap(), 0);
    assert_eq!(a.unpin("uid-1", None, None).await.unwrap(), 1);
    assert_eq!(list(&b, None, None).await, [of("uid-2", "", x)]);
    // A record that nobody can read must not be taken for none.
    let key = path::Path::from("some/folder/roots/x/y");
    bucket.put(&key, "{\"version\":7}".into()).await.unwrap();
    let error = b.roots(None, None).await.unwrap_err().to_string();
    assert!(error.contains("roots/x/y") && error.contains("version 7"), "{error}");
}

#[tokio::test]
async fn a_bucket_that_refuses_is_named_and_everyone_in_the_pack_hears() {
    let bucket = Arc::new(TestBucket::default());
    let folder = tempfile::tempdir().unwrap();
    let durable =
        Durable::open(bucket.clone(), "s3://bucket".to_owned(), "here", folder.path(), terms()).await.unwrap();
    bucket.refuse(true);
    let callers: Vec<_> = (0..5).map(|n| durable.put(vec![blob(n, 100)])).collect();
    for result in futures::future::join_all(callers).await {
        let error = result.unwrap_err();
        assert!(error.is_transient(), "{error}");
        let text = error.to_string();
        assert!(text.contains("s3://bucket/here/packs/") && text.contains("slow down"), "{text}");
    }
    assert_eq!(durable.statistics().failed_requests, 1, "they shared a pack");
    assert_eq!(durable.missing(&[blob(0, 100).0]).unwrap(), [blob(0, 100).0]);
    bucket.refuse(false);
    durable.put(vec![blob(0, 100)]).await.unwrap();
    assert_eq!(read(&durable, &[blob(0, 100).0]).await, [blob(0, 100)]);
}
