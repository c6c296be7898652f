//! Reads all packs, slowly, and stores anew what is damaged and has a good copy elsewhere.
//!
//! What has none is written down in the bucket: one record for each damaged copy, which all nodes read when they list the bucket, so
//! that the copy does not count as present. A record goes when the copy is good again, or another one is there, or the pack is gone.

use std::{
    collections::{HashMap, HashSet},
    ops::ControlFlow,
};

use bytes::Bytes;
use futures::TryStreamExt;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use super::{
    Durable, PackName, Place,
    format::{FormatError, MAX_SHARED_BLOB},
    spans,
    terms::now,
};
use crate::{
    Blob, StoreError,
    collect::Pace,
    digest::BlobHasher,
    local::{Damage, ScrubState},
    store::Result,
};

const DAMAGED: &str = "damaged";
const VERSION: u32 = 1;
const MAX_RECORD_BYTES: u64 = 4 << 10;
const STATE: &str = "scrub";
/// Bytes read between two notes of where it is.
const NOTE_EVERY: u64 = 256 << 20;

/// Where the scrub of a bucket is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackScrub {
    /// In numbers: see [`ScrubState`].
    pub state: ScrubState,
    /// Whether a pass has begun and not ended.
    #[serde(default)]
    running: bool,
    /// The last pack that this pass has read; empty before the first.
    after: String,
}

impl PackScrub {
    /// Whether a pass has begun and not ended.
    pub fn is_running(&self) -> bool {
        self.running
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    blob: Blob,
    pack: String,
    reason: String,
    /// In milliseconds since 1970.
    found_at: u64,
}

/// What a record of the bucket says of a damaged copy.
///
/// # Errors
/// [`FormatError`] for anything that this version does not write.
pub fn decode_damaged(bytes: &[u8]) -> Result<(PackName, Damage), FormatError> {
    const NOT_ONE: FormatError = FormatError::Malformed("it is not the record of a damaged copy");
    if bytes.len() as u64 > MAX_RECORD_BYTES {
        return Err(NOT_ONE);
    }
    let Record { version, blob, pack, reason, found_at } = serde_json::from_slice(bytes).map_err(|_| NOT_ONE)?;
    if version != VERSION {
        return Err(FormatError::UnknownVersion(version));
    }
    Ok((pack.parse().map_err(|_| NOT_ONE)?, Damage { blob, reason, found_at }))
}

/// Brings a good copy of a blob from somewhere else than the bucket, if there is one.
pub type Heal<'a> = &'a dyn Fn(&Blob) -> Result<Option<Bytes>>;

impl Durable {
    /// Where the scrub of the bucket was when this node last noted it.
    ///
    /// # Errors
    /// Those of the index.
    pub fn scrub_state(&self) -> Result<PackScrub> {
        let text = self.0.index.text(STATE)?;
        Ok(text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default())
    }

    fn note_scrub(&self, scrub: &PackScrub) -> Result<()> {
        let text = serde_json::to_vec(scrub).map_err(|e| StoreError::Invalid(e.to_string()))?;
        self.0.index.set_text(STATE, &text)
    }

    /// Reads what is left of a pass, at most at `pace` in bytes, or a whole one. What is damaged is stored anew from another pack or
    /// by `heal`, if it can be. Blocks, on a thread of a runtime that may. `watch` may break off between any two requests.
    ///
    /// # Errors
    /// Those of the bucket, of the index and of `heal`. Damage is no error.
    pub fn scrub(
        &self,
        mut pace: Pace,
        heal: Heal<'_>,
        watch: &mut dyn FnMut(&PackScrub) -> ControlFlow<()>,
    ) -> Result<PackScrub> {
        let here = Handle::current();
        here.block_on(self.rebuild())?;
        let mut scrub = self.scrub_state()?;
        if !scrub.is_running() {
            scrub = PackScrub { state: scrub.state.next(), running: true, after: String::new() };
            self.note_scrub(&scrub)?;
        }
        let after: Option<PackName> = scrub.after.parse().ok();
        let mut noted = scrub.state.bytes;
        for pack in self.packs()?.into_iter().filter(|pack| after.is_none_or(|after| *pack > after)) {
            let entries = self.pack_entries(pack)?;
            let places: Vec<Place> = entries.into_iter().map(|entry| Place { pack, entry }).collect();
            let (large, small): (Vec<Place>, Vec<Place>) =
                places.into_iter().partition(|place| place.entry.blob.size > MAX_SHARED_BLOB);
            let mut damaged = Vec::new();
            for span in spans(small) {
                let wanted: Vec<Place> = span.entries.iter().map(|entry| Place { pack, entry: *entry }).collect();
                let stored: u64 = span.entries.iter().map(|entry| entry.stored).sum();
                let good: HashSet<Blob> =
                    here.block_on(self.read_span(span))?.into_iter().map(|(blob, _)| blob).collect();
                damaged.extend(wanted.into_iter().filter(|place| !good.contains(&place.entry.blob)));
                pace.wait(stored);
                if watch(&scrub).is_break() {
                    self.note_scrub(&scrub)?;
                    return Ok(scrub);
                }
            }
            for place in large {
                match self.read_paced(&here, place, &mut pace, &mut || watch(&scrub))? {
                    None => {
                        self.note_scrub(&scrub)?;
                        return Ok(scrub);
                    }
                    Some(true) => {}
                    Some(false) => damaged.push(place),
                }
            }
            for entry in self.pack_entries(pack)? {
                scrub.state.blobs += 1;
                scrub.state.bytes += entry.stored;
            }
            // A pack that was deleted meanwhile is not damaged.
            if self.packs()?.contains(&pack) {
                for place in damaged {
                    scrub.state.damaged += 1;
                    scrub.state.healed += u64::from(self.heal(&here, place, heal)?);
                }
            }
            scrub.after = pack.to_string();
            if scrub.state.bytes - noted > NOTE_EVERY {
                self.note_scrub(&scrub)?;
                noted = scrub.state.bytes;
            }
        }
        (scrub.running, scrub.after) = (false, String::new());
        scrub.state.passes += 1;
        scrub.state.ended_at = now();
        self.note_scrub(&scrub)?;
        Ok(scrub)
    }

    /// Whether a large copy is good; `None` when it was broken off.
    fn read_paced(
        &self,
        here: &Handle,
        place: Place,
        pace: &mut Pace,
        watch: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Option<bool>> {
        let Some(mut pieces) = here.block_on(self.read_pieces(place))? else { return Ok(Some(false)) };
        let mut hasher = BlobHasher::new();
        while let Some(piece) = here.block_on(pieces.try_next())? {
            hasher.update(&piece);
            pace.wait(piece.len() as u64);
            if watch().is_break() {
                return Ok(None);
            }
        }
        Ok(Some(self.is_found(place, &hasher)))
    }

    /// Finds another copy of what is damaged, or writes down that there is none.
    fn heal(&self, here: &Handle, place: Place, heal: Heal<'_>) -> Result<bool> {
        let blob = place.entry.blob;
        if here.block_on(self.find_missing(&[blob]))?.is_empty() {
            return Ok(true);
        }
        if blob.size <= MAX_SHARED_BLOB
            && let Some(data) = heal(&blob)?
        {
            here.block_on(self.put(vec![(blob, data)]))?;
            return Ok(true);
        }
        let record = Record {
            version: VERSION,
            blob,
            pack: place.pack.to_string(),
            reason: format!("its copy in pack {} is damaged", place.pack),
            found_at: now(),
        };
        let text = serde_json::to_vec(&record).map_err(|e| StoreError::Invalid(e.to_string()))?;
        here.block_on(
            self.0.bucket.put(&format!("{DAMAGED}/{}-{}", place.pack, blob.digest), vec![Bytes::from(text)]),
        )?;
        Ok(false)
    }

    /// The blobs that were found damaged and have no good copy, as the bucket says. Copies that are damaged do not count as present
    /// any more; records of what is good again, or gone, are deleted.
    ///
    /// # Errors
    /// Those of the bucket and of the index.
    pub async fn damages(&self) -> Result<Vec<Damage>> {
        let mut damages: HashMap<Blob, Damage> = HashMap::new();
        for (name, _) in self.0.bucket.list(DAMAGED, None).await? {
            let key = format!("{DAMAGED}/{name}");
            let Some(text) = self.0.bucket.get_small(&key, MAX_RECORD_BYTES + 1).await? else { continue };
            let (pack, damage) = match decode_damaged(&text) {
                Ok(record) => record,
                Err(error) => {
                    tracing::error!(key, bucket = self.name(), %error, "the record of a damaged copy cannot be read");
                    continue;
                }
            };
            if self.is_still_damaged(pack, &damage.blob).await? {
                damages.insert(damage.blob, damage);
            } else {
                self.0.bucket.delete(&key).await?;
            }
        }
        let names: Vec<Blob> = damages.keys().copied().collect();
        let lost: HashSet<Blob> = self.missing(&names)?.into_iter().collect();
        let mut damages: Vec<Damage> = damages.into_values().filter(|damage| lost.contains(&damage.blob)).collect();
        damages.sort_by_key(|damage| damage.blob);
        Ok(damages)
    }

    /// Reads a copy that was damaged.
    async fn is_still_damaged(&self, pack: PackName, blob: &Blob) -> Result<bool> {
        let Some(entry) = self.pack_entries(pack)?.into_iter().find(|entry| entry.blob == *blob) else {
            return Ok(false);
        };
        Ok(!self.is_good(Place { pack, entry }).await?)
    }

    /// Reads a copy, which does not count any more if it is not good.
    pub(super) async fn is_good(&self, place: Place) -> Result<bool> {
        let Place { pack, entry } = place;
        if entry.blob.size <= MAX_SHARED_BLOB {
            return Ok(!self.read_span(super::Span { pack, entries: vec![entry] }).await?.is_empty());
        }
        let Some(mut pieces) = self.read_pieces(place).await? else { return Ok(false) };
        let mut hasher = BlobHasher::new();
        while let Some(piece) = pieces.try_next().await? {
            hasher.update(&piece);
        }
        Ok(self.is_found(place, &hasher))
    }

    /// Whether what was read of a large copy is the blob.
    fn is_found(&self, place: Place, hasher: &BlobHasher) -> bool {
        let found = hasher.finish();
        if found != place.entry.blob {
            self.leave_out(place, &format!("it is {found}"));
        }
        found == place.entry.blob
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_other_versions_and_forms_are_refused() {
        let good = br#"{"version":1,"blob":"af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262/0","pack":"1700000000000-0123456789abcdef-00000001","reason":"r","found_at":5}"#;
        assert_eq!(decode_damaged(good).unwrap().1, Damage { blob: Blob::EMPTY, reason: "r".to_owned(), found_at: 5 });
        let text = String::from_utf8(good.to_vec()).unwrap();
        let newer = text.replace("\"version\":1", "\"version\":2");
        assert_eq!(decode_damaged(newer.as_bytes()), Err(FormatError::UnknownVersion(2)));
        for bad in [
            "",
            "{}",
            "[]",
            &text[..80],
            &text.replace("0123", "012x"),
            &text.replace("\"pack\"", "\"more\":1,\"pack\""),
        ] {
            assert!(matches!(decode_damaged(bad.as_bytes()), Err(FormatError::Malformed(_))), "{bad}");
        }
    }
}
