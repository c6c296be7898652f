//! From the disk to the bucket: what was acknowledged at the disk, and what a disk held before.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use aether_cas::{Blob, Store, StoreError, durable::format::MAX_SHARED_BLOB, store::Result};
use aether_runtime::CancellationToken;
use futures::FutureExt;
use tokio::{runtime::Handle, sync::Notify, task::JoinSet};

use super::{Durability, FIRST_PAUSE, LONGEST_PAUSE, Tier, TieredStore};

/// Blobs that may wait: some 25 MiB of names. Writers wait when there are more.
const WAITING: usize = 200_000;
/// Groups on their way at one time.
const AT_ONCE: usize = 6;
/// Blobs of one group.
const GROUP: usize = 2_000;

/// What waits to be brought to the bucket.
#[derive(Debug, Default)]
pub(super) struct Drain {
    queue: Mutex<Queue>,
    /// Something waits.
    wake: Notify,
    /// Something was brought.
    room: Notify,
    /// The disk is to be compared with the bucket again.
    again: Notify,
    /// How often that was asked for after the begin.
    asked: AtomicU64,
    /// More than that when it was done.
    compared: AtomicU64,
    /// The node ends.
    ended: CancellationToken,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Blob>,
    /// Waiting and on their way, and how often.
    pending: HashMap<Blob, u32>,
    blobs: u64,
    bytes: u64,
}

impl Drain {
    pub(super) fn add(&self, blobs: impl IntoIterator<Item = Blob>) {
        let mut queue = self.lock();
        for blob in blobs {
            queue.blobs += 1;
            queue.bytes += blob.size;
            *queue.pending.entry(blob).or_default() += 1;
            queue.waiting.push_back(blob);
        }
        drop(queue);
        self.wake.notify_one();
    }

    /// Leaves those of `blobs` that neither wait nor are on their way.
    pub(super) fn retain_idle(&self, blobs: &mut Vec<Blob>) {
        let queue = self.lock();
        if !queue.pending.is_empty() {
            blobs.retain(|blob| !queue.pending.contains_key(blob));
        }
    }

    /// Waits until there is room for more.
    pub(super) async fn room(&self) {
        loop {
            let notified = self.room.notified();
            if self.lock().waiting.len() < WAITING {
                return;
            }
            notified.await;
        }
    }

    /// As [`Drain::room`], on a thread that may block; fails when nobody brings anything any more.
    fn room_now(&self) -> Result<()> {
        Handle::current().block_on(async {
            tokio::select! {
                () = self.room() => Ok(()),
                () = self.ended.cancelled() => Err(StoreError::Closed("the queue to the bucket".to_owned())),
            }
        })
    }

    /// Looks once more what the disk has that the bucket has not.
    pub(super) fn compare_again(&self) {
        self.asked.fetch_add(1, Ordering::AcqRel);
        self.again.notify_one();
    }

    /// Blobs and bytes that are not in the bucket yet, and whether these are all.
    pub(super) fn pending(&self) -> (u64, u64, bool) {
        let queue = self.lock();
        let compared = self.compared.load(Ordering::Acquire) > self.asked.load(Ordering::Acquire);
        (queue.blobs, queue.bytes, compared)
    }

    /// Blobs to bring together: small ones that fit a pack, or a large one.
    fn group(&self) -> Vec<Blob> {
        let mut queue = self.lock();
        let mut group: Vec<Blob> = Vec::new();
        let mut bytes = 0;
        while let Some(next) = queue.waiting.front() {
            if !group.is_empty() && (bytes + next.size > MAX_SHARED_BLOB || group.len() >= GROUP) {
                break;
            }
            bytes += next.size;
            group.extend(queue.waiting.pop_front());
        }
        drop(queue);
        self.room.notify_waiters();
        group
    }

    fn done(&self, group: &[Blob]) {
        let mut queue = self.lock();
        queue.blobs -= group.len() as u64;
        queue.bytes -= group.iter().map(|blob| blob.size).sum::<u64>();
        for blob in group {
            if let Entry::Occupied(mut often) = queue.pending.entry(*blob) {
                *often.get_mut() -= 1;
                if *often.get() == 0 {
                    often.remove();
                }
            }
        }
    }

    fn put_back(&self, group: Vec<Blob>) {
        let mut queue = self.lock();
        for blob in group.into_iter().rev() {
            queue.waiting.push_front(blob);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl TieredStore {
    /// Brings what waits, for ever. When packs are lost, and first unless nothing can wait, it looks what the disk has that the
    /// bucket has not.
    pub(super) async fn drain(&self, tier: &Arc<Tier>) {
        let compare = async {
            if !self.knows_complete(tier).await {
                self.compare(tier).await;
            }
            loop {
                self.note_complete(tier).await;
                tier.drain.again.notified().await;
                self.compare(tier).await;
            }
        };
        // A thread that compares must not wait for room for ever.
        let _ended = tier.drain.ended.clone().drop_guard();
        tokio::select! {
            () = compare => {}
            () = self.bring_out(tier) => {}
        }
    }

    /// Whether what the disk has and the bucket has not was acknowledged to nobody.
    async fn knows_complete(&self, tier: &Arc<Tier>) -> bool {
        let (durable, through) = (tier.durable.clone(), tier.config.durability == Durability::Through);
        let known = self
            .blocking(move |_| {
                if !through {
                    durable.set_complete(false)?;
                }
                durable.is_complete()
            })
            .await;
        if matches!(known, Ok(true)) {
            tier.drain.compared.store(1, Ordering::Release);
        }
        matches!(known, Ok(true))
    }

    /// Notes that nothing waits any more, when that is so and stays so: only with [`Durability::Through`].
    async fn note_complete(&self, tier: &Arc<Tier>) {
        if tier.config.durability == Durability::Behind {
            return;
        }
        loop {
            let (blobs, _, compared) = tier.drain.pending();
            if !compared {
                return;
            }
            if blobs == 0 {
                break;
            }
            tokio::time::sleep(FIRST_PAUSE).await;
        }
        let durable = tier.durable.clone();
        if let Err(error) = self.blocking(move |_| durable.set_complete(true)).await {
            tracing::warn!(%error, "the disk is compared with the bucket again after a restart");
        }
    }

    async fn compare(&self, tier: &Arc<Tier>) {
        let asked = tier.drain.asked.load(Ordering::Acquire);
        let comparing = tier.clone();
        let compared = self
            .blocking(move |store| {
                let mut some = Vec::new();
                let look = |some: &mut Vec<Blob>| -> Result<()> {
                    let absent = comparing.durable.missing(some)?;
                    some.clear();
                    comparing.drain.room_now()?;
                    comparing.drain.add(absent);
                    Ok(())
                };
                store.disk.for_each(|blob, _| {
                    some.push(blob);
                    if some.len() < 1000 { Ok(()) } else { look(&mut some) }
                })?;
                look(&mut some)
            })
            .await;
        match compared {
            Ok(()) => tier.drain.compared.store(asked + 1, Ordering::Release),
            Err(_) if tier.drain.ended.is_cancelled() => {}
            Err(error) => tracing::error!(%error, "the disk was not compared with the bucket; restart to try again"),
        }
    }

    async fn bring_out(&self, tier: &Arc<Tier>) {
        let mut pause = FIRST_PAUSE;
        let mut underway = JoinSet::new();
        // After a failure nothing new begins until all that is under way has ended, and a pause.
        let mut failed = false;
        loop {
            if failed && underway.is_empty() {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
                failed = false;
            }
            let woken = tier.drain.wake.notified();
            while underway.len() < AT_ONCE && !failed {
                let group = tier.drain.group();
                if group.is_empty() {
                    break;
                }
                let (store, tier) = (self.clone(), tier.clone());
                underway.spawn(async move {
                    // Whatever happens, what is not in the bucket stays known.
                    let result = AssertUnwindSafe(store.store_group(&tier, &group)).catch_unwind().await;
                    let ended = || StoreError::Closed(tier.durable.name());
                    (group, result.unwrap_or_else(|_| Err(ended())))
                });
            }
            let ended = tokio::select! {
                Some(ended) = underway.join_next() => ended,
                () = woken, if underway.len() < AT_ONCE && !failed => continue,
            };
            match ended {
                Ok((group, Ok(()))) => {
                    tier.drain.done(&group);
                    pause = FIRST_PAUSE;
                }
                Ok((group, Err(error))) => {
                    tracing::warn!(%error, blobs = group.len(), "what the disk has is not in the bucket yet");
                    tier.drain.put_back(group);
                    failed = true;
                }
                Err(error) => tracing::error!(%error, "bringing blobs to the bucket was not finished"),
            }
        }
    }

    async fn store_group(&self, tier: &Tier, group: &[Blob]) -> Result<()> {
        if let [blob] = group {
            return match self.store(tier, *blob).await {
                Err(error) if error.is_missing() => {
                    lost(&error);
                    Ok(())
                }
                result => result,
            };
        }
        // What is there already is leased by that, as if it were stored now.
        let missing = tier.durable.find_missing(group).await?;
        let blobs = self
            .blocking(move |store| {
                let mut blobs = Vec::new();
                for blob in missing {
                    match store.disk.read_blob(&blob) {
                        Ok(data) => blobs.push((blob, data)),
                        Err(error) if error.is_missing() => lost(&error),
                        Err(error) => return Err(error),
                    }
                }
                Ok(blobs)
            })
            .await?;
        tier.durable.put(blobs).await
    }

    /// Brings one blob of any size from the disk to the bucket, unless it is there.
    pub(super) async fn store(&self, tier: &Tier, blob: Blob) -> Result<()> {
        let stripes = if blob.size > MAX_SHARED_BLOB { &tier.large } else { &tier.stripes };
        let _storing = stripes.lock(blob).await;
        if tier.durable.find_missing(&[blob]).await?.is_empty() {
            return Ok(());
        }
        if blob.size > MAX_SHARED_BLOB {
            let path = self.disk.object_path(&blob.digest);
            let result = tier.durable.put_file(blob, &path).await;
            if matches!(result, Err(StoreError::Mismatch { .. } | StoreError::Io { .. })) {
                // Says so when the copy is gone, or is not good and set aside now: a client is asked for it again.
                self.blocking(move |store| store.disk.verify(&blob)).await?;
            }
            return result;
        }
        let data = self.disk.read(blob).await?;
        tier.durable.put(vec![(blob, data)]).await
    }
}

/// A blob that the disk does not have any more, or has damaged: nothing is left to bring.
fn lost(error: &StoreError) {
    tracing::error!(%error, "a blob was lost before it was in the bucket");
}
