//! Contents as a restore asks for them, one after the other, fetched some ahead.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use aether_cas::transfer::{BATCH_BYTES, Object, Objects, batches, read_batch};
use aether_cas::{Blob, Store, StoreError};
use bytes::Bytes;
use tokio::runtime::Handle;

/// Contents of a store for somebody who may block.
pub(super) struct Contents {
    store: Arc<dyn Store>,
    runtime: Handle,
    /// In which of the batches a content is.
    places: HashMap<Blob, usize>,
    batches: Vec<Vec<Blob>>,
    /// The batch that was read last.
    held: Mutex<HashMap<Blob, Bytes>>,
    /// Where large contents pass through.
    spool: PathBuf,
}

impl Contents {
    /// `wanted` is what will be asked for, in that order. Must be called within a Tokio runtime.
    pub(super) fn new(store: Arc<dyn Store>, wanted: impl Iterator<Item = Blob>, spool: PathBuf) -> Self {
        let mut once = HashSet::new();
        let batches = batches(wanted.filter(|blob| blob.size <= BATCH_BYTES && once.insert(*blob)));
        let numbered = batches.iter().enumerate();
        let places = numbered.flat_map(|(number, batch)| batch.iter().map(move |blob| (*blob, number))).collect();
        Self { store, runtime: Handle::current(), places, batches, held: Mutex::default(), spool }
    }
}

impl Objects for Contents {
    fn object(&self, blob: &Blob) -> Result<Object, StoreError> {
        let Some(batch) = self.places.get(blob).map(|number| &self.batches[*number]) else {
            // One large content is on the disk at a time.
            let _ = std::fs::remove_file(&self.spool);
            self.runtime.block_on(self.store.fetch_to(*blob, &self.spool))?;
            return Ok(Object::File(self.spool.clone()));
        };
        let mut held = self.held.lock().expect("no holder panics");
        if let Some(data) = held.get(blob) {
            return Ok(Object::Bytes(data.clone()));
        }
        *held = self.runtime.block_on(read_batch(batch.clone(), &*self.store))?.into_iter().collect();
        Ok(Object::Bytes(held[blob].clone()))
    }
}
