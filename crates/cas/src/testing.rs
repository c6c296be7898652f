//! The conformance suite of stores, and contents and trees to test with.
//!
//! [`conformance`] checks everything that [`Store`] promises against any implementation; a store
//! that passes it can take the place of any other.

#[cfg(feature = "durable")]
pub mod bucket;

use std::{collections::BTreeMap, path::Path};

use bytes::Bytes;

use crate::{
    Blob, Store, StoreError,
    transfer::BATCH_BYTES,
    tree::{Attributes, Directory, Mtime, Name, Node},
};

/// `length` bytes that look random and are the same for the same `seed`.
pub fn bytes(seed: u64, length: usize) -> Bytes {
    let mut data = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut data);
    data.into()
}

/// A blob and its contents, from a seed.
pub fn blob(seed: u64, length: usize) -> (Blob, Bytes) {
    let data = bytes(seed, length);
    (Blob::of(&data), data)
}

/// A file's entry with plain attributes.
pub fn file(content: Blob) -> Node {
    Node::File {
        content,
        attributes: Attributes {
            mode: 0o644,
            mtime: Mtime { seconds: 1_700_000_000, nanos: 42 },
            ..Default::default()
        },
        link_group: None,
    }
}

/// A directory with plain attributes.
///
/// # Panics
/// If a name breaks the rules of names.
pub fn directory<'a>(entries: impl IntoIterator<Item = (&'a str, Node)>) -> Directory {
    Directory {
        attributes: Attributes { mode: 0o755, ..Default::default() },
        entries: entries
            .into_iter()
            .map(|(name, node)| (Name::try_from(name).expect("a valid name"), node))
            .collect::<BTreeMap<_, _>>(),
    }
}

/// Runs the whole suite against `store`, which need not be empty.
///
/// # Panics
/// When the store breaks a promise.
pub async fn conformance(store: &dyn Store) {
    empty_blob(store).await;
    sizes(store).await;
    batches(store).await;
    missing(store).await;
    refuses_wrong_data(store).await;
    files(store).await;
    concurrent_writers(store).await;
}

async fn empty_blob(store: &dyn Store) {
    assert_eq!(store.find_missing(&[Blob::EMPTY]).await.unwrap(), []);
    assert_eq!(store.read(Blob::EMPTY).await.unwrap(), Bytes::new());
    store.write(Blob::EMPTY, Bytes::new()).await.unwrap();
    assert_eq!(store.read(Blob::EMPTY).await.unwrap(), Bytes::new());
}

async fn sizes(store: &dyn Store) {
    let large = BATCH_BYTES as usize;
    // Around the limits of inline blobs, messages and pieces of a stream.
    for (n, length) in
        [1, 4096, 16 << 10, (16 << 10) + 1, 1 << 20, large - 128, large, large + 1, (4 << 20) + 3, 9 << 20]
            .into_iter()
            .enumerate()
    {
        let (blob, data) = blob(1000 + n as u64, length);
        assert_eq!(store.find_missing(&[blob]).await.unwrap(), [blob]);
        store.write(blob, data.clone()).await.unwrap();
        assert_eq!(store.find_missing(&[blob]).await.unwrap(), []);
        assert_eq!(store.read(blob).await.unwrap(), data, "{length} bytes");
        // Again: nothing happens.
        store.write(blob, data.clone()).await.unwrap();
        assert_eq!(store.read(blob).await.unwrap(), data, "{length} bytes");
    }
}

async fn batches(store: &dyn Store) {
    let mut blobs: Vec<_> = (0..300).map(|n| blob(2000 + n, 10 + 97 * n as usize)).collect();
    // Together more than a message, one alone more than a message, one twice.
    blobs.push(blob(2400, 5 << 20));
    blobs.push(blobs[7].clone());
    store.write_batch(blobs.clone()).await.unwrap();
    let names: Vec<Blob> = blobs.iter().map(|(blob, _)| *blob).collect();
    assert_eq!(store.find_missing(&names).await.unwrap(), []);
    let data = store.read_batch(&names).await.unwrap();
    assert_eq!(data.len(), blobs.len());
    for ((blob, expected), found) in blobs.iter().zip(data) {
        assert_eq!(*expected, found, "{blob}");
    }
    store.write_batch(Vec::new()).await.unwrap();
    assert_eq!(store.read_batch(&[]).await.unwrap(), Vec::<Bytes>::new());
}

async fn missing(store: &dyn Store) {
    let (there, data) = blob(3000, 100);
    store.write(there, data).await.unwrap();
    let (small, _) = blob(3001, 100);
    let (large, _) = blob(3002, 6 << 20);
    let found = store.find_missing(&[small, there, large, small, Blob::EMPTY]).await.unwrap();
    assert_eq!(found, [small, large], "in the order asked, each once");
    // The right digest with another size is another blob.
    let other_size = Blob { size: 99, ..there };
    assert_eq!(store.find_missing(&[other_size]).await.unwrap(), [other_size]);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out");
    for blob in [small, large] {
        let batch = store.read_batch(&[there, blob]).await.unwrap_err();
        let read = store.read(blob).await.unwrap_err();
        let fetch = store.fetch_to(blob, &path).await.unwrap_err();
        for error in [batch, read, fetch] {
            assert!(matches!(error, StoreError::NotFound { blob: b, .. } if b == blob), "{error}");
            assert!(error.to_string().contains(&blob.to_string()), "{error}");
        }
        assert!(!path.exists(), "nothing is left of a failed fetch");
    }
}

async fn refuses_wrong_data(store: &dyn Store) {
    for length in [50, 20 << 10, 6 << 20] {
        let (blob, data) = blob(4000 + length as u64, length);
        let mut flipped = data.to_vec();
        flipped[length / 2] ^= 1;
        let shorter = data.slice(1..);
        let mut longer = data.to_vec();
        longer.push(0);
        for bad in [flipped.into(), shorter, longer.into(), Bytes::new()] {
            let error = store.write(blob, bad).await.unwrap_err();
            assert!(error.to_string().contains(&blob.to_string()), "{error}");
            assert_eq!(store.find_missing(&[blob]).await.unwrap(), [blob]);
        }
        store.write(blob, data.clone()).await.unwrap();
        assert_eq!(store.read(blob).await.unwrap(), data);
    }
}

async fn files(store: &dyn Store) {
    let folder = tempfile::tempdir().unwrap();
    for length in [0, 7, 30 << 10, 10 << 20] {
        let (blob, data) = blob(5000 + length as u64, length);
        let source = folder.path().join("in");
        std::fs::write(&source, &data).unwrap();
        store.write_file(blob, &source).await.unwrap();
        assert_eq!(std::fs::read(&source).unwrap(), data, "the source is left");

        let target = folder.path().join("out");
        store.fetch_to(blob, &target).await.unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), data);
        store.fetch_to(blob, &target).await.expect_err("the target exists");
        assert_eq!(std::fs::read(&target).unwrap(), data, "and is left alone");
        std::fs::remove_file(&target).unwrap();
        assert_only(folder.path(), &["in"]);
    }
    // A file that is not what it is said to be, larger and smaller than a message.
    for length in [30 << 10, 10 << 20] {
        let (blob, _) = blob(5100, length);
        let source = folder.path().join("in");
        for actual in [length, length - 1, length + 1] {
            std::fs::write(&source, bytes(5101, actual)).unwrap();
            let error = store.write_file(blob, &source).await.unwrap_err();
            assert!(error.to_string().contains(&blob.to_string()), "{error}");
            assert_eq!(store.find_missing(&[blob]).await.unwrap(), [blob]);
        }
    }
}

async fn concurrent_writers(store: &dyn Store) {
    // All write the same blobs, in different order.
    let blobs: Vec<_> = (0..40).map(|n| blob(6000 + n, 8000 * n as usize)).collect();
    let writers = (0..6).map(|writer| {
        let mut blobs = blobs.clone();
        blobs.rotate_left(writer * 7);
        async move {
            for pair in blobs.chunks(2) {
                store.write_batch(pair.to_vec()).await.unwrap();
                let names: Vec<Blob> = pair.iter().map(|(blob, _)| *blob).collect();
                assert_eq!(store.find_missing(&names).await.unwrap(), []);
            }
        }
    });
    futures::future::join_all(writers).await;
    for (blob, data) in blobs {
        assert_eq!(store.read(blob).await.unwrap(), data);
    }
}

fn assert_only(folder: &Path, names: &[&str]) {
    let mut found: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    found.sort();
    assert_eq!(found, names);
}

/// Small numbers that are the same for the same seed.
pub struct Random(pub u64);

impl Random {
    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}
