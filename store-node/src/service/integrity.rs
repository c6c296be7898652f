//! StoreAdmin.GetIntegrity: where the scrub is, what is lost, and who needs it.

use std::path::PathBuf;

use aether_cas::{Blob, LocalStore, store::Result};
use aether_proto::store::v1::{AffectedPath, AffectedRoot, DamagedBlob, Integrity, ScrubStatus};

use super::admin::root;

/// Lost blobs that are looked for below the roots, and those in a report.
const SOUGHT_BLOBS: usize = 100_000;
const LOST_BLOBS: usize = 1000;
/// Paths of one root in a report, unless fewer are asked for.
const LOST_PATHS: usize = 100;

/// Looks it all up. Follows roots only when something is lost, and names at most `paths` of each; 0 is for the most.
pub(crate) fn report(store: &LocalStore, paths: u32) -> Result<Integrity> {
    let (scrub, held) = (store.scrub_state()?, store.statistics());
    let mut damages = store.damages(SOUGHT_BLOBS)?;
    let paths = if paths == 0 { LOST_PATHS } else { LOST_PATHS.min(paths as usize) };
    let affected = if damages.is_empty() { Vec::new() } else { store.affected(&damages, paths)? };
    let more = damages.len().saturating_sub(LOST_BLOBS) as u64;
    damages.truncate(LOST_BLOBS);
    let scrub = ScrubStatus {
        running: scrub.is_running(),
        passes: scrub.passes,
        began_at: scrub.began_at,
        ended_at: scrub.ended_at,
        blobs: scrub.blobs,
        bytes: scrub.bytes,
        damaged: scrub.damaged,
        healed: scrub.healed,
        total_blobs: held.inline_blobs + held.file_blobs,
        total_bytes: held.inline_bytes + held.file_bytes,
    };
    let path = |(path, blob): (PathBuf, Blob)| AffectedPath {
        path: path.to_string_lossy().into_owned(),
        blob: blob.to_string(),
    };
    Ok(Integrity {
        scrub: Some(scrub),
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
