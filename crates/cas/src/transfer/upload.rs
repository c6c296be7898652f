//! Towards a store: contents first, directories bottom-up, the root last.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream};

use super::{
    ASK_BLOBS, BATCH_BYTES, BLOB_OVERHEAD, IN_FLIGHT, Object, OnProgress, Progress, Source, Transferred, blocking, pack,
};
use crate::{
    Blob, Store, StoreError,
    store::Result,
    tree::{Directory, MAX_DEPTH, walk::too_deep},
};

/// Stores the tree `root` of `from` in `to`, as far as `to` does not have it. When this returns,
/// the whole tree is as durable as `to` promises.
///
/// # Errors
/// The first error of either side. What was moved by then stays, and is not moved again next time.
pub async fn upload_tree(
    root: Blob,
    from: Arc<dyn Source>,
    to: &dyn Store,
    progress: OnProgress<'_>,
) -> Result<Transferred> {
    let missing = missing_directories(root, &from, to).await?;
    let contents: HashSet<Blob> = missing.values().flat_map(|d| d.contents()).collect();
    let mut contents = find_missing(to, contents.into_iter().collect()).await?;
    // Neighbours in digest are neighbours in the object directories of both sides.
    contents.sort();

    let mut moved = Transferred { files: 0, bytes: 0, directories: missing.len() as u64 };
    let mut now = Progress {
        files_total: contents.len() as u64,
        bytes_total: contents.iter().map(|b| b.size).sum(),
        ..Default::default()
    };
    progress(now);
    let (batches, large) = pack(contents);
    let large = large.into_iter().map(|blob| vec![blob]);
    let mut uploads = stream::iter(batches.into_iter().chain(large))
        .map(|batch| upload_contents(batch, from.clone(), to))
        .buffer_unordered(IN_FLIGHT);
    while let Some(batch) = uploads.try_next().await? {
        now.files += batch.len() as u64;
        now.bytes += batch.iter().map(|b| b.size).sum::<u64>();
        progress(now);
    }
    drop(uploads);
    moved.files = now.files;
    moved.bytes = now.bytes;

    for level in levels(root, &missing) {
        let messages: HashMap<Blob, Bytes> = level.into_iter().map(|blob| (blob, missing[&blob].encode())).collect();
        let (batches, large) = pack(messages.keys().copied());
        let large = large.into_iter().map(|blob| vec![blob]);
        stream::iter(batches.into_iter().chain(large).map(Ok))
            .try_for_each_concurrent(IN_FLIGHT, |batch| {
                let batch = batch.into_iter().map(|blob| (blob, messages[&blob].clone())).collect();
                to.write_batch(batch)
            })
            .await?;
    }
    Ok(moved)
}

/// The directories of the tree that `to` does not have, asking from the root down and never below one it has.
async fn missing_directories(
    root: Blob,
    from: &Arc<dyn Source>,
    to: &dyn Store,
) -> Result<HashMap<Blob, Arc<Directory>>> {
    let mut missing = HashMap::new();
    let mut asked = HashSet::from([root]);
    let mut frontier = vec![root];
    for _ in 0..=MAX_DEPTH {
        if frontier.is_empty() {
            return Ok(missing);
        }
        let wanted = find_missing(to, std::mem::take(&mut frontier)).await?;
        let source = from.clone();
        let read = blocking(move || {
            wanted.into_iter().map(|blob| Ok((blob, source.directory(&blob)?))).collect::<Result<Vec<_>>>()
        })
        .await?;
        for (blob, directory) in read {
            for (_, child) in directory.subdirectories() {
                if asked.insert(child) {
                    frontier.push(child);
                }
            }
            missing.insert(blob, directory);
        }
    }
    Err(too_deep(&root))
}

/// Groups directories by height, the lowest first: each level needs only the levels before it.
///
/// Depth would not do: one directory may be near the root and deep in the tree at the same time.
fn levels(root: Blob, directories: &HashMap<Blob, Arc<Directory>>) -> Vec<Vec<Blob>> {
    let mut heights: HashMap<Blob, usize> = HashMap::new();
    let mut levels: Vec<Vec<Blob>> = Vec::new();
    let mut stack = vec![(root, false)];
    while let Some((blob, children_done)) = stack.pop() {
        let Some(directory) = directories.get(&blob) else {
            continue;
        };
        if heights.contains_key(&blob) {
            continue;
        }
        if !children_done {
            stack.push((blob, true));
            stack.extend(directory.subdirectories().map(|(_, child)| (child, false)));
            continue;
        }
        let height = directory.subdirectories().filter_map(|(_, child)| heights.get(&child)).max().map_or(0, |h| h + 1);
        heights.insert(blob, height);
        if levels.len() <= height {
            levels.resize_with(height + 1, Vec::new);
        }
        levels[height].push(blob);
    }
    levels
}

async fn find_missing(to: &dyn Store, blobs: Vec<Blob>) -> Result<Vec<Blob>> {
    let chunks: Vec<Vec<Blob>> = blobs.chunks(ASK_BLOBS).map(<[Blob]>::to_vec).collect();
    let found: Vec<Vec<Blob>> = stream::iter(chunks)
        .map(|chunk| async move { to.find_missing(&chunk).await })
        .buffered(IN_FLIGHT)
        .try_collect()
        .await?;
    Ok(found.into_iter().flatten().collect())
}

async fn upload_contents(batch: Vec<Blob>, from: Arc<dyn Source>, to: &dyn Store) -> Result<Vec<Blob>> {
    let names = batch.clone();
    let found = blocking(move || names.into_iter().map(|blob| Ok((blob, from.object(&blob)?))).collect()).await?;
    send(found, to).await?;
    Ok(batch)
}

/// Stores contents while whoever finds them still looks for more: each is asked about, and sent if it is missing, both in
/// batches, several in flight. What is found faster than it can be sent waits in `found`, so that should be bounded.
///
/// The directories that name them go afterwards, by [`upload_tree`].
///
/// # Errors
/// The first error of either side. What was moved by then stays.
pub async fn upload_found(found: impl Stream<Item = (Blob, Object)> + Send, to: &dyn Store) -> Result<Transferred> {
    let missing = batches(found.map(Ok))
        .map_ok(|batch| ask(batch, to))
        .try_buffer_unordered(IN_FLIGHT)
        .map_ok(|missing| stream::iter(missing).map(Ok))
        .try_flatten();
    let sent = batches(missing).map_ok(|batch| async move {
        let moved = Transferred {
            files: batch.len() as u64,
            bytes: batch.iter().map(|(blob, _)| blob.size).sum(),
            directories: 0,
        };
        send(batch, to).await.map(|()| moved)
    });
    sent.try_buffer_unordered(IN_FLIGHT)
        .try_fold(Transferred::default(), async |sum, moved| {
            Ok(Transferred { files: sum.files + moved.files, bytes: sum.bytes + moved.bytes, ..sum })
        })
        .await
}

type Found = (Blob, Object);

/// Groups contents so that each group fits a message; one that fits none is alone.
fn batches(found: impl Stream<Item = Result<Found>> + Send) -> impl Stream<Item = Result<Vec<Found>>> + Send {
    stream::try_unfold((Box::pin(found.fuse()), None), async |(mut found, mut carried)| {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        loop {
            let next = match carried.take() {
                Some(next) => next,
                None => match found.try_next().await? {
                    Some(next) => next,
                    None => break,
                },
            };
            let next: Found = next;
            let cost = next.0.size + BLOB_OVERHEAD;
            if !batch.is_empty() && bytes + cost > BATCH_BYTES {
                carried = Some(next);
                break;
            }
            bytes += cost;
            batch.push(next);
        }
        Ok((!batch.is_empty()).then_some((batch, (found, carried))))
    })
}

/// Those of the batch that `to` does not have.
async fn ask(batch: Vec<Found>, to: &dyn Store) -> Result<Vec<Found>> {
    let names: Vec<Blob> = batch.iter().map(|(blob, _)| *blob).collect();
    let missing: HashSet<Blob> = to.find_missing(&names).await?.into_iter().collect();
    Ok(batch.into_iter().filter(|(blob, _)| missing.contains(blob)).collect())
}

/// Sends contents that fit a message, or a single one of any size.
async fn send(batch: Vec<Found>, to: &dyn Store) -> Result<()> {
    if let [(blob, Object::File(path))] = &batch[..] {
        return to.write_file(*blob, path).await;
    }
    let blobs = blocking(move || {
        batch
            .into_iter()
            .map(|(blob, object)| {
                let data = match object {
                    Object::Bytes(data) => data,
                    Object::File(path) => std::fs::read(&path).map_err(StoreError::io("read", &path))?.into(),
                };
                Ok((blob, data))
            })
            .collect::<Result<Vec<_>>>()
    })
    .await?;
    to.write_batch(blobs).await
}
