//! Names of contents: BLAKE3-256 digests and blobs (a digest with its size).
//!
//! Text forms are canonical: lowercase hexadecimal, decimal size without leading zeros.

use std::{
    fmt,
    io::{self, Read},
    path::Path,
    str::FromStr,
};

use bazel_remote_apis::build::bazel::remote::execution::v2 as reapi;
use serde::{Deserialize, Serialize};

/// A BLAKE3-256 digest. Displays as 64 lowercase hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(pub [u8; 32]);

/// A digest and the number of bytes it was computed from: REAPI's `Digest` message.
///
/// Displays as `<hex>/<size>`, which is also its form in the Kubernetes API.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Blob {
    /// BLAKE3-256 of the contents.
    pub digest: Digest,
    /// Length of the contents in bytes.
    pub size: u64,
}

/// A text or message that does not name a blob.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {expected}")]
pub struct ParseDigestError {
    text: String,
    expected: &'static str,
}

impl ParseDigestError {
    pub(crate) fn sha256(text: String) -> Self {
        Self { text, expected: SHA256_FORM }
    }
}

const DIGEST_FORM: &str = "a BLAKE3 digest (64 lowercase hexadecimal digits)";
const BLOB_FORM: &str = "a blob (64 lowercase hexadecimal digits, a slash and the size in bytes)";
const SHA256_FORM: &str = "a SHA-256 name (64 lowercase hexadecimal digits, a slash and the size in bytes)";

impl Digest {
    /// The digest of no bytes.
    pub const EMPTY: Digest = Digest([
        0xaf, 0x13, 0x49, 0xb9, 0xf5, 0xf9, 0xa1, 0xa6, 0xa0, 0x40, 0x4d, 0xea, 0x36, 0xdc, 0xc9, 0x49, 0x9b, 0xcb,
        0x25, 0xc9, 0xad, 0xc1, 0x12, 0xb7, 0xcc, 0x9a, 0x93, 0xca, 0xe4, 0x1f, 0x32, 0x62,
    ]);

    /// The digest of `data`.
    pub fn of(data: &[u8]) -> Self {
        Self(*blake3::hash(data).as_bytes())
    }

    /// Where a content of this digest lies under an object directory: `ab/cdef…`.
    ///
    /// The same path is the target of the overlay redirects in an image.
    pub fn object_path(&self) -> String {
        let hex = hex::encode(self.0);
        format!("{}/{}", &hex[..2], &hex[2..])
    }
}

impl Blob {
    /// The blob of no bytes. Every store has it without storing it, as REAPI asks.
    pub const EMPTY: Blob = Blob { digest: Digest::EMPTY, size: 0 };

    /// The blob of `data`.
    pub fn of(data: &[u8]) -> Self {
        Self { digest: Digest::of(data), size: data.len() as u64 }
    }

    /// Reads the file at `path` in pieces of bounded size and returns its blob.
    ///
    /// # Errors
    /// Those of opening and reading the file.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        Self::of_reader(std::fs::File::open(path)?)
    }

    /// Reads `reader` to its end and returns the blob of what it gave.
    ///
    /// # Errors
    /// Those of the reader.
    pub fn of_reader(mut reader: impl Read) -> io::Result<Self> {
        let mut hasher = BlobHasher::new();
        let mut buffer = vec![0; 256 * 1024];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return Ok(hasher.finish()),
                Ok(n) => hasher.update(&buffer[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Whether this is the blob of no bytes.
    pub fn is_empty(&self) -> bool {
        *self == Self::EMPTY
    }

    /// Whether `data` is the contents of this blob.
    pub fn matches(&self, data: &[u8]) -> bool {
        self.size == data.len() as u64 && self.digest == Digest::of(data)
    }
}

/// Computes a blob from pieces.
#[derive(Clone, Default)]
pub struct BlobHasher {
    hasher: blake3::Hasher,
    size: u64,
}

impl BlobHasher {
    /// A hasher that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next piece.
    pub fn update(&mut self, data: &[u8]) {
        self.hasher.update(data);
        self.size += data.len() as u64;
    }

    /// Number of bytes seen.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The blob of all that was seen.
    pub fn finish(&self) -> Blob {
        Blob { digest: Digest(*self.hasher.finalize().as_bytes()), size: self.size }
    }
}

impl fmt::Debug for BlobHasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlobHasher({} bytes)", self.size)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseDigestError { text: text.to_owned(), expected: DIGEST_FORM };
        if text.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(error());
        }
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| error())?;
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Digest {
    type Error = ParseDigestError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl fmt::Display for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.digest, self.size)
    }
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Blob {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseDigestError { text: text.to_owned(), expected: BLOB_FORM };
        let (hash, size) = text.split_once('/').ok_or_else(error)?;
        let blob = Self::from_parts(hash, size).ok_or_else(error)?;
        Ok(blob)
    }
}

impl Blob {
    /// A blob from its two text parts; `None` unless both are canonical and fit each other.
    pub fn from_parts(hash: &str, size: &str) -> Option<Self> {
        let digest: Digest = hash.parse().ok()?;
        let number: u64 = size.parse().ok()?;
        let canonical = number.to_string() == size && number <= i64::MAX as u64;
        let fits = (number == 0) == (digest == Digest::EMPTY);
        (canonical && fits).then_some(Self { digest, size: number })
    }
}

impl TryFrom<String> for Blob {
    type Error = ParseDigestError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Blob> for String {
    fn from(blob: Blob) -> Self {
        blob.to_string()
    }
}

impl From<Blob> for reapi::Digest {
    fn from(blob: Blob) -> Self {
        Self {
            hash: blob.digest.to_string(),
            // Sizes are lengths of files, which the kernel keeps in a signed 64-bit number too.
            size_bytes: i64::try_from(blob.size).unwrap_or(i64::MAX),
        }
    }
}

impl TryFrom<&reapi::Digest> for Blob {
    type Error = ParseDigestError;

    fn try_from(message: &reapi::Digest) -> Result<Self, Self::Error> {
        format!("{}/{}", message.hash, message.size_bytes).parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_forms_round_trip() {
        let blob = Blob::of(b"hello");
        assert_eq!(blob.to_string().parse::<Blob>().unwrap(), blob);
        assert_eq!(blob.digest.to_string().parse::<Digest>().unwrap(), blob.digest);
        let json = serde_json_like(&blob);
        assert_eq!(json, format!("{}/5", blob.digest));
        assert_eq!(Blob::try_from(&reapi::Digest::from(blob)).unwrap(), blob);
    }

    fn serde_json_like(blob: &Blob) -> String {
        String::from(*blob)
    }

    #[test]
    fn empty_is_the_digest_of_nothing() {
        assert_eq!(Blob::of(b""), Blob::EMPTY);
        assert_eq!(Blob::of_reader(&b""[..]).unwrap(), Blob::EMPTY);
    }

    #[test]
    fn only_the_canonical_text_is_taken() {
        let hex = Digest::of(b"x").to_string();
        for bad in [
            hex.clone(),
            format!("{hex}/"),
            format!("{hex}/01"),
            format!("{hex}/+1"),
            format!("{hex}/-1"),
            format!("{hex}/0"),
            format!("{}/1", Digest::EMPTY),
            format!("{}/1", hex.to_uppercase()),
            format!("{}/1", &hex[1..]),
            format!("{hex}/9223372036854775808"),
        ] {
            let error = bad.parse::<Blob>().unwrap_err().to_string();
            assert!(error.contains("is not a blob"), "{bad}: {error}");
        }
    }

    #[test]
    fn object_path_has_a_two_digit_folder() {
        let path = Digest::EMPTY.object_path();
        assert!(path.starts_with("af/1349b9"), "{path}");
        assert_eq!(path.len(), 65);
    }
}
