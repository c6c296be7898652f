//! What was found damaged, remembered until the blob is there again. Only in stores that are collected.

use super::{
    LocalStore, Shared,
    index::{Changes, Row, Table},
    tenure::{PAGE, now},
};
use crate::{Blob, Digest, store::Result};

/// A blob whose copy was lost or damaged, and that is not there now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The blob.
    pub blob: Blob,
    /// What was wrong with its copy.
    pub reason: String,
    /// When that was found, in milliseconds since 1970.
    pub found_at: u64,
}

impl LocalStore {
    /// Up to `limit` blobs that were found damaged and are still missing; forgets those that came back.
    ///
    /// # Errors
    /// Those of the index.
    pub fn damages(&self, limit: usize) -> Result<Vec<Damage>> {
        let mut damages = Vec::new();
        let mut healed = Vec::new();
        let mut after: Option<Digest> = None;
        loop {
            let rows = self.shared.index.rows_after(Table::Damaged, after.as_ref(), PAGE)?;
            let Some((last, _)) = rows.last() else { break };
            after = Some(*last);
            for (digest, row) in rows {
                let Some(damage) = decode(digest, &row) else { continue };
                if self.shared.entry(&damage.blob)?.is_some() {
                    healed.push((Table::Damaged, digest, None));
                } else if damages.len() < limit {
                    damages.push(damage);
                }
            }
        }
        if !healed.is_empty() {
            self.shared.index.apply(Changes { rows: healed, ..Default::default() })?;
        }
        Ok(damages)
    }
}

impl Shared {
    /// What remembers that the copy of `blob` was damaged.
    pub(super) fn damage_row(&self, blob: &Blob, reason: &str) -> Option<Row> {
        self.tenure.as_ref()?;
        let row = [&now().to_be_bytes()[..], &blob.size.to_be_bytes(), reason.as_bytes()].concat();
        Some((Table::Damaged, blob.digest, Some(row)))
    }
}

fn decode(digest: Digest, row: &[u8]) -> Option<Damage> {
    let (found_at, rest) = row.split_at_checked(8)?;
    let (size, reason) = rest.split_at_checked(8)?;
    Some(Damage {
        blob: Blob { digest, size: u64::from_be_bytes(size.try_into().ok()?) },
        reason: String::from_utf8_lossy(reason).into_owned(),
        found_at: u64::from_be_bytes(found_at.try_into().ok()?),
    })
}
