//! Reads everything a local store holds and compares it with what it should be.

use std::{collections::HashSet, fs, path::PathBuf};

use super::{Files, LocalStore, Root};
use crate::{Blob, StoreError, store::Result, tree::walk::bottom_up};

/// What a check found.
#[derive(Debug, Default)]
pub struct FsckReport {
    /// Blobs that were read.
    pub blobs: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Blobs whose copy is not what its name says.
    pub damaged: Vec<Blob>,
    /// Files in the object directory that the index does not know: left by a crash, harmless.
    pub stray_files: Vec<PathBuf>,
    /// Rows of the index that cannot be read, as hexadecimal digits of their keys: what they stood for counts as missing.
    pub unreadable_rows: Vec<String>,
    /// Pinned trees that miss something.
    pub incomplete_roots: Vec<IncompleteRoot>,
    /// Whether damaged copies, unreadable rows and stray files were dropped.
    pub repaired: bool,
}

/// A pinned tree that misses something.
#[derive(Debug)]
pub struct IncompleteRoot {
    /// The pin.
    pub root: Root,
    /// The first thing it misses.
    pub problem: String,
}

impl FsckReport {
    /// Whether nothing is wrong that costs data. Stray files do not.
    pub fn is_healthy(&self) -> bool {
        self.damaged.is_empty() && self.unreadable_rows.is_empty() && self.incomplete_roots.is_empty()
    }
}

impl LocalStore {
    /// Reads every blob, looks for stray files, and follows every root. May run beside other work.
    ///
    /// With `repair`, damaged copies are set aside, so that they count as missing and are
    /// uploaded again, rows that cannot be read are dropped, and stray files are removed.
    ///
    /// # Errors
    /// Those of the disk. Damage is no error.
    pub fn fsck(&self, repair: bool) -> Result<FsckReport> {
        let mut report = FsckReport { repaired: repair, ..Default::default() };
        self.check_blobs(repair, &mut report)?;
        self.check_files(repair, &mut report)?;
        let damaged: HashSet<Blob> = report.damaged.iter().copied().collect();
        for root in self.roots(None, None)? {
            if let Some(problem) = self.check_root(&root, &damaged)? {
                report.incomplete_roots.push(IncompleteRoot { root, problem });
            }
        }
        Ok(report)
    }

    fn check_blobs(&self, repair: bool, report: &mut FsckReport) -> Result<()> {
        let shared = &self.shared;
        let unreadable = shared.index.for_each(|blob, entry| {
            let mut good = true;
            for form in entry.forms() {
                report.blobs += 1;
                report.bytes += blob.size;
                good &= shared.check_copy(&blob, form)?.is_none();
            }
            if !good {
                report.damaged.push(blob);
            }
            Ok(())
        })?;
        report.unreadable_rows = unreadable.iter().map(hex::encode).collect();
        if repair {
            for key in &unreadable {
                let _writing = shared.lock_writes();
                shared.index.drop_unreadable(key)?;
            }
            for blob in &report.damaged {
                match shared.drop_damaged(blob) {
                    Ok(_) | Err(StoreError::Corrupt { .. } | StoreError::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    fn check_files(&self, repair: bool, report: &mut FsckReport) -> Result<()> {
        let files: &Files = &self.shared.files;
        files.for_each(|digest, path| {
            // Files are named before the index speaks of them: ask it between two commits.
            let _writing = self.shared.lock_writes();
            let known = match &digest {
                Some(digest) => self.shared.index.entry(digest)?.is_some_and(|e| e.file),
                None => false,
            };
            if !known {
                if repair {
                    fs::remove_file(path).map_err(StoreError::io("remove", path))?;
                }
                report.stray_files.push(path.to_owned());
            }
            Ok(())
        })
    }

    /// What a root misses first, if anything.
    fn check_root(&self, root: &Root, damaged: &HashSet<Blob>) -> Result<Option<String>> {
        let directories = match bottom_up(&root.tree, self, |_| false) {
            Ok(directories) => directories,
            Err(
                error @ (StoreError::NotFound { .. }
                | StoreError::Corrupt { .. }
                | StoreError::NotADirectory { .. }
                | StoreError::Invalid(_)),
            ) => return Ok(Some(error.to_string())),
            Err(error) => return Err(error),
        };
        for (blob, directory) in &directories {
            let contents: Vec<Blob> = directory.contents().collect();
            let missing = self.shared.missing(&contents, |_, _| true)?;
            let bad = missing
                .first()
                .or_else(|| contents.iter().find(|blob| damaged.contains(blob)))
                .or_else(|| damaged.get(blob));
            if let Some(bad) = bad {
                return Ok(Some(format!("blob {bad} is missing or damaged")));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use bytes::Bytes;

    use super::*;
    use crate::{LocalConfig, collect::Pace};

    #[test]
    fn a_row_that_cannot_be_read_is_told_and_stops_no_pass() {
        let folder = tempfile::tempdir().unwrap();
        let [objects, index] = ["objects", "index"].map(|name| folder.path().join(name));
        let config = LocalConfig { objects, index, inline_limit: 64 };
        let store = LocalStore::open(config.clone()).unwrap();
        // More than a page of them, before any other.
        for n in 0..300_u16 {
            store.shared.index.put_raw_entry(&[&[0; 30][..], &n.to_be_bytes()].concat(), b"?");
        }
        store.shared.index.put_raw_entry(b"short", &[1; 9]);
        let data = Bytes::from_static(b"content");
        store.put_batch(vec![(Blob::of(&data), data.clone())]).unwrap();

        let state = store.scrub(Pace::new(None), &|_| Ok(false), &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!((state.passes, state.blobs), (1, 1));
        let report = store.fsck(false).unwrap();
        assert_eq!((report.blobs, report.unreadable_rows.len(), report.is_healthy()), (1, 301, false));
        assert!(report.unreadable_rows.contains(&hex::encode(b"short")));

        assert_eq!(store.fsck(true).unwrap().unreadable_rows.len(), 301);
        assert!(store.fsck(false).unwrap().is_healthy());
        assert_eq!(store.read_blob(&Blob::of(&data)).unwrap(), data);
    }
}
