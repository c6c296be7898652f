//! StoreAdmin.GetIntegrity: where the scrub is, what is lost, and who needs it.

use std::path::PathBuf;

use aether_cas::{
    Blob,
    local::{ScrubState, affected},
    store::Result,
};
use aether_proto::store::v1::{AffectedPath, AffectedRoot, DamagedBlob, Integrity, ScrubStatus};

use super::admin::root;
use crate::tiered::TieredStore;

/// Lost blobs that are looked for below the roots, and those in a report.
const SOUGHT_BLOBS: usize = 100_000;
const LOST_BLOBS: usize = 1000;
/// Paths of one root in a report, unless fewer are asked for.
const LOST_PATHS: usize = 100;

/// Looks it all up. Follows roots only when something is lost, and names at most `paths` of each; 0 is for the most.
pub(crate) fn report(store: &TieredStore, paths: u32) -> Result<Integrity> {
    let mut damages = store.damages(SOUGHT_BLOBS)?;
    let paths = if paths == 0 { LOST_PATHS } else { LOST_PATHS.min(paths as usize) };
    let affected =
        if damages.is_empty() { Vec::new() } else { affected(store, store.roots(None, None)?, &damages, paths)? };
    let more = damages.len().saturating_sub(LOST_BLOBS) as u64;
    damages.truncate(LOST_BLOBS);
    let held = store.statistics().disk;
    let disk = Pass {
        state: store.disk().scrub_state()?,
        running: store.disk().scrub_state()?.is_running(),
        blobs: held.inline_blobs + held.file_blobs,
        bytes: held.inline_bytes + held.file_bytes,
    };
    let (scrub, cache_scrub) = match store.durable() {
        None => (disk, None),
        Some(durable) => {
            let (of_packs, held) = (durable.scrub_state()?, durable.statistics());
            // Nobody counts the copies in packs.
            let packs =
                Pass { state: of_packs.state, running: of_packs.is_running(), blobs: 0, bytes: held.stored_bytes };
            (packs, Some(disk))
        }
    };
    let path = |(path, blob): (PathBuf, Blob)| AffectedPath {
        path: path.to_string_lossy().into_owned(),
        blob: blob.to_string(),
    };
    Ok(Integrity {
        scrub: Some(scrub.status()),
        cache_scrub: cache_scrub.map(|pass| pass.status()),
        damaged: damages
            .into_iter()
            .map(|d| DamagedBlob { blob: d.blob.to_string(), reason: d.reason, found_at: d.found_at })
            .collect(),
        affected: affected
            .into_iter()
            .map(|a| AffectedRoot {
                root: Some(root(a.root)),
                paths: a.paths.into_iter().map(path).collect(),
                more: a.more,
            })
            .collect(),
        more,
    })
}

/// A scrub, and how much it has to read.
struct Pass {
    state: ScrubState,
    running: bool,
    blobs: u64,
    bytes: u64,
}

impl Pass {
    fn status(&self) -> ScrubStatus {
        ScrubStatus {
            running: self.running,
            passes: self.state.passes,
            began_at: self.state.began_at,
            ended_at: self.state.ended_at,
            blobs: self.state.blobs,
            bytes: self.state.bytes,
            damaged: self.state.damaged,
            healed: self.state.healed,
            total_blobs: self.blobs,
            total_bytes: self.bytes,
        }
    }
}
