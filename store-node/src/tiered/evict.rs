//! Keeps the disk within its limit: what was wanted longest ago goes, if the bucket has it.
//!
//! When a copy was wanted is noted in units of [`UNIT`] seconds, so that a busy copy costs one note in each.

use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aether_cas::{Blob, store::Result};

use super::{Tier, TieredStore};

const UNIT: u64 = 300;
/// How often the disk is looked at.
const PAUSE: Duration = Duration::from_secs(2);
/// What is made free beyond the limit, in percent of it, so that the next time is not soon.
const SPARE: u64 = 10;
const AT_ONCE: usize = 1000;

impl TieredStore {
    /// Notes that blobs were wanted, where that decides what stays on the disk.
    pub(super) async fn touch(&self, tier: &Tier, blobs: Vec<Blob>) -> Result<()> {
        if tier.config.cache_limit.is_none() {
            return Ok(());
        }
        let durable = tier.durable.clone();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() / UNIT);
        self.blocking(move |_| durable.set_used(&blobs, u32::try_from(now).unwrap_or(u32::MAX))).await
    }

    pub(super) async fn evict(&self, tier: &Tier) {
        let Some(limit) = tier.config.cache_limit else { return std::future::pending().await };
        loop {
            tokio::time::sleep(PAUSE).await;
            if self.held() <= limit {
                continue;
            }
            let durable = tier.durable.clone();
            let target = limit - limit / 100 * SPARE;
            let evicted = self.blocking(move |store| store.shrink(&durable, target)).await;
            match evicted {
                Ok(bytes) if self.held() > limit => {
                    tracing::warn!(
                        bytes,
                        held = self.held(),
                        limit,
                        "the disk is over its limit by what is not in the bucket yet"
                    );
                }
                Ok(bytes) => tracing::debug!(bytes, "removed from the disk what was wanted longest ago"),
                Err(error) => tracing::warn!(%error, "the disk is over its limit"),
            }
        }
    }

    fn held(&self) -> u64 {
        let held = self.disk.statistics();
        held.inline_bytes + held.file_bytes
    }

    /// Removes what was wanted longest ago until `target` bytes are held. Returns how many bytes went.
    fn shrink(&self, durable: &aether_cas::durable::Durable, target: u64) -> Result<u64> {
        // How much was last wanted when; then everything up to the time at which enough is gone.
        let mut ages: BTreeMap<u32, u64> = BTreeMap::new();
        self.in_chunks(|chunk| {
            for (blob, used) in chunk.iter().zip(durable.used(chunk)?) {
                *ages.entry(used).or_default() += blob.size;
            }
            Ok(())
        })?;
        let mut excess = self.held().saturating_sub(target);
        let mut until = 0;
        for (used, bytes) in ages {
            until = used;
            if bytes >= excess {
                break;
            }
            excess -= bytes;
        }
        let mut removed = 0;
        self.in_chunks(|chunk| {
            if self.held() <= target {
                return Ok(());
            }
            let used = durable.used(chunk)?;
            let old: Vec<Blob> =
                chunk.iter().zip(used).filter(|(_, used)| *used <= until).map(|(blob, _)| *blob).collect();
            let absent: HashSet<Blob> = durable.missing(&old)?.into_iter().collect();
            let old: Vec<Blob> = old.into_iter().filter(|blob| !absent.contains(blob)).collect();
            self.disk.remove(&old)?;
            durable.forget_used(&old)?;
            removed += old.iter().map(|blob| blob.size).sum::<u64>();
            Ok(())
        })?;
        Ok(removed)
    }

    fn in_chunks(&self, mut visit: impl FnMut(&[Blob]) -> Result<()>) -> Result<()> {
        let mut chunk = Vec::with_capacity(AT_ONCE);
        self.disk.for_each(|blob, _| {
            chunk.push(blob);
            if chunk.len() < AT_ONCE {
                return Ok(());
            }
            visit(&chunk)?;
            chunk.clear();
            Ok(())
        })?;
        visit(&chunk)
    }
}
