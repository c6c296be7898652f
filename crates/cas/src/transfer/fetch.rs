//! From a store to the local disk: directories wholly, then the contents they name.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::{IN_FLIGHT, OnProgress, Progress, Transferred, blocking, pack, read_batch};
use crate::{
    Blob, LocalStore, Store, StoreError,
    store::Result,
    tree::{Directory, MAX_DEPTH, walk::bottom_up, walk::too_deep},
};

/// Directory messages stored in one step.
const STORE_BYTES: usize = 16 << 20;

/// Fetches the directories of the tree `root` that `into` does not have.
///
/// `into` gets each directory after all below it, so a directory in `into` always has all
/// directories below it; their contents are another matter: [`fetch_objects`].
///
/// # Errors
/// The first error of either side; [`StoreError::NotADirectory`] for a tree that breaks the rules.
pub async fn fetch_directories(root: Blob, from: &dyn Store, into: &LocalStore) -> Result<Transferred> {
    let mut fetched: HashMap<Blob, Vec<Blob>> = HashMap::new();
    let mut messages: HashMap<Blob, Bytes> = HashMap::new();
    let mut bulk: HashMap<Blob, Bytes> = HashMap::new();
    let mut frontier = missing(into, vec![root]).await?;
    for depth in 0..=MAX_DEPTH {
        if frontier.is_empty() {
            let count = fetched.len() as u64;
            store(root, fetched, messages, into).await?;
            return Ok(Transferred { directories: count, ..Default::default() });
        }
        let mut children = HashSet::new();
        for (blob, message) in read_all(&frontier, &mut bulk, from).await? {
            let directory = Directory::decode(&message).map_err(|source| StoreError::NotADirectory { blob, source })?;
            let below: Vec<Blob> = directory.subdirectories().map(|(_, blob)| blob).collect();
            children.extend(below.iter().copied());
            fetched.insert(blob, below);
            messages.insert(blob, message);
        }
        children.retain(|child| !fetched.contains_key(child));
        let asked = children.len();
        frontier = missing(into, children.into_iter().collect()).await?;
        if depth == 0 && frontier.len() > 1 && frontier.len() == asked {
            // Nothing in common with what is here: all of it in one answer is quicker.
            bulk = from.read_tree(root).await?.into_iter().collect();
        }
    }
    Err(too_deep(&root))
}

/// The messages of `blobs`: out of `bulk`, or read in batches.
async fn read_all(blobs: &[Blob], bulk: &mut HashMap<Blob, Bytes>, from: &dyn Store) -> Result<Vec<(Blob, Bytes)>> {
    let mut found = Vec::with_capacity(blobs.len());
    let mut wanted = Vec::new();
    for blob in blobs {
        match bulk.remove(blob) {
            Some(message) => found.push((*blob, message)),
            None => wanted.push(*blob),
        }
    }
    let (batches, large) = pack(wanted);
    let large = large.into_iter().map(|blob| vec![blob]);
    let batches: Vec<Vec<(Blob, Bytes)>> = stream::iter(batches.into_iter().chain(large))
        .map(|batch| read_batch(batch, from))
        .buffer_unordered(IN_FLIGHT)
        .try_collect()
        .await?;
    found.extend(batches.into_iter().flatten());
    Ok(found)
}

/// Stores messages so that each comes after all below it.
async fn store(
    root: Blob,
    fetched: HashMap<Blob, Vec<Blob>>,
    mut messages: HashMap<Blob, Bytes>,
    into: &LocalStore,
) -> Result<()> {
    let into = into.clone();
    blocking(move || {
        let mut step = Vec::new();
        let mut bytes = 0;
        let mut stack = vec![(root, false)];
        while let Some((blob, children_done)) = stack.pop() {
            if !messages.contains_key(&blob) {
                continue;
            }
            if !children_done {
                stack.push((blob, true));
                stack.extend(fetched[&blob].iter().map(|child| (*child, false)));
                continue;
            }
            if let Some(message) = messages.remove(&blob) {
                bytes += message.len();
                step.push((blob, message));
            }
            if bytes >= STORE_BYTES {
                into.put_encoded_directories(std::mem::take(&mut step))?;
                bytes = 0;
            }
        }
        into.put_encoded_directories(step)
    })
    .await
}

async fn missing(into: &LocalStore, blobs: Vec<Blob>) -> Result<Vec<Blob>> {
    let into = into.clone();
    blocking(move || into.missing(&blobs)).await
}

/// Fetches the contents of the tree `root` that `into` does not have; its directories must be there.
///
/// # Errors
/// The first error of either side. What was moved by then stays, and is not moved again next time.
pub async fn fetch_objects(
    root: Blob,
    from: &dyn Store,
    into: &LocalStore,
    progress: OnProgress<'_>,
) -> Result<Transferred> {
    let local = into.clone();
    let wanted = blocking(move || {
        let mut contents: Vec<Blob> =
            bottom_up(&root, &local, |_| false)?.iter().flat_map(|(_, directory)| directory.contents()).collect();
        contents.sort();
        contents.dedup();
        local.missing_contents(&contents)
    })
    .await?;
    fetch_listed(wanted, from, into, progress).await
}

/// Fetches contents, the first ones first as far as batches allow; large ones last.
///
/// # Errors
/// As [`fetch_objects`].
pub async fn fetch_listed(
    wanted: Vec<Blob>,
    from: &dyn Store,
    into: &LocalStore,
    progress: OnProgress<'_>,
) -> Result<Transferred> {
    let mut now = Progress {
        files_total: wanted.len() as u64,
        bytes_total: wanted.iter().map(|b| b.size).sum(),
        ..Default::default()
    };
    progress(now);
    let (batches, large) = pack(wanted);
    let large = large.into_iter().map(|blob| vec![blob]);
    let mut done = stream::iter(batches.into_iter().chain(large))
        .map(|batch| fetch_contents(batch, from, into))
        .buffer_unordered(IN_FLIGHT);
    while let Some((files, bytes)) = done.try_next().await? {
        now.files += files;
        now.bytes += bytes;
        progress(now);
    }
    Ok(Transferred { files: now.files, bytes: now.bytes, directories: 0 })
}

async fn fetch_contents(batch: Vec<Blob>, from: &dyn Store, into: &LocalStore) -> Result<(u64, u64)> {
    let moved = (batch.len() as u64, batch.iter().map(|b| b.size).sum());
    if let [blob] = batch[..] {
        let path = into.temporary_path();
        from.fetch_to(blob, &path).await?;
        let into = into.clone();
        blocking(move || into.adopt_batch(vec![(blob, path)])).await?;
    } else {
        let data = read_batch(batch, from).await?;
        into.write_batch(data).await?;
    }
    Ok(moved)
}
