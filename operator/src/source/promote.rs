//! Revisions that come of commits and not of imports.

use aether_api::source::Revision;
use aether_api::{AetherSource, AetherSourceStatus};

use super::{next_name, show_newest};
use crate::objects;

/// The status of the source with this tree as its newest revision, and the revision's name. The same for the same `mark`, however
/// often it is asked for. `base` is the revision that the tree came of, by name.
pub(crate) fn promoted(
    source: &AetherSource,
    root: &str,
    base: Option<&str>,
    mark: &str,
) -> (AetherSourceStatus, String) {
    let mut status = source.status.clone().unwrap_or_default();
    if let Some(there) = status.revisions.iter().find(|revision| revision.promoted.as_deref() == Some(mark)) {
        let name = there.name.clone();
        return (status, name);
    }
    let name = next_name(&status);
    let like = status.revisions.iter().find(|revision| Some(revision.name.as_str()) == base);
    let (files, bytes) = like.map_or((0, 0), |like| (like.files, like.bytes));
    let revision = Revision {
        name: name.clone(),
        root: root.into(),
        // Nobody has counted; it differs from what it came of by what was reviewed.
        files,
        bytes,
        commit: None,
        listing: None,
        promoted: Some(mark.into()),
        time: objects::now(),
        milliseconds: 0,
    };
    status.revisions.insert(0, revision);
    status.revisions.truncate(source.spec.revisions_to_keep.max(1) as usize);
    show_newest(&mut status);
    (status, name)
}
