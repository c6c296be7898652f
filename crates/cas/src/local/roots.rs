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

    /// Forgets the roots of an owner for which `kind` and `name`, where given, agree, also those that cannot be read.
    /// Returns how many there were.
    ///
    /// # Errors
    /// Those of the index.
    pub fn unpin(&self, owner_uid: &str, kind: Option<&str>, name: Option<&str>) -> Result<usize> {
        let mut keys: Vec<Vec<u8>> = self.shared.index.roots()?.into_iter().map(|(key, _)| key).collect();
        keys.retain(|key| {
            parse_key(key).is_some_and(|(owner, its_kind, its_name)| {
                owner == owner_uid
                    && kind.is_none_or(|kind| kind == its_kind)
                    && name.is_none_or(|name| name == its_name)
            })
        });
        self.shared.index.delete_roots(&keys)?;
        Ok(keys.len())
    }

    /// The roots of an owner and kind, where given, in order of owner, kind and name.
    ///
    /// # Errors
    /// Those of the index; [`StoreError::Invalid`] for a pin that cannot be read, whoever's it is, because whoever
    /// collects must not take it for none.
    pub fn roots(&self, owner_uid: Option<&str>, kind: Option<&str>) -> Result<Vec<Root>> {
        let read = |(key, value): (Vec<u8>, Vec<u8>)| {
            parse(&key, &value).ok_or_else(|| {
                let pin = String::from_utf8_lossy(&key).replace('\0', "/");
                StoreError::Invalid(format!("a pin in {} cannot be read: {pin:?}", self.shared.name()))
            })
        };
        let mut roots = self.shared.index.roots()?.into_iter().map(read).collect::<Result<Vec<Root>>>()?;
        roots.retain(|root| {
            owner_uid.is_none_or(|uid| uid == root.owner_uid) && kind.is_none_or(|kind| kind == root.kind)
        });
        Ok(roots)
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
    let (owner_uid, kind, name) = parse_key(key)?;
    let (tree, pinned_at) = std::str::from_utf8(value).ok()?.split_once(' ')?;
    Some(Root {
        owner_uid: owner_uid.to_owned(),
        kind: kind.to_owned(),
        name: name.to_owned(),
        tree: tree.parse().ok()?,
        pinned_at: pinned_at.parse().ok()?,
    })
}

/// Owner, kind and name.
fn parse_key(key: &[u8]) -> Option<(&str, &str, &str)> {
    let mut parts = std::str::from_utf8(key).ok()?.splitn(3, '\0');
    Some((parts.next()?, parts.next()?, parts.next()?))
}

#[cfg(test)]
mod tests {
    use std::{ops::ControlFlow, time::Duration};

    use super::*;
    use crate::{LocalConfig, collect::Pace, testing::blob};

    #[test]
    fn a_pin_that_cannot_be_read_stops_collection_until_its_owner_forgets_it() {
        let folder = tempfile::tempdir().unwrap();
        let (objects, index) = (folder.path().join("objects"), folder.path().join("index"));
        let config = LocalConfig { objects, index, inline_limit: 1000 };
        let store = LocalStore::open_collected(config, Duration::ZERO).unwrap();
        let collect = || store.collect(Pace::new(None), &mut |_| ControlFlow::Continue(()));
        let (content, data) = blob(1, 100);
        store.put_batch(vec![(content, data)]).unwrap();
        store.shared.index.put_root(&key("uid", "Checkpoint", "c").unwrap(), b"of another version").unwrap();

        let error = store.roots(None, None).unwrap_err();
        assert!(matches!(error, StoreError::Invalid(_)), "{error}");
        assert!(error.to_string().contains("cannot be read: \"uid/Checkpoint/c\""), "{error}");
        assert!(matches!(collect(), Err(StoreError::Invalid(_))));
        assert_eq!(store.statistics().inline_blobs, 1);

        assert_eq!(store.unpin("uid", Some("SessionHead"), None).unwrap(), 0);
        assert_eq!(store.unpin("uid", Some("Checkpoint"), Some("c")).unwrap(), 1);
        assert_eq!(collect().unwrap().deleted.blobs, 1);
    }
}
