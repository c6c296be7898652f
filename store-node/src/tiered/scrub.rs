//! Scrub of what the services work on: of the disk, and of the bucket behind it. What is damaged in one is taken from the other.

use std::ops::ControlFlow;

use aether_cas::{
    collect::Pace,
    durable::scrub::PackScrub,
    local::{Damage, ScrubState},
    store::Result,
};
use tokio::runtime::Handle;

use super::TieredStore;

impl TieredStore {
    /// Reads the disk, or what is left of a pass, at most at `pace` in bytes: see [`LocalStore::scrub`](aether_cas::LocalStore::scrub).
    /// What is damaged there and in the bucket counts as healed: the next reader brings it. Blocks, on a thread of a runtime that may.
    ///
    /// # Errors
    /// Those of the disk and of the index.
    pub fn scrub_disk(&self, pace: Pace, watch: &mut dyn FnMut(&ScrubState) -> ControlFlow<()>) -> Result<ScrubState> {
        let heal = |blob: &_| match self.durable() {
            None => Ok(false),
            Some(durable) => Ok(durable.missing(&[*blob])?.is_empty()),
        };
        self.disk.scrub(pace, &heal, watch)
    }

    /// Reads the bucket, if there is one, or what is left of a pass, at most at `pace` in bytes. What is damaged there is taken from
    /// the disk, if that has it. Blocks, on a thread of a runtime that may.
    ///
    /// # Errors
    /// Those of the bucket, of the disk and of the indexes.
    pub fn scrub_bucket(
        &self,
        pace: Pace,
        watch: &mut dyn FnMut(&PackScrub) -> ControlFlow<()>,
    ) -> Result<Option<PackScrub>> {
        let Some(durable) = self.durable() else { return Ok(None) };
        let heal = |blob: &_| match self.disk.read_blob(blob) {
            Ok(data) => Ok(Some(data)),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error),
        };
        durable.scrub(pace, &heal, watch).map(Some)
    }

    /// Up to `limit` blobs that were found damaged and of which no good copy is known. Blocks, on a thread of a runtime that may.
    ///
    /// # Errors
    /// Those of the bucket, or of the disk where it is all there is.
    pub fn damages(&self, limit: usize) -> Result<Vec<Damage>> {
        let Some(durable) = self.durable() else { return self.disk.damages(limit) };
        let mut damages = Handle::current().block_on(durable.damages())?;
        damages.truncate(limit);
        Ok(damages)
    }
}
