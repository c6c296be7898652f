//! Collection of what the services work on: of the disk where it is all there is, of the bucket where there is one.

use std::{
    ops::ControlFlow,
    sync::{MutexGuard, TryLockError},
};

use aether_cas::{
    Blob, StoreError,
    collect::{Pace, Progress, Verdict, Watch},
    durable::{collect::BucketCollector, format::Entry},
    store::Result,
};
use bytes::Bytes;

use super::{Tier, TieredStore};

/// Folder of the marks, beside the objects.
const MARKS: &str = ".marks";

impl TieredStore {
    /// Deletes what neither a pin nor a lease keeps, at most at `pace` blobs per second. Blocks, on a thread of a runtime that may.
    ///
    /// # Errors
    /// Those of [`LocalStore::collect`](aether_cas::LocalStore::collect) and of [`BucketCollector::collect`].
    pub fn collect(&self, pace: Pace, watch: Watch<'_>) -> Result<Progress> {
        let Some(tier) = &self.tier else { return self.disk.collect(pace, watch) };
        let _collecting = tier.begin_collection()?;
        let done = self.of_bucket(tier, |collector| collector.collect(pace, watch))?;
        // Removes from this disk what is gone.
        tokio::runtime::Handle::current().block_on(self.rebuild())?;
        Ok(done)
    }

    /// Says of each blob why a collection would keep it, or not, and changes nothing.
    ///
    /// # Errors
    /// As [`TieredStore::collect`].
    pub fn explain(
        &self,
        tell: &mut dyn FnMut(Blob, Verdict) -> ControlFlow<()>,
        watch: Watch<'_>,
    ) -> Result<Progress> {
        let Some(tier) = &self.tier else { return self.disk.explain(tell, watch) };
        let _collecting = tier.begin_collection()?;
        self.of_bucket(tier, |collector| collector.explain(tell, watch))
    }

    fn of_bucket<T>(&self, tier: &Tier, work: impl FnOnce(BucketCollector<'_>) -> T) -> T {
        let scratch = self.disk.objects().join(MARKS);
        work(BucketCollector::new(&tier.durable, &|blob| self.read_directory(tier, blob), &scratch, tier.config.waste))
    }

    /// Reads a directory, and brings those that lie beside it: they are wanted too, most of them.
    fn read_directory(&self, tier: &Tier, blob: &Blob) -> Result<Bytes> {
        match self.disk.read_blob(blob) {
            Err(error) if error.is_missing() => {}
            result => return result,
        }
        if let Some(place) = tier.durable.places(blob)?.pop() {
            let beside = tier.durable.pack_entries(place.pack)?;
            let beside: Vec<Blob> =
                beside.iter().filter(|entry| entry.directory).map(|Entry { blob, .. }| *blob).collect();
            self.bring_now(&beside)?;
        }
        self.read_blob(blob)
    }
}

impl Tier {
    fn begin_collection(&self) -> Result<MutexGuard<'_, ()>> {
        match self.collecting.try_lock() {
            Ok(guard) => Ok(guard),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {
                Err(StoreError::Busy(format!("this node collects {} already", self.durable.name())))
            }
        }
    }
}
