//! What a node's engine and its lazy layer agree on, in files, since they are two processes and either may be down.
//!
//! ```text
//! <root>/lazy/mnt            where the lazy layer is mounted
//! <root>/lazy/catalog        a head, and objects that it may be asked for: 32 bytes of digest, 8 of size (little endian), each
//! <root>/lazy/opened         numbers of objects in the order in which they were first opened through it, 8 bytes each
//! <root>/lazy/needed         an empty file: there are sessions whose contents are not all in the engine's objects
//! <pool>/lazy/<boot>/ab/cd…  contents that it has fetched and the engine has not taken over yet
//! ```
//!
//! The head of the catalog names the boot in which it was begun (32 bytes) and the number of its first object (8 bytes);
//! those that follow have the next numbers. The kernel knows objects by their numbers for as long as it runs. So the catalog
//! only grows, by objects that are not in it; the engine begins it anew after a boot, with what is missing then, and with
//! numbers that no earlier one has given out. Sizes are in it because a store is asked by digest and size. A wrong record
//! does no harm: what is fetched is verified against both.
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
        Ok(self.fetched().join(boot()?))
    }
}

/// The first record of a catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    boot: Digest,
    first: u64,
}

impl Head {
    fn of_this_boot(first: u64) -> io::Result<Self> {
        Ok(Self { boot: Digest::of(boot()?.as_bytes()), first })
    }

    /// Of a catalog that is read from its beginning; `None` if it was never begun.
    fn read(mut file: impl Read) -> io::Result<Option<Self>> {
        let mut record = [0; RECORD];
        match file.read_exact(&mut record) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            read => {
                read?;
                let (boot, first) = decode(&record);
                Ok(Some(Self { boot, first }))
            }
        }
    }
}

fn encode(digest: &Digest, number: u64) -> [u8; RECORD] {
    let mut record = [0; RECORD];
    record[..32].copy_from_slice(&digest.0);
    record[32..].copy_from_slice(&number.to_le_bytes());
    record
}

fn decode(record: &[u8]) -> (Digest, u64) {
    let (digest, number) = record.split_at(32);
    (Digest(digest.try_into().unwrap_or_default()), u64::from_le_bytes(number.try_into().unwrap_or_default()))
}

fn boot() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Begins the catalog anew if that was not done since this machine started, durably: with the objects that `missing`
/// names.
///
/// # Errors
/// Those of the disk.
pub fn begin_catalog(path: &Path, missing: impl FnOnce() -> Vec<Blob>) -> io::Result<()> {
    let mut head = Head::of_this_boot(0)?;
    if let Some(mut file) = open(path)?
        && let Some(before) = Head::read(&mut file)?
    {
        if before.boot == head.boot {
            return Ok(());
        }
        head.first = before.first.saturating_add(file.metadata()?.len() / RECORD as u64);
    }
    let unfinished = path.with_extension("new");
    fs::write(&unfinished, encode(&head.boot, head.first))?;
    append_to_catalog(&unfinished, missing())?;
    fs::rename(&unfinished, path)?;
    if let Some(folder) = path.parent() {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

/// Adds to the catalog those of `blobs` that are not in it, durably. A record that a crash cut off is overwritten.
///
/// # Errors
/// Those of the disk.
pub fn append_to_catalog(path: &Path, blobs: impl IntoIterator<Item = Blob>) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
    // Whoever else adds to it waits until this is done.
    file.lock()?;
    let mut catalog = Catalog::open(path)?;
    let mut records = Vec::new();
    if catalog.head.is_none() {
        let head = Head::of_this_boot(0)?;
        records.extend_from_slice(&encode(&head.boot, head.first));
        file.set_len(0)?;
    }
    file.seek(SeekFrom::Start(catalog.length()))?;
    for blob in blobs {
        if catalog.number(&blob.digest).is_none() {
            catalog.add(blob);
            records.extend_from_slice(&encode(&blob.digest, blob.size));
        }
    }
    file.write_all(&records)?;
    file.sync_all()
}

fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        file => file.map(Some),
    }
}

/// The catalog as its reader sees it.
#[derive(Debug)]
pub struct Catalog {
    path: PathBuf,
    head: Option<Head>,
    blobs: Vec<Blob>,
    numbers: HashMap<Digest, u64>,
}

impl Catalog {
    /// Reads the catalog. One that was not begun yet in this boot is empty.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut catalog = Self { path: path.to_owned(), head: None, blobs: Vec::new(), numbers: HashMap::new() };
        catalog.refresh()?;
        Ok(catalog)
    }

    /// Reads what was added since.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn refresh(&mut self) -> io::Result<()> {
        let Some(file) = open(&self.path)? else { return Ok(()) };
        let mut file = io::BufReader::new(file);
        let Some(head) = Head::read(&mut file)? else { return Ok(()) };
        if self.head.is_none() {
            // What an earlier boot knew by its numbers nobody knows any more, and soon the catalog is another.
            if head != Head::of_this_boot(head.first)? {
                return Ok(());
            }
            self.head = Some(head);
        }
        file.seek(SeekFrom::Start(self.length()))?;
        let mut records = Vec::new();
        file.read_to_end(&mut records)?;
        for record in records.chunks_exact(RECORD) {
            let (digest, size) = decode(record);
            self.add(Blob { digest, size });
        }
        Ok(())
    }

    fn add(&mut self, blob: Blob) {
        let number = self.end();
        self.numbers.entry(blob.digest).or_insert(number);
        self.blobs.push(blob);
    }

    /// Bytes of the file that were read.
    fn length(&self) -> u64 {
        ((usize::from(self.head.is_some()) + self.blobs.len()) * RECORD) as u64
    }

    fn first(&self) -> u64 {
        self.head.map_or(0, |head| head.first)
    }

    /// The number after the last.
    fn end(&self) -> u64 {
        self.first() + self.blobs.len() as u64
    }

    /// The number of an object.
    pub fn number(&self, digest: &Digest) -> Option<u64> {
        self.numbers.get(digest).copied()
    }

    /// The object of a number.
    pub fn blob(&self, number: u64) -> Option<Blob> {
        self.blobs.get(usize::try_from(number.checked_sub(self.first())?).ok()?).copied()
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
    let Some(file) = open(path)? else { return Ok(Vec::new()) };
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
        append_to_catalog(&path, [blob(1), blob(9), blob(9)]).unwrap();
        catalog.refresh().unwrap();
        assert_eq!(catalog.number(&blob(1).digest), Some(1), "what is there is not added again");
        assert_eq!(catalog.blob(3), Some(blob(9)));
        assert_eq!(catalog.blob(4), None);
        let again = Catalog::open(&path).unwrap();
        assert_eq!(again.number(&blob(9).digest), Some(3));
    }

    #[test]
    fn those_who_add_at_the_same_time_lose_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalog");
        std::thread::scope(|scope| {
            for first in 0..4 {
                let path = &path;
                scope.spawn(move || {
                    for n in (first..100).step_by(2) {
                        append_to_catalog(path, [blob(n)]).unwrap();
                    }
                });
            }
        });
        let mut blobs = Catalog::open(&path).unwrap().blobs().to_vec();
        blobs.sort_by_key(|blob| blob.size);
        assert_eq!(blobs, (0..100).map(blob).collect::<Vec<_>>());
    }

    #[test]
    fn a_boot_begins_a_catalog_whose_numbers_were_never_given_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalog");
        append_to_catalog(&path, (0..3).map(blob)).unwrap();
        begin_catalog(&path, || panic!("it is of this boot")).unwrap();
        // As an earlier boot left it.
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[7; 32], 0).unwrap();
        let mut reader = Catalog::open(&path).unwrap();
        assert!(reader.blobs().is_empty(), "its numbers mean nothing to this kernel");
        for _ in 0..2 {
            begin_catalog(&path, || vec![blob(2), blob(5)]).unwrap();
        }
        append_to_catalog(&path, [blob(6)]).unwrap();
        reader.refresh().unwrap();
        assert_eq!(reader.blobs(), [blob(2), blob(5), blob(6)]);
        let first = reader.number(&blob(2).digest).unwrap();
        assert!(first >= 3, "{first} was given out before");
        assert_eq!(reader.blob(first + 2), Some(blob(6)));
        assert_eq!((reader.blob(first - 1), reader.blob(first + 3)), (None, None));
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
