//! Pins: trees that somebody needs. Collection keeps what they reach.

use std::time::{SystemTime, UNIX_EPOCH};

use super::LocalStore;
use crate::{Blob, StoreError, store::Result};

/// A pinned tree, named by owner, kind and name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// UID of the Kubernetes object that needs the tree; not empty.
    pub owner_uid: String,
    /// What the tree is to its owner, e.g. `Checkpoint`; not empty.
    pub kind: String,
    /// Tells roots of one owner and kind apart; may be empty.
    pub name: String,
    /// The root directory.
    pub tree: Blob,
    /// When it was pinned, in seconds since 1970 (UTC).
    pub pinned_at: i64,
}

impl LocalStore {
    /// Pins `tree`; replaces what the same owner, kind and name had pinned.
    ///
    /// A tree that is condemned is saved by its pin as long as nothing of it is being deleted.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when the root directory is not here or is being deleted, [`StoreError::Invalid`] for
    /// an empty owner or kind or one with a NUL, and those of the index.
    pub fn pin(&self, owner_uid: &str, kind: &str, name: &str, tree: Blob) -> Result<()> {
        let key = key(owner_uid, kind, name)?;
        let shared = &self.shared;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let value = format!("{tree} {now}");
        // Held until the pin is written: a collection either sees it, or has decided before.
        let mut verdicts = shared.tenure.as_ref().map(|tenure| (tenure, tenure.write()));
        if !shared.missing(&[tree], |_, _| true)?.is_empty() {
            return Err(shared.not_found(&tree));
        }
        if let Some((tenure, verdicts)) = &mut verdicts
            && !shared.which_condemned(tenure, std::iter::once(&tree.digest))?.is_empty()
        {
            if verdicts.sentenced {
                return Err(shared.not_found(&tree));
            }
            verdicts.appeals += 1;
        }
        shared.index.put_root(&key, value.as_bytes())
    }

    /// Forgets the roots of an owner for which `kind` and `name`, where given, agree. Returns how many there were.
    ///
    /// # Errors
    /// Those of the index.
    pub fn unpin(&self, owner_uid: &str, kind: Option<&str>, name: Option<&str>) -> Result<usize> {
        let keys = self
            .roots(Some(owner_uid), kind)?
            .into_iter()
            .filter(|root| name.is_none_or(|name| name == root.name))
            .map(|root| key(&root.owner_uid, &root.kind, &root.name))
            .collect::<Result<Vec<_>>>()?;
        self.shared.index.delete_roots(&keys)?;
        Ok(keys.len())
    }

    /// The roots of an owner and kind, where given, in order of owner, kind and name.
    ///
    /// # Errors
    /// Those of the index.
    pub fn roots(&self, owner_uid: Option<&str>, kind: Option<&str>) -> Result<Vec<Root>> {
        let roots = self.shared.index.roots()?;
        Ok(roots
            .into_iter()
            .filter_map(|(key, value)| parse(&key, &value))
            .filter(|root| owner_uid.is_none_or(|uid| uid == root.owner_uid))
            .filter(|root| kind.is_none_or(|kind| kind == root.kind))
            .collect())
    }
}

pub(super) fn key(owner_uid: &str, kind: &str, name: &str) -> Result<Vec<u8>> {
    for (what, text, may_be_empty) in [("owner UID", owner_uid, false), ("kind", kind, false), ("name", name, true)] {
        if text.contains('\0') || (text.is_empty() && !may_be_empty) {
            return Err(StoreError::Invalid(format!("a root needs an {what} without NUL bytes, not {text:?}")));
        }
    }
    Ok(format!("{owner_uid}\0{kind}\0{name}").into_bytes())
}

pub(super) fn parse(key: &[u8], value: &[u8]) -> Option<Root> {
    let mut parts = std::str::from_utf8(key).ok()?.splitn(3, '\0');
    let (tree, pinned_at) = std::str::from_utf8(value).ok()?.split_once(' ')?;
    Some(Root {
        owner_uid: parts.next()?.to_owned(),
        kind: parts.next()?.to_owned(),
        name: parts.next()?.to_owned(),
        tree: tree.parse().ok()?,
        pinned_at: pinned_at.parse().ok()?,
    })
}
