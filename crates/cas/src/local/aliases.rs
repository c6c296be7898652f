//! What contents are called by SHA-256: names beside the blobs, so that each content is there once.
//!
//! A name may outlive its content, and is right again when the content comes back; it never says that a content is
//! there. [`LocalStore::prune_sha256`] forgets names whose contents are gone.

use std::collections::HashSet;

use super::{
    LocalStore,
    index::{Changes, Row, Table},
};
use crate::{Blob, Digest, Sha256Blob, store::Result};

/// Names looked at in one step of pruning.
const PAGE: usize = 4096;

/// The row of a name: digest and size of the blob.
pub(crate) fn encode(blob: &Blob) -> [u8; 40] {
    let mut row = [0; 40];
    row[..32].copy_from_slice(&blob.digest.0);
    row[32..].copy_from_slice(&blob.size.to_be_bytes());
    row
}

pub(crate) fn decode(row: &[u8]) -> Option<Blob> {
    let (digest, size) = row.split_first_chunk()?;
    Some(Blob { digest: Digest(*digest), size: u64::from_be_bytes(size.try_into().ok()?) })
}

impl LocalStore {
    /// The blobs that names stand for, in their order; `None` for names that nobody has said anything of.
    ///
    /// # Errors
    /// Those of the index.
    pub fn resolve_sha256(&self, names: &[Sha256Blob]) -> Result<Vec<Option<Blob>>> {
        let found = self.aliases(names.iter())?;
        let blobs = names.iter().zip(found).map(|(name, blob)| match name {
            &Sha256Blob::EMPTY => Some(Blob::EMPTY),
            name => blob.filter(|blob| blob.size == name.size),
        });
        Ok(blobs.collect())
    }

    /// Says for which blobs names stand: of the same bytes, which the caller has computed both digests of. Durable when
    /// this returns.
    ///
    /// # Errors
    /// Those of the index.
    pub fn name_sha256(&self, names: &[(Sha256Blob, Blob)]) -> Result<()> {
        let _naming = self.shared.aliases.lock().unwrap_or_else(|e| e.into_inner());
        let known = self.aliases(names.iter().map(|(name, _)| name))?;
        let new = names.iter().zip(known);
        let new = new.filter(|((name, blob), known)| *name != Sha256Blob::EMPTY && *known != Some(*blob));
        self.put_aliases(new.map(|((name, blob), _)| row(Digest(name.digest), Some(blob))).collect())
    }

    /// Forgets the names of blobs that are gone: `missing` says which of some are. Returns how many there were.
    ///
    /// A content may come back between the question and the forgetting. Whoever stores it under its name, or says that it
    /// is there under it, names it after that and before the answer: this waits until here all is forgotten.
    ///
    /// # Errors
    /// Those of `missing` and of the index.
    pub fn prune_sha256(&self, missing: impl Fn(&[Blob]) -> Result<Vec<Blob>>) -> Result<u64> {
        let mut after = None;
        let mut pruned = 0;
        loop {
            let _naming = self.shared.aliases.lock().unwrap_or_else(|e| e.into_inner());
            let page = self.shared.index.rows_after(Table::Sha256, after.as_ref(), PAGE)?;
            let Some((last, _)) = page.last() else { return Ok(pruned) };
            after = Some(*last);
            let page: Vec<_> = page.into_iter().map(|(digest, row)| (digest, decode(&row))).collect();
            let blobs: Vec<Blob> = page.iter().filter_map(|(_, blob)| *blob).collect();
            let missing: HashSet<Blob> = missing(&blobs)?.into_iter().collect();
            let gone = page.into_iter().filter(|(_, blob)| blob.is_none_or(|blob| missing.contains(&blob)));
            let gone: Vec<Row> = gone.map(|(digest, _)| row(digest, None)).collect();
            pruned += gone.len() as u64;
            self.put_aliases(gone)?;
        }
    }

    fn aliases<'a>(&self, names: impl Iterator<Item = &'a Sha256Blob>) -> Result<Vec<Option<Blob>>> {
        let digests: Vec<Digest> = names.map(|name| Digest(name.digest)).collect();
        let rows = self.shared.index.rows(Table::Sha256, &digests)?;
        Ok(rows.into_iter().map(|row| decode(&row?)).collect())
    }

    fn put_aliases(&self, rows: Vec<Row>) -> Result<()> {
        if rows.is_empty() { Ok(()) } else { self.shared.index.apply(Changes { rows, ..Default::default() }) }
    }
}

fn row(digest: Digest, blob: Option<&Blob>) -> Row {
    (Table::Sha256, digest, blob.map(|blob| encode(blob).to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LocalConfig;

    #[test]
    fn names_are_kept_found_and_pruned() {
        let folder = tempfile::tempdir().unwrap();
        let (objects, index) = (folder.path().join("objects"), folder.path().join("index"));
        let store = LocalStore::open(LocalConfig { objects, index, inline_limit: 0 }).unwrap();
        let datas: Vec<Vec<u8>> = (0..3 * PAGE as u32).map(|n| n.to_le_bytes().to_vec()).collect();
        let names: Vec<_> = datas.iter().map(|data| (Sha256Blob::of(data), Blob::of(data))).collect();
        store.name_sha256(&names).unwrap();
        let asked: Vec<_> = names.iter().map(|(name, _)| *name).collect();
        let blobs: Vec<_> = names.iter().map(|(_, blob)| Some(*blob)).collect();
        assert_eq!(store.resolve_sha256(&asked).unwrap(), blobs);
        let other_size = Sha256Blob { size: 5, ..asked[0] };
        assert_eq!(store.resolve_sha256(&[other_size, Sha256Blob::EMPTY]).unwrap(), [None, Some(Blob::EMPTY)]);

        let keep = |blob: &Blob| blob.digest.0[0].is_multiple_of(2);
        let kept = names.iter().filter(|(_, blob)| keep(blob)).count();
        let missing = |blobs: &[Blob]| Ok(blobs.iter().copied().filter(|blob| !keep(blob)).collect());
        assert_eq!(store.prune_sha256(missing).unwrap(), (names.len() - kept) as u64);
        for ((_, blob), found) in names.iter().zip(store.resolve_sha256(&asked).unwrap()) {
            assert_eq!(found, keep(blob).then_some(*blob));
        }
    }

    #[test]
    fn a_content_that_comes_back_while_its_name_is_forgotten_keeps_it() {
        let folder = tempfile::tempdir().unwrap();
        let (objects, index) = (folder.path().join("objects"), folder.path().join("index"));
        let store = LocalStore::open(LocalConfig { objects, index, inline_limit: 0 }).unwrap();
        let named = (Sha256Blob::of(b"content"), Blob::of(b"content"));
        store.name_sha256(&[named]).unwrap();
        let (sender, naming) = std::sync::mpsc::channel();
        let missing = |blobs: &[Blob]| {
            let store = store.clone();
            sender.send(std::thread::spawn(move || store.name_sha256(&[named]).unwrap())).unwrap();
            // Long enough for it to be done, if it did not wait.
            std::thread::sleep(std::time::Duration::from_millis(100));
            Ok(blobs.to_vec())
        };
        assert_eq!(store.prune_sha256(missing).unwrap(), 1);
        naming.recv().unwrap().join().unwrap();
        assert_eq!(store.resolve_sha256(&[named.0]).unwrap(), [Some(named.1)]);
    }
}
