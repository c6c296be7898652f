//! What a node's engine and its lazy layer agree on, in files, since they are two processes and either may be down.
//!
//! ```text
//! <root>/lazy/mnt            where the lazy layer is mounted
//! <root>/lazy/catalog        objects that it may be asked for: 32 bytes of digest, 8 of size (little endian), each
//! <root>/lazy/opened         numbers of objects in the order in which they were first opened through it, 8 bytes each
//! <root>/lazy/needed         an empty file: there are sessions whose contents are not all in the engine's objects
//! <pool>/lazy/<boot>/ab/cd…  contents that it has fetched and the engine has not taken over yet
//! ```
//!
//! The catalog only grows, and the number of an object is the place of its first record: it stays the same for every
//! reader at every time. Sizes are in it because a store is asked by digest and size. A wrong record does no harm: what
//! is fetched is verified against both.
//!
//! Fetched contents are verified but not synced. Those of an earlier boot may be torn, so nobody looks at them.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::{Blob, Digest};

/// Bytes of a record: a digest and a size.
const RECORD: usize = 40;
/// Bytes of a number in the list of what was opened.
const NUMBER: usize = 8;

/// Where the files of a node's lazy layer are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    root: PathBuf,
    pool: PathBuf,
}

impl Places {
    /// Of the engine that owns `root`. Its pool is `root/pool`.
    pub fn new(root: &Path) -> Self {
        Self { root: root.join("lazy"), pool: root.join("pool") }
    }

    /// The folder that the engine makes before anything else.
    pub fn folder(&self) -> &Path {
        &self.root
    }

    /// Where the layer is mounted.
    pub fn mountpoint(&self) -> PathBuf {
        self.root.join("mnt")
    }

    /// The catalog.
    pub fn catalog(&self) -> PathBuf {
        self.root.join("catalog")
    }

    /// The list of what was opened.
    pub fn opened(&self) -> PathBuf {
        self.root.join("opened")
    }

    /// What is there as long as a session depends on the layer; the engine writes and removes it.
    pub fn needed(&self) -> PathBuf {
        self.root.join("needed")
    }

    /// The objects of the engine: only it writes there.
    pub fn objects(&self) -> PathBuf {
        self.pool.join("objects")
    }

    /// Where each boot has its folder of fetched contents. The engine makes it once the pool is there.
    pub fn fetched(&self) -> PathBuf {
        self.pool.join("lazy")
    }

    /// What was fetched since this machine started.
    ///
    /// # Errors
    /// When the kernel does not name the boot.
    pub fn fetched_now(&self) -> io::Result<PathBuf> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        Ok(self.fetched().join(boot.trim()))
    }
}

/// Adds `blobs` to the catalog, durably. A record that a crash cut off is overwritten.
///
/// # Errors
/// Those of the disk.
pub fn append_to_catalog(path: &Path, blobs: impl IntoIterator<Item = Blob>) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length - length % RECORD as u64))?;
    let mut records = Vec::new();
    for blob in blobs {
        records.extend_from_slice(&blob.digest.0);
        records.extend_from_slice(&blob.size.to_le_bytes());
    }
    file.write_all(&records)?;
    file.sync_all()
}

/// The catalog as its reader sees it.
#[derive(Debug)]
pub struct Catalog {
    path: PathBuf,
    blobs: Vec<Blob>,
    numbers: HashMap<Digest, u64>,
}

impl Catalog {
    /// Reads the catalog. One that is not there yet is empty.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut catalog = Self { path: path.to_owned(), blobs: Vec::new(), numbers: HashMap::new() };
        catalog.refresh()?;
        Ok(catalog)
    }

    /// Reads what was added since.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn refresh(&mut self) -> io::Result<()> {
        let file = match File::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file?,
        };
        let known = (self.blobs.len() * RECORD) as u64;
        let mut records = Vec::new();
        let mut file = io::BufReader::new(file);
        file.seek(SeekFrom::Start(known))?;
        file.read_to_end(&mut records)?;
        for record in records.chunks_exact(RECORD) {
            let (digest, size) = record.split_at(32);
            let digest = Digest(digest.try_into().unwrap_or_default());
            let size = u64::from_le_bytes(size.try_into().unwrap_or_default());
            self.numbers.entry(digest).or_insert(self.blobs.len() as u64);
            self.blobs.push(Blob { digest, size });
        }
        Ok(())
    }

    /// The number of an object.
    pub fn number(&self, digest: &Digest) -> Option<u64> {
        self.numbers.get(digest).copied()
    }

    /// The object of a number.
    pub fn blob(&self, number: u64) -> Option<Blob> {
        self.blobs.get(usize::try_from(number).ok()?).copied()
    }

    /// All objects, in order of number.
    pub fn blobs(&self) -> &[Blob] {
        &self.blobs
    }
}

/// Notes that the object of this number was opened. Not synced: it is a hint.
///
/// # Errors
/// Those of the disk.
pub fn note_opened(path: &Path, number: u64) -> io::Result<()> {
    OpenOptions::new().create(true).append(true).open(path)?.write_all(&number.to_le_bytes())
}

/// The numbers noted, in order, each once. None where nothing was noted.
///
/// # Errors
/// Those of the disk.
pub fn read_opened(path: &Path) -> io::Result<Vec<u64>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        file => file?,
    };
    let mut bytes = vec![0; usize::try_from(file.metadata()?.len()).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0)?;
    let mut seen = std::collections::HashSet::new();
    Ok(bytes
        .chunks_exact(NUMBER)
        .map(|number| u64::from_le_bytes(number.try_into().unwrap_or_default()))
        .filter(|number| seen.insert(*number))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(n: u64) -> Blob {
        Blob { digest: Digest::of(&n.to_le_bytes()), size: n + 1 }
    }

    #[test]
    fn numbers_stay_and_a_torn_record_is_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalog");
        let mut catalog = Catalog::open(&path).unwrap();
        assert!(catalog.blobs().is_empty());
        append_to_catalog(&path, (0..3).map(blob)).unwrap();
        catalog.refresh().unwrap();
        assert_eq!(catalog.number(&blob(2).digest), Some(2));
        OpenOptions::new().append(true).open(&path).unwrap().write_all(&[7; 13]).unwrap();
        catalog.refresh().unwrap();
        assert_eq!(catalog.blobs().len(), 3);
        append_to_catalog(&path, [blob(1), blob(9)]).unwrap();
        catalog.refresh().unwrap();
        assert_eq!(catalog.number(&blob(1).digest), Some(1), "the first record counts");
        assert_eq!(catalog.blob(4), Some(blob(9)));
        assert_eq!(catalog.blob(5), None);
        let again = Catalog::open(&path).unwrap();
        assert_eq!(again.number(&blob(9).digest), Some(4));
    }

    #[test]
    fn what_was_opened_is_told_once_and_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("opened");
        assert!(read_opened(&path).unwrap().is_empty());
        for number in [5, 3, 5, 9, 3] {
            note_opened(&path, number).unwrap();
        }
        assert_eq!(read_opened(&path).unwrap(), [5, 3, 9]);
    }
}
