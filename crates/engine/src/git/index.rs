//! Git's index file, as far as an import needs it: what it lists, and the stat data in it.
//!
//! Known is version 2 with SHA-1, which is what git writes unless it is told otherwise. Another one is left as git wrote
//! it: then its import names another tree each time, and nothing else is different.

use std::fs;
use std::path::Path;

use sha1::{Digest as _, Sha1};

use crate::error::{Context, Result};

/// Signature, version 2; the number of entries follows.
const HEADER: &[u8; 8] = b"DIRC\0\0\0\x02";
/// Bytes of the header, and of an entry before its path.
const HEADER_BYTES: usize = 12;
const FIXED_BYTES: usize = 62;
const CHECKSUM_BYTES: usize = 20;
/// Where an entry keeps what; all numbers are big-endian.
const CTIME: usize = 0;
const MTIME: usize = 8;
const MODE: usize = 24;
const OWNER: usize = 28;
const SIZE: usize = 36;
const ID: usize = 40;
const FLAGS: usize = 60;
/// Flags that an index of a fresh checkout does not have: an extended entry, or a stage of a merge.
const UNUSUAL_FLAGS: u16 = 0x7000;
/// What all modes of one kind have in common.
const KIND: u32 = 0o170_000;
const GITLINK: u32 = 0o160_000;

/// The name of an object.
pub type Id = [u8; 20];

/// A file that the index lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed<'a> {
    /// Its path from the root of the working copy, with slashes.
    pub path: &'a [u8],
    /// `100644`, `100755`, `120000` for a symbolic link or `160000` for a submodule, octal.
    pub mode: u32,
    /// Its contents.
    pub id: Id,
}

/// An index file in memory.
pub struct Index {
    bytes: Vec<u8>,
    /// Where each entry begins, and how long its path is.
    entries: Vec<(usize, usize)>,
}

impl Index {
    /// Reads the index at `path`; `None` if it is of a kind that is not known here.
    ///
    /// # Errors
    /// Those of reading the file.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        Ok(Self::parse(fs::read(path).at("read", path)?))
    }

    fn parse(bytes: Vec<u8>) -> Option<Self> {
        let body = bytes.len().checked_sub(CHECKSUM_BYTES)?;
        if !bytes.starts_with(HEADER) || Sha1::digest(&bytes[..body])[..] != bytes[body..] {
            return None;
        }
        let count = u32::from_be_bytes(bytes.get(HEADER.len()..HEADER_BYTES)?.try_into().ok()?);
        let mut entries = Vec::new();
        let mut at = HEADER_BYTES;
        for _ in 0..count {
            let fixed = bytes[..body].get(at..at + FIXED_BYTES)?;
            if u16::from_be_bytes([fixed[FLAGS], fixed[FLAGS + 1]]) & UNUSUAL_FLAGS != 0 {
                return None;
            }
            let path = &bytes[at + FIXED_BYTES..body];
            let length = path.iter().position(|byte| *byte == 0)?;
            entries.push((at, length));
            // One to eight NULs, up to a multiple of eight.
            at += (FIXED_BYTES + length + 8) & !7;
        }
        Some(Self { bytes, entries })
    }

    /// What it lists, in order of path.
    pub fn entries(&self) -> impl Iterator<Item = Listed<'_>> {
        self.entries.iter().map(|(at, length)| {
            let (fixed, path) = self.bytes[*at..].split_at(FIXED_BYTES);
            let mut id = Id::default();
            id.copy_from_slice(&fixed[ID..FLAGS]);
            Listed { path: &path[..*length], mode: number(fixed, MODE), id }
        })
    }

    /// Says of every file that it was last modified at `seconds` and has the size that `size` knows.
    pub fn expect(&mut self, seconds: i64, size: impl Fn(&Id) -> Option<u64>) {
        let known: Vec<_> = self.entries().map(|listed| size(&listed.id)).collect();
        for ((at, _), size) in self.entries.iter().zip(known) {
            let Some(size) = size else { continue };
            // Git, too, keeps the lower half of either.
            put(&mut self.bytes[*at..], MTIME, seconds as u32);
            put(&mut self.bytes[*at..], SIZE, size as u32);
        }
    }

    /// Drops what `core.checkStat=minimal` does not look at, which is different in every copy: all but the second of the last
    /// modification, and the size; of a submodule these too.
    pub fn forget_place(&mut self) {
        for (at, _) in &self.entries {
            let entry = &mut self.bytes[*at..*at + FIXED_BYTES];
            let kept = MTIME..MTIME + 4;
            entry[CTIME..MTIME].fill(0);
            entry[kept.end..MODE].fill(0);
            entry[OWNER..SIZE].fill(0);
            if number(entry, MODE) & KIND == GITLINK {
                entry[kept].fill(0);
                entry[SIZE..ID].fill(0);
            }
        }
    }

    /// Writes it.
    ///
    /// # Errors
    /// Those of writing the file.
    pub fn write(mut self, path: &Path) -> Result<()> {
        let body = self.bytes.len() - CHECKSUM_BYTES;
        let checksum = Sha1::digest(&self.bytes[..body]);
        self.bytes[body..].copy_from_slice(&checksum);
        fs::write(path, &self.bytes).at("write", path)
    }
}

fn number(entry: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]])
}

fn put(entry: &mut [u8], at: usize, number: u32) {
    entry[at..at + 4].copy_from_slice(&number.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(paths: &[&str]) -> Vec<u8> {
        let mut bytes = HEADER.to_vec();
        bytes.extend((paths.len() as u32).to_be_bytes());
        for path in paths {
            let mut entry = vec![7; FIXED_BYTES];
            put(&mut entry, MODE, if path.starts_with("sub") { 0o160_000 } else { 0o100_644 });
            entry[FLAGS..].copy_from_slice(&(path.len() as u16).to_be_bytes());
            entry.extend(path.as_bytes());
            entry.resize((entry.len() + 8) & !7, 0);
            bytes.extend(entry);
        }
        bytes.extend(b"TREE\0\0\0\0");
        let checksum = Sha1::digest(&bytes);
        bytes.extend(checksum);
        bytes
    }

    #[test]
    fn entries_are_found_and_changed_and_the_checksum_with_them() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("index");
        // Of every length modulo eight.
        let paths = ["a", "aa/b", "b12", "b123", "c1234", "d1234567", "e12345678", "sub12"];
        fs::write(&path, index(&paths)).unwrap();
        let mut read = Index::read(&path).unwrap().unwrap();
        assert_eq!(read.entries().map(|listed| listed.path).collect::<Vec<_>>(), paths.map(str::as_bytes));
        assert!(read.entries().all(|listed| listed.id == [7; 20]));
        read.expect(1 << 33 | 5, |_| Some(9));
        read.forget_place();
        read.write(&path).unwrap();
        let read = Index::read(&path).unwrap().expect("its checksum is right");
        for (listed, (at, _)) in read.entries().zip(&read.entries) {
            let entry = &read.bytes[*at..];
            let stat: Vec<u32> = (0..10).map(|field| number(entry, field * 4)).collect();
            let (seconds, size) = if listed.mode == 0o160_000 { (0, 0) } else { (5, 9) };
            assert_eq!(stat, [0, 0, seconds, 0, 0, 0, listed.mode, 0, 0, size]);
        }
        assert!(read.bytes[..read.bytes.len() - CHECKSUM_BYTES].ends_with(b"TREE\0\0\0\0"), "extensions stay");
    }

    #[test]
    fn another_kind_of_index_is_not_guessed_at() {
        let good = index(&["a", "b"]);
        assert!(Index::parse(good.clone()).is_some());
        for at in [0, 7, 11, 40, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(Index::parse(bad).is_none(), "{at}");
        }
        let rehash = |mut bytes: Vec<u8>| {
            let body = bytes.len() - CHECKSUM_BYTES;
            let checksum = Sha1::digest(&bytes[..body]);
            bytes[body..].copy_from_slice(&checksum);
            bytes
        };
        let mut merging = good.clone();
        merging[HEADER_BYTES + FLAGS] |= 0x10;
        assert!(Index::parse(rehash(merging)).is_none());
        let mut too_many = good;
        too_many[11] = 200;
        assert!(Index::parse(rehash(too_many)).is_none());
        assert!(Index::parse(Vec::new()).is_none());
    }
}
