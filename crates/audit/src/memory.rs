//! What full segments tell, without their text: they never change, so that each has to be read once.
//!
//! The memory is bounded. What has no room is the oldest, which is the least asked for, and costs only that it is read again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use aether_cas::{Blob, Digest};

use crate::chain::{self, Broken, Entry, Head};

/// The most bytes that are remembered: a line takes 32, a decision some hundred more. This is half a million lines or more.
const MOST: usize = 32 << 20;

/// What is known of segments, by their numbers.
#[derive(Default)]
pub struct Memory {
    segments: Mutex<BTreeMap<usize, (Blob, Arc<Known>)>>,
}

/// What a segment tells.
pub(crate) struct Known {
    pub begin: Head,
    pub end: Head,
    /// Digests of what makes its entries the things that they are; sorted.
    identities: Vec<Digest>,
    /// What was said of commits.
    pub decisions: Vec<Entry>,
    /// What all of this takes.
    bytes: usize,
}

impl Known {
    pub(crate) fn of(segment: &[u8]) -> Result<Self, Broken> {
        let (begin, end, entries) = chain::tail(segment)?;
        let mut identities: Vec<Digest> = entries.iter().map(identity).collect();
        identities.sort_unstable();
        let decisions: Vec<Entry> = entries.into_iter().filter(|entry| entry.object.kind == "AetherApproval").collect();
        let text = |entry: &Entry| {
            let (about, root) = (&entry.object, entry.root.as_ref().map_or(0, String::len));
            about.kind.len() + about.namespace.len() + about.name.len() + about.uid.len() + entry.actor.len() + root
        };
        let said: usize = decisions.iter().map(|entry| size_of::<Entry>() + text(entry)).sum();
        let bytes = size_of::<Self>() + size_of_val(&identities[..]) + said;
        Ok(Self { begin, end, identities, decisions, bytes })
    }

    /// Whether it tells of this.
    pub(crate) fn tells(&self, entry: &Entry) -> bool {
        self.identities.binary_search(&identity(entry)).is_ok()
    }
}

impl Memory {
    pub(crate) fn get(&self, number: usize, blob: Blob) -> Option<Arc<Known>> {
        let segments = self.segments.lock().expect("no holder panics");
        segments.get(&number).filter(|(of, _)| *of == blob).map(|(_, known)| known.clone())
    }

    pub(crate) fn keep(&self, number: usize, blob: Blob, known: Arc<Known>) {
        let mut segments = self.segments.lock().expect("no holder panics");
        segments.insert(number, (blob, known));
        let mut bytes: usize = segments.values().map(|(_, known)| known.bytes).sum();
        while bytes > MOST
            && let Some((_, (_, oldest))) = segments.pop_first()
        {
            bytes -= oldest.bytes;
        }
    }
}

fn identity(entry: &Entry) -> Digest {
    Digest::of(&serde_json::to_vec(&entry.identity()).expect("string keys only"))
}
