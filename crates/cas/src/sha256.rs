//! SHA-256 as a second digest function, for REAPI clients that have no BLAKE3.
//!
//! A store keeps a content once, under its BLAKE3 name, whatever its client calls it: [`Sha256Blob`] is only another name
//! of it, and [`LocalStore::resolve_sha256`](crate::LocalStore::resolve_sha256) says for which blob it stands. So what
//! pins, leases, collects or sends blobs knows nothing of this module.

use std::fmt;

use bazel_remote_apis::build::bazel::remote::execution::v2 as reapi;
use sha2::{Digest as _, Sha256};

use crate::{Blob, digest::ParseDigestError};

/// A SHA-256 digest and the number of bytes it was computed from. Displays as `<hex>/<size>`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sha256Blob {
    /// SHA-256 of the contents.
    pub digest: [u8; 32],
    /// Length of the contents in bytes.
    pub size: u64,
}

impl Sha256Blob {
    /// The name of no bytes.
    pub const EMPTY: Sha256Blob = Sha256Blob {
        digest: [
            0xe3, 0xb0, 0xc4, 0x42, 0x98, 0xfc, 0x1c, 0x14, 0x9a, 0xfb, 0xf4, 0xc8, 0x99, 0x6f, 0xb9, 0x24, 0x27, 0xae,
            0x41, 0xe4, 0x64, 0x9b, 0x93, 0x4c, 0xa4, 0x95, 0x99, 0x1b, 0x78, 0x52, 0xb8, 0x55,
        ],
        size: 0,
    };

    /// The name of `data`.
    pub fn of(data: &[u8]) -> Self {
        Self { digest: Sha256::digest(data).into(), size: data.len() as u64 }
    }

    /// A name from its two text parts; `None` unless both are canonical and fit each other.
    pub fn from_parts(hash: &str, size: &str) -> Option<Self> {
        // The same text form as a blob's, except for what the empty one is.
        let digest: crate::Digest = hash.parse().ok()?;
        let number: u64 = size.parse().ok()?;
        let canonical = number.to_string() == size && i64::try_from(number).is_ok();
        let fits = (number == 0) == (digest.0 == Self::EMPTY.digest);
        (canonical && fits).then_some(Self { digest: digest.0, size: number })
    }
}

impl fmt::Display for Sha256Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", hex::encode(self.digest), self.size)
    }
}

impl fmt::Debug for Sha256Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{self}")
    }
}

/// What a REAPI client calls a content: by one of the two digest functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ContentName {
    /// Our own.
    Blake3(Blob),
    /// The other one.
    Sha256(Sha256Blob),
}

impl ContentName {
    /// Length of the contents in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::Blake3(blob) => blob.size,
            Self::Sha256(name) => name.size,
        }
    }

    /// Whether `data` is the contents.
    pub fn matches(&self, data: &[u8]) -> bool {
        match self {
            Self::Blake3(blob) => blob.matches(data),
            Self::Sha256(name) => name.size == data.len() as u64 && *name == Sha256Blob::of(data),
        }
    }

    /// The name of `data` by the same digest function.
    pub fn same_function(&self, data: &[u8]) -> Self {
        match self {
            Self::Blake3(_) => Self::Blake3(Blob::of(data)),
            Self::Sha256(_) => Self::Sha256(Sha256Blob::of(data)),
        }
    }

    /// What REAPI's digest `message`, computed by `function`, names.
    ///
    /// # Errors
    /// When it is not the canonical form of a digest and a size.
    pub fn parse(function: DigestFunction, message: &reapi::Digest) -> Result<Self, ParseDigestError> {
        match function {
            DigestFunction::Blake3 => Blob::try_from(message).map(Self::Blake3),
            DigestFunction::Sha256 => Sha256Blob::from_parts(&message.hash, &message.size_bytes.to_string())
                .map(Self::Sha256)
                .ok_or_else(|| ParseDigestError::sha256(format!("{}/{}", message.hash, message.size_bytes))),
        }
    }
}

impl fmt::Display for ContentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blake3(blob) => blob.fmt(f),
            Self::Sha256(name) => write!(f, "{name:?}"),
        }
    }
}

impl From<ContentName> for reapi::Digest {
    fn from(name: ContentName) -> Self {
        match name {
            ContentName::Blake3(blob) => blob.into(),
            ContentName::Sha256(name) => {
                Self { hash: hex::encode(name.digest), size_bytes: i64::try_from(name.size).unwrap_or(i64::MAX) }
            }
        }
    }
}

/// The digest functions of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DigestFunction {
    /// Our own.
    Blake3,
    /// The other one.
    Sha256,
}

/// Computes a SHA-256 name from pieces.
#[derive(Clone, Default)]
pub struct Sha256Hasher {
    hasher: Sha256,
    size: u64,
}

impl Sha256Hasher {
    /// Takes the next piece.
    pub fn update(&mut self, data: &[u8]) {
        self.hasher.update(data);
        self.size += data.len() as u64;
    }

    /// The name of all that was seen.
    pub fn finish(&self) -> Sha256Blob {
        Sha256Blob { digest: self.hasher.clone().finalize().into(), size: self.size }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_canonical() {
        let name = Sha256Blob::of(b"hello");
        assert_eq!(name.to_string(), "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824/5");
        assert_eq!(Sha256Blob::of(b""), Sha256Blob::EMPTY);
        let hex = hex::encode(name.digest);
        assert_eq!(Sha256Blob::from_parts(&hex, "5"), Some(name));
        for (hash, size) in
            [(hex.as_str(), "05"), (&hex, "0"), (&hex[1..], "5"), (&hex.to_uppercase(), "5"), (&hex, "-5")]
        {
            assert_eq!(Sha256Blob::from_parts(hash, size), None, "{hash}/{size}");
        }
        let mut hasher = Sha256Hasher::default();
        hasher.update(b"hel");
        hasher.update(b"lo");
        assert_eq!(hasher.finish(), name);
    }

    #[test]
    fn the_functions_are_told_apart() {
        let data = b"hello";
        let name = ContentName::Sha256(Sha256Blob::of(data));
        assert!(name.matches(data) && !name.matches(b"hallo"));
        assert_eq!(ContentName::parse(DigestFunction::Sha256, &name.into()), Ok(name));
        assert_ne!(ContentName::parse(DigestFunction::Blake3, &name.into()), Ok(name));
        let empty = reapi::Digest::from(ContentName::Sha256(Sha256Blob::EMPTY));
        assert!(ContentName::parse(DigestFunction::Blake3, &empty).is_err(), "not the empty blob of BLAKE3");
    }
}
