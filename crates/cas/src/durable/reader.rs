//! Out of the bucket: neighbours in a pack are read with one request, large blobs in pieces.
//!
//! At most [`MEMORY`] bytes are read at one time; further readers wait.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use futures::stream::BoxStream;
use tokio::sync::Semaphore;

use super::{
    Durable, PackName, Place,
    bucket::Bucket,
    format::{Compression, Entry, decode_blob},
    index::Index,
    pack_key,
};
use crate::{Blob, store::Result, transfer::blocking};

/// Bytes that nobody asked for cost less than a request of their own, up to so many.
const GAP: u64 = 128 << 10;
/// Bytes of one request.
const SPAN: u64 = 8 << 20;
/// Bytes that are read at one time, before they are decompressed.
const MEMORY: u32 = 32 << 20;

/// A part of a pack that is read with one request.
#[derive(Debug, PartialEq, Eq)]
pub struct Span {
    /// Of which pack.
    pub pack: PackName,
    /// Which blobs are wanted, in the order in which they lie there.
    pub entries: Vec<Entry>,
}

impl Span {
    fn range(&self) -> Range<u64> {
        let start = self.entries.first().map_or(0, |entry| entry.offset);
        start..self.entries.last().map_or(start, |entry| entry.range().end)
    }
}

/// The fewest requests that read `places`, with few bytes that nobody asked for.
pub fn spans(mut places: Vec<Place>) -> Vec<Span> {
    places.sort_by_key(|place| (place.pack, place.entry.offset));
    places.dedup();
    let mut spans: Vec<Span> = Vec::new();
    for Place { pack, entry } in places {
        match spans.last_mut() {
            Some(span)
                if span.pack == pack
                    && entry.offset <= span.range().end + GAP
                    && entry.range().end - span.range().start <= SPAN =>
            {
                span.entries.push(entry);
            }
            _ => spans.push(Span { pack, entries: vec![entry] }),
        }
    }
    spans
}

pub(super) struct Reader {
    bucket: Bucket,
    index: Arc<Index>,
    memory: Semaphore,
}

impl Reader {
    pub(super) fn new(bucket: Bucket, index: Arc<Index>) -> Self {
        Self { bucket, index, memory: Semaphore::new(MEMORY as usize) }
    }
}

impl Durable {
    /// Reads blobs that share packs. What is not as it should be is left out, now and until the next [`Durable::rebuild`]: whoever
    /// looks for it again finds another copy, or none.
    ///
    /// # Errors
    /// Those of the bucket and of the index.
    pub async fn read_span(&self, span: Span) -> Result<Vec<(Blob, Bytes)>> {
        let Reader { bucket, index, memory } = &self.0.reader;
        let range = span.range();
        let permits = u32::try_from(range.end - range.start).unwrap_or(MEMORY).min(MEMORY);
        let _memory = memory.acquire_many(permits).await;
        let read = bucket.get(&pack_key(span.pack), range.clone()).await?;
        let (index, name) = (index.clone(), bucket.name());
        blocking(move || {
            let Some(bytes) = read else {
                tracing::warn!(pack = %span.pack, bucket = name, "a pack is gone");
                index.hide(span.pack);
                return Ok(Vec::new());
            };
            let mut good = Vec::with_capacity(span.entries.len());
            for entry in span.entries {
                let at = |offset: u64| usize::try_from(offset - range.start).unwrap_or(usize::MAX).min(bytes.len());
                let stored = bytes.slice(at(entry.offset)..at(entry.range().end));
                match decode_blob(&entry, &stored) {
                    Ok(data) => good.push((entry.blob, data)),
                    Err(reason) => damaged(&name, &index, Place { pack: span.pack, entry }, &reason.to_string()),
                }
            }
            Ok(good)
        })
        .await
    }

    /// The bytes of a blob that has a pack of its own, in pieces. They are not verified: whoever has them all
    /// verifies them, and calls [`Durable::leave_out`] if they are not the blob. `None` when the pack is gone.
    ///
    /// # Errors
    /// Those of the bucket and of the index.
    pub async fn read_pieces(&self, place: Place) -> Result<Option<BoxStream<'static, Result<Bytes>>>> {
        debug_assert_eq!(place.entry.compression, Compression::None, "large blobs are stored as they are");
        let pieces = self.0.reader.bucket.stream(&pack_key(place.pack), place.entry.range()).await?;
        if pieces.is_none() {
            self.0.index.hide(place.pack);
        }
        Ok(pieces)
    }

    /// Leaves out a copy that is not what it should be, until the next [`Durable::rebuild`].
    pub fn leave_out(&self, place: Place, reason: &str) {
        damaged(&self.name(), &self.0.index, place, reason);
    }
}

fn damaged(bucket: &str, index: &Index, place: Place, reason: &str) {
    tracing::error!(blob = %place.entry.blob, pack = %place.pack, bucket, reason, "a copy in the bucket is damaged");
    index.distrust(&place);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::durable::name::Namer;

    #[test]
    fn neighbours_share_a_request_and_strangers_do_not() {
        let namer = Namer::new();
        let (a, b) = (namer.name(), namer.name());
        let place = |pack, offset: u64, stored: u64| Place {
            pack,
            entry: Entry {
                blob: Blob::of(&offset.to_le_bytes()),
                offset,
                stored,
                compression: Compression::None,
                directory: false,
            },
        };
        let near = [place(a, 12, 100), place(a, 112, 50), place(a, 162 + GAP, 10)];
        let far = place(a, near[2].entry.range().end + GAP + 1, 10);
        let other = place(b, 12, 7 << 20);
        let behind = place(b, other.entry.range().end, 2 << 20);
        let mut all = vec![behind, far, other, near[2], near[0], near[1], near[0]];
        all.rotate_left(2);
        let spans = spans(all);
        let found: Vec<(PackName, usize)> = spans.iter().map(|span| (span.pack, span.entries.len())).collect();
        assert_eq!(found, [(a, 3), (a, 1), (b, 1), (b, 1)]);
        assert_eq!(spans[0].range(), 12..near[2].entry.range().end);
    }
}
