//! StoreAdmin.GetIntegrity: where the scrub is, what is lost, and who needs it.

use std::path::PathBuf;

use aether_cas::{Blob, LocalStore, store::Result};
use aether_proto::store::v1::{AffectedPath, AffectedRoot, DamagedBlob, Integrity, ScrubStatus};

use super::admin::root;

/// Lost blobs, and paths of one root, in a report.
const LOST_BLOBS: usize = 1000;
const LOST_PATHS: usize = 100;

/// Looks it all up. Follows roots only when something is lost.
pub(crate) fn report(store: &LocalStore) -> Result<Integrity> {
    let (scrub, held) = (store.scrub_state()?, store.statistics());
    let damages = store.damages(LOST_BLOBS)?;
    let affected = if damages.is_empty() { Vec::new() } else { store.affected(&damages, LOST_PATHS)? };
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
    })
}
