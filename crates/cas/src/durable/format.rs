//! The form of a pack: many small blobs or one large one, and behind them the index of what is where.
//!
//! ```text
//! header    magic "aethpack", version (u32)
//! blobs     one behind the other, each as it is or as one zstd frame
//! footer    number of blobs (u32), then for each: digest, size, offset, stored length (u64 each), kind (u8)
//! trailer   length of the footer (u32), BLAKE3 of the footer, version (u32), magic "aethpack"
//! ```
//!
//! Bit 0 of a kind says that the blob is compressed, bit 1 that it may be a directory. Directories have packs of their own, so
//! that those which nothing needs any more can go without the contents of files being written anew.
//!
//! Numbers are little-endian. There is one encoding: blobs follow each other without gaps in the order of the
//! footer, none is empty, none comes twice. A decoder refuses everything else, never panics, and takes no
//! more memory than the limits allow.

use std::collections::HashSet;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::{
    Blob, Digest,
    tree::{DIRECTORY_TAGS, Directory, MAX_DIRECTORY_BYTES},
};

/// Begins and ends every pack.
pub const MAGIC: [u8; 8] = *b"aethpack";
/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 1;
/// Bytes before the first blob.
pub const HEADER_BYTES: u64 = 12;
/// Bytes behind the footer.
pub const TRAILER_BYTES: usize = 48;
/// Blobs in one pack.
pub const MAX_ENTRIES: usize = 16 * 1024;
/// Blobs up to this size share packs, and may be compressed; larger ones have packs of their own.
pub const MAX_SHARED_BLOB: u64 = 4 << 20;

const ENTRY_BYTES: usize = 57;
/// The longest footer.
pub const MAX_FOOTER_BYTES: usize = 4 + MAX_ENTRIES * ENTRY_BYTES;
const ZSTD_LEVEL: i32 = 1;
/// Below this a zstd frame costs more than it gives.
const COMPRESS_FROM: usize = 128;

/// How the bytes of a blob are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// As they are.
    None,
    /// As one zstd frame, shorter than the blob.
    Zstd,
}

/// Where a blob is in its pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Which blob.
    pub blob: Blob,
    /// Where its stored bytes begin, counted from the begin of the pack.
    pub offset: u64,
    /// How many bytes are stored.
    pub stored: u64,
    /// How.
    pub compression: Compression,
    /// Whether the blob may be a directory. What is not, is none.
    pub directory: bool,
}

impl Entry {
    /// The compression and what else there is to say, as one byte.
    pub(super) fn kind(&self) -> u8 {
        u8::from(self.compression == Compression::Zstd) | u8::from(self.directory) << 1
    }

    /// What [`Entry::kind`] says.
    pub(super) fn of_kind(kind: u8) -> Option<(Compression, bool)> {
        let compression = if kind & 1 == 0 { Compression::None } else { Compression::Zstd };
        (kind <= 3).then_some((compression, kind & 2 != 0))
    }

    /// The range of the stored bytes.
    pub fn range(&self) -> std::ops::Range<u64> {
        self.offset..self.offset + self.stored
    }
}

/// Why bytes are not what a pack should have there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Written by another version of this program.
    #[error("it has version {0}, this program knows version {VERSION} only")]
    UnknownVersion(u32),
    /// Anything else.
    #[error("{0}")]
    Malformed(&'static str),
}

use FormatError::Malformed;

/// The first bytes of a pack.
pub fn encode_header() -> Bytes {
    let mut bytes = BytesMut::with_capacity(12);
    bytes.put_slice(&MAGIC);
    bytes.put_u32_le(VERSION);
    bytes.freeze()
}

/// The bytes to store for a blob, and how they are stored.
pub fn encode_blob(data: &Bytes) -> (Bytes, Compression) {
    if data.len() >= COMPRESS_FROM
        && let Ok(shorter) = zstd::bulk::compress(data, ZSTD_LEVEL)
        && shorter.len() < data.len()
    {
        return (shorter.into(), Compression::Zstd);
    }
    (data.clone(), Compression::None)
}

/// The blob that was stored as `stored`. Its digest is checked: what this returns is the blob.
///
/// # Errors
/// [`FormatError`] when it is not.
pub fn decode_blob(entry: &Entry, stored: &Bytes) -> Result<Bytes, FormatError> {
    if stored.len() as u64 != entry.stored {
        return Err(Malformed("its stored bytes are cut short"));
    }
    let data = match entry.compression {
        Compression::None => stored.clone(),
        Compression::Zstd => {
            // The size is limited by the footer's decoder, and a frame that is longer is refused by this one.
            let size = usize::try_from(entry.blob.size.min(MAX_SHARED_BLOB)).unwrap_or(0);
            zstd::bulk::decompress(stored, size)
                .map_err(|_| Malformed("its stored bytes are no zstd frame of its size"))?
                .into()
        }
    };
    if entry.blob.matches(&data) { Ok(data) } else { Err(Malformed("its stored bytes have another digest")) }
}

/// The index of a pack, without the trailer.
pub fn encode_footer(entries: &[Entry]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(4 + entries.len() * ENTRY_BYTES);
    bytes.put_u32_le(u32::try_from(entries.len()).unwrap_or(u32::MAX));
    for entry in entries {
        bytes.put_slice(&entry.blob.digest.0);
        bytes.put_u64_le(entry.blob.size);
        bytes.put_u64_le(entry.offset);
        bytes.put_u64_le(entry.stored);
        bytes.put_u8(entry.kind());
    }
    bytes.freeze()
}

/// What was stored by [`encode_footer`].
///
/// # Errors
/// [`FormatError`] for everything that [`encode_footer`] does not write for a pack.
pub fn decode_footer(mut bytes: &[u8]) -> Result<Vec<Entry>, FormatError> {
    if bytes.len() < 4 {
        return Err(Malformed("its footer is cut short"));
    }
    let count = bytes.get_u32_le() as usize;
    if count == 0 || count > MAX_ENTRIES {
        return Err(Malformed("it has no blobs, or too many"));
    }
    if bytes.len() != count * ENTRY_BYTES {
        return Err(Malformed("its footer is not as long as its number of blobs says"));
    }
    let mut entries = Vec::with_capacity(count);
    let mut seen = HashSet::with_capacity(count);
    let mut end = HEADER_BYTES;
    for _ in 0..count {
        let mut digest = [0; 32];
        bytes.copy_to_slice(&mut digest);
        let blob = Blob { digest: Digest(digest), size: bytes.get_u64_le() };
        let (offset, stored) = (bytes.get_u64_le(), bytes.get_u64_le());
        let (compression, directory) = match Entry::of_kind(bytes.get_u8()) {
            Some(kind @ (Compression::None, _)) if stored == blob.size => kind,
            Some(kind @ (Compression::Zstd, _)) if stored < blob.size && blob.size <= MAX_SHARED_BLOB => kind,
            _ => return Err(Malformed("a blob is stored in a way that is not known, or with an impossible length")),
        };
        if stored == 0 || offset != end {
            return Err(Malformed("its blobs do not follow each other"));
        }
        if count > 1 && blob.size > MAX_SHARED_BLOB {
            return Err(Malformed("a blob is too large to share a pack"));
        }
        end = offset.checked_add(stored).ok_or(Malformed("a blob ends nowhere"))?;
        if !seen.insert(digest) {
            return Err(Malformed("a blob comes twice"));
        }
        entries.push(Entry { blob, offset, stored, compression, directory });
    }
    Ok(entries)
}

/// The last bytes of a pack.
pub fn encode_trailer(footer: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(TRAILER_BYTES);
    bytes.put_u32_le(u32::try_from(footer.len()).unwrap_or(u32::MAX));
    bytes.put_slice(blake3::hash(footer).as_bytes());
    bytes.put_u32_le(VERSION);
    bytes.put_slice(&MAGIC);
    bytes.freeze()
}

/// What the end of a pack says.
#[derive(Debug, PartialEq, Eq)]
pub enum Tail {
    /// Its index.
    Entries(Vec<Entry>),
    /// That so many bytes from its end are needed.
    Longer(usize),
}

/// Reads the last bytes of a pack of `length` bytes: at least the trailer, better the whole footer.
///
/// # Errors
/// [`FormatError`] when that is no end of a pack of this length.
pub fn decode_tail(tail: &[u8], length: u64) -> Result<Tail, FormatError> {
    let Some((before, mut trailer)) = tail.split_at_checked(tail.len().wrapping_sub(TRAILER_BYTES)) else {
        return Err(Malformed("its trailer is cut short"));
    };
    let footer_bytes = trailer.get_u32_le() as usize;
    let mut checksum = [0; 32];
    trailer.copy_to_slice(&mut checksum);
    let version = trailer.get_u32_le();
    if trailer != MAGIC {
        return Err(Malformed("it does not end as a pack does"));
    }
    if version != VERSION {
        return Err(FormatError::UnknownVersion(version));
    }
    if footer_bytes > MAX_FOOTER_BYTES {
        return Err(Malformed("its footer is too long"));
    }
    let Some(footer) = before.len().checked_sub(footer_bytes).map(|at| &before[at..]) else {
        let needed = footer_bytes + TRAILER_BYTES;
        return if needed as u64 <= length { Ok(Tail::Longer(needed)) } else { Err(Malformed("it is cut short")) };
    };
    if *blake3::hash(footer).as_bytes() != checksum {
        return Err(Malformed("its footer has another checksum"));
    }
    let entries = decode_footer(footer)?;
    let end = entries.last().map_or(HEADER_BYTES, |entry| entry.range().end);
    if end.checked_add((footer_bytes + TRAILER_BYTES) as u64) != Some(length) {
        return Err(Malformed("its length is not what its footer says"));
    }
    Ok(Tail::Entries(entries))
}

/// Whether a blob of a shared pack may be a directory.
pub fn may_be_directory(data: &[u8]) -> bool {
    Directory::decode(data).is_ok()
}

/// Whether a blob that begins so may be a directory.
pub fn may_begin_directory(size: u64, first: Option<&u8>) -> bool {
    size <= MAX_DIRECTORY_BYTES as u64 && first.is_some_and(|first| DIRECTORY_TAGS.contains(first))
}

/// Lays out a pack of directories, or of what is none: its pieces in order, and its index. Blobs that come twice are stored once.
pub fn encode_pack(blobs: &[(Blob, Bytes)], directory: bool) -> (Vec<Bytes>, Vec<Entry>) {
    let mut pieces = vec![encode_header()];
    let mut entries: Vec<Entry> = Vec::with_capacity(blobs.len());
    let mut seen = HashSet::with_capacity(blobs.len());
    let mut offset = HEADER_BYTES;
    for (blob, data) in blobs {
        if blob.is_empty() || !seen.insert(blob.digest) {
            continue;
        }
        let (stored, compression) = encode_blob(data);
        entries.push(Entry { blob: *blob, offset, stored: stored.len() as u64, compression, directory });
        offset += stored.len() as u64;
        pieces.push(stored);
    }
    let footer = encode_footer(&entries);
    let trailer = encode_trailer(&footer);
    pieces.extend([footer, trailer]);
    (pieces, entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack(blobs: &[&[u8]]) -> (Bytes, Vec<Entry>) {
        let blobs: Vec<_> = blobs.iter().map(|data| (Blob::of(data), Bytes::copy_from_slice(data))).collect();
        let (pieces, entries) = encode_pack(&blobs, false);
        (pieces.concat().into(), entries)
    }

    #[test]
    fn what_is_packed_is_found_again() {
        let repetitive = vec![7; 100_000];
        let (bytes, entries) = pack(&[b"a", &repetitive, b"", b"bc", b"a"]);
        assert_eq!(entries.len(), 3, "the empty blob and the second copy are not stored");
        assert_eq!(entries[1].compression, Compression::Zstd);
        assert!(bytes.len() < 1000);
        let length = bytes.len() as u64;
        let Tail::Longer(needed) = decode_tail(&bytes[bytes.len() - TRAILER_BYTES..], length).unwrap() else {
            panic!()
        };
        for tail in [&bytes[bytes.len() - needed..], &bytes[..]] {
            assert_eq!(decode_tail(tail, length), Ok(Tail::Entries(entries.clone())));
        }
        for (entry, data) in entries.iter().zip([&b"a"[..], &repetitive, b"bc"]) {
            let range = entry.range();
            let stored = bytes.slice(range.start as usize..range.end as usize);
            assert_eq!(decode_blob(entry, &stored).unwrap(), data);
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let (bytes, entries) = pack(&[b"one", &[9; 300], b"three"]);
        let length = bytes.len() as u64;
        let index = bytes.len() - (4 + 3 * 57 + TRAILER_BYTES);
        for at in 0..bytes.len() {
            for bit in [0, 7] {
                let mut bad = bytes.to_vec();
                bad[at] ^= 1 << bit;
                let bad = Bytes::from(bad);
                let good = match decode_tail(&bad, length) {
                    Ok(Tail::Entries(found)) if found == entries => entries.iter().all(|entry| {
                        decode_blob(entry, &bad.slice(entry.offset as usize..entry.range().end as usize)).is_ok()
                    }),
                    Ok(_) => panic!("another index was read"),
                    Err(_) => false,
                };
                // The header is for people and other programs: nothing here reads it.
                assert_eq!(good, at < 12, "byte {at} of {length}, index from {index}");
            }
            assert!(decode_tail(&bytes[..at], at as u64).is_err());
        }
    }

    #[test]
    fn an_unknown_version_is_named() {
        let (bytes, _) = pack(&[b"x"]);
        let mut bad = bytes.to_vec();
        let at = bad.len() - 12;
        bad[at] = 2;
        assert_eq!(decode_tail(&bad, bad.len() as u64), Err(FormatError::UnknownVersion(2)));
    }

    #[test]
    fn only_one_encoding_is_accepted() {
        let blob = Blob::of(b"12345");
        let good = Entry { blob, offset: HEADER_BYTES, stored: 5, compression: Compression::None, directory: true };
        assert_eq!(decode_footer(&encode_footer(&[good])), Ok(vec![good]));
        let large = Blob { size: MAX_SHARED_BLOB + 1, ..blob };
        for bad in [
            vec![],
            vec![good, good],
            vec![Entry { offset: 13, ..good }],
            vec![Entry { stored: 4, ..good }],
            vec![Entry { stored: 5, compression: Compression::Zstd, ..good }],
            vec![Entry { blob: large, stored: 9, compression: Compression::Zstd, ..good }],
            vec![Entry { blob: Blob { size: 0, ..blob }, stored: 0, ..good }],
            vec![good, Entry { blob: large, stored: large.size, offset: 17, ..good }],
        ] {
            assert!(decode_footer(&encode_footer(&bad)).is_err(), "{bad:?}");
        }
        let mut longer = encode_footer(&[good]).to_vec();
        longer.push(0);
        assert!(decode_footer(&longer).is_err());
    }
}
