//! From the bucket to the disk: neighbours with one request, each pack by one reader at a time.

use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher, Hash},
    time::Instant,
};

use aether_cas::{
    Blob, Store, StoreError,
    durable::{Place, Span, format::MAX_SHARED_BLOB, spans},
    store::Result,
};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::{Tier, TieredStore};

/// Requests to the bucket at one time for one caller.
const AT_ONCE: usize = 4;
/// Bytes of a large blob that are written to the disk at one time.
const PIECE: usize = 1 << 20;
const STRIPES: usize = 64;

/// Locks, so that many who miss the same read it once. Large transfers have a set of their own: what is small does not wait
/// for one of them because it happens to share its lock.
#[derive(Debug)]
pub(super) struct Stripes {
    locks: Vec<tokio::sync::Mutex<()>>,
    hasher: RandomState,
}

impl Default for Stripes {
    fn default() -> Self {
        Self { locks: (0..STRIPES).map(|_| tokio::sync::Mutex::new(())).collect(), hasher: RandomState::new() }
    }
}

impl Stripes {
    pub(super) async fn lock(&self, key: impl Hash) -> tokio::sync::MutexGuard<'_, ()> {
        let stripe = self.hasher.hash_one(key) % STRIPES as u64;
        self.locks[usize::try_from(stripe).unwrap_or(0)].lock().await
    }
}

/// Where the blobs that are looked for are.
#[derive(Default)]
struct Located {
    shared: Vec<Place>,
    large: Vec<Place>,
    nowhere: Vec<Blob>,
}

impl TieredStore {
    pub(super) async fn bring_from(&self, tier: &Tier, blobs: &[Blob]) -> Result<()> {
        let asked = Instant::now();
        let mut wanted = self.disk.find_missing(blobs).await?;
        let mut refreshed = false;
        while !wanted.is_empty() {
            let located = self.locate(tier, wanted.clone()).await?;
            if !located.nowhere.is_empty() && !refreshed {
                // Another node may have stored it since we last looked.
                tier.durable.refresh(asked).await?;
                refreshed = true;
                continue;
            }
            wanted.clear();
            let left: Vec<Vec<Blob>> = stream::iter(spans(located.shared))
                .map(|span| self.bring_span(tier, span))
                .buffer_unordered(AT_ONCE)
                .try_collect()
                .await?;
            wanted.extend(left.into_iter().flatten());
            for place in located.large {
                if !self.bring_large(tier, place).await? {
                    wanted.push(place.entry.blob);
                }
            }
        }
        self.touch(tier, blobs.to_vec()).await
    }

    async fn locate(&self, tier: &Tier, blobs: Vec<Blob>) -> Result<Located> {
        let durable = tier.durable.clone();
        self.blocking(move |_| {
            let mut located = Located::default();
            for blob in blobs {
                match durable.places(&blob)?.pop() {
                    None => located.nowhere.push(blob),
                    Some(place) if blob.size <= MAX_SHARED_BLOB => located.shared.push(place),
                    Some(place) => located.large.push(place),
                }
            }
            Ok(located)
        })
        .await
    }

    /// Brings blobs of one pack; returns those that have to be looked for elsewhere.
    async fn bring_span(&self, tier: &Tier, span: Span) -> Result<Vec<Blob>> {
        let _reading = tier.stripes.lock(span.pack).await;
        let names: Vec<Blob> = span.entries.iter().map(|entry| entry.blob).collect();
        let still = self.disk.find_missing(&names).await?;
        if still.is_empty() {
            return Ok(still);
        }
        let entries = span.entries.into_iter().filter(|entry| still.contains(&entry.blob)).collect();
        let found = tier.durable.read_span(Span { pack: span.pack, entries }).await?;
        let mut left = still;
        left.retain(|blob| !found.iter().any(|(name, _)| name == blob));
        self.keep(found).await;
        Ok(left)
    }

    /// Keeps what was read on the disk. A disk that is full does not keep anybody from reading.
    async fn keep(&self, blobs: Vec<(Blob, Bytes)>) {
        let count = blobs.len();
        if let Err(error) = self.disk.write_batch(blobs).await {
            tracing::warn!(%error, blobs = count, "what was read from the bucket could not be kept on the disk");
        }
    }

    /// Brings one large blob; `false` when this copy was not good.
    async fn bring_large(&self, tier: &Tier, place: Place) -> Result<bool> {
        let blob = place.entry.blob;
        let _reading = tier.large.lock(blob).await;
        if self.disk.find_missing(&[blob]).await?.is_empty() {
            return Ok(true);
        }
        let Some(mut pieces) = tier.durable.read_pieces(place).await? else {
            return Ok(false);
        };
        let mut ingest = self.blocking(move |store| store.disk.begin(blob)).await?;
        let mut waiting = Vec::new();
        let mut bytes = 0;
        loop {
            let piece = pieces.try_next().await?;
            let ended = piece.is_none();
            bytes += piece.as_ref().map_or(0, Bytes::len);
            waiting.extend(piece);
            if bytes >= PIECE || ended {
                let pieces = std::mem::take(&mut waiting);
                bytes = 0;
                ingest = self
                    .blocking(move |_| {
                        for piece in &pieces {
                            ingest.append(piece)?;
                        }
                        Ok(ingest)
                    })
                    .await?;
            }
            if ended {
                break;
            }
        }
        match ingest.finish().await {
            Ok(()) => Ok(true),
            Err(StoreError::Mismatch { found, .. }) => {
                tier.durable.leave_out(place, &format!("it is {found}"));
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// One blob that the disk does not have, or has damaged.
    pub(super) async fn read_from(&self, tier: &Tier, blob: Blob) -> Result<Bytes> {
        if blob.size > MAX_SHARED_BLOB {
            self.bring_from(tier, &[blob]).await?;
            return self.blocking(move |store| store.disk.read_blob(&blob)).await;
        }
        let asked = Instant::now();
        let mut refreshed = false;
        loop {
            let durable = tier.durable.clone();
            match self.blocking(move |_| durable.places(&blob)).await?.pop() {
                Some(Place { pack, entry }) => {
                    if let Some((blob, data)) = tier.durable.read_span(Span { pack, entries: vec![entry] }).await?.pop()
                    {
                        self.keep(vec![(blob, data.clone())]).await;
                        self.touch(tier, vec![blob]).await?;
                        return Ok(data);
                    }
                }
                None if !refreshed => {
                    tier.durable.refresh(asked).await?;
                    refreshed = true;
                }
                None => return Err(StoreError::NotFound { blob, store: tier.durable.name() }),
            }
        }
    }
}
