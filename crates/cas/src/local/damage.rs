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
        if !healed.is_empty() && !self.shared.index.read_only {
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

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        fs,
        path::{Path, PathBuf},
        time::Duration,
    };

    use super::*;
    use crate::{
        LocalConfig, StoreError,
        testing::{directory, file},
    };
    use bytes::Bytes;

    /// Everything below a folder, and what is in the files.
    fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                found.extend(contents(&path));
            }
            found.insert(path.clone(), fs::read(&path).unwrap_or_default());
        }
        found
    }

    #[test]
    fn whoever_only_looks_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let [objects, index] = ["objects", "index"].map(|name| folder.path().join(name));
        let config = LocalConfig { objects, index, inline_limit: 4 };
        let data = Bytes::from_static(b"as large as a file");
        let (lost, back) = (Blob::of(&data), Bytes::from_static(b"another such file"));
        let root = {
            let store = LocalStore::open_collected(config.clone(), Duration::from_secs(60)).unwrap();
            store.put_batch(vec![(lost, data), (Blob::of(&back), back.clone())]).unwrap();
            let root = store.put_directory(&directory([("f", file(lost))])).unwrap();
            store.pin("u", "Checkpoint", "", root).unwrap();
            for blob in [lost, Blob::of(&back)] {
                let path = store.object_path(&blob.digest);
                fs::remove_file(&path).unwrap();
                fs::write(&path, "?").unwrap();
                store.verify(&blob).unwrap_err();
            }
            // This one came back, which whoever looks next finds out.
            store.put_batch(vec![(Blob::of(&back), back)]).unwrap();
            root
        };
        let before = contents(folder.path());
        {
            let store = LocalStore::open_read_only(config.clone()).unwrap();
            let damages = store.damages(10).unwrap();
            assert_eq!(damages.iter().map(|damage| damage.blob).collect::<Vec<_>>(), [lost]);
            assert_eq!(store.affected(&damages, 10).unwrap()[0].root.tree, root);
            assert_eq!(store.statistics().file_blobs, 1);
            let new = Bytes::from_static(b"a new file of some size");
            assert!(matches!(store.put_batch(vec![(Blob::of(&new), new)]), Err(StoreError::Closed(_))));
        }
        let after = contents(folder.path());
        let changed = after.keys().chain(before.keys()).filter(|path| before.get(*path) != after.get(*path));
        assert_eq!(changed.collect::<Vec<_>>(), Vec::<&PathBuf>::new());
        let missing = LocalConfig { index: folder.path().join("none"), ..config };
        assert!(LocalStore::open_read_only(missing).is_err());
        assert!(!folder.path().join("none").exists());
    }
}
