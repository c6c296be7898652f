//! Names of directory entries, and how bytes that are not UTF-8 travel in REAPI's strings.
//!
//! A Linux name is any bytes but NUL and `/`; a protobuf string is UTF-8. The escaping is the
//! identity for every valid UTF-8 name without a backslash, hence for nearly every name there is:
//!
//! - a backslash is written `\\`;
//! - a byte that is no part of a valid UTF-8 sequence is written `\x` and two lowercase
//!   hexadecimal digits;
//! - nothing else is escaped, and no other text after a backslash is accepted.
//!
//! A backslash begins an escape and nothing else, so decoding is unambiguous; a decoder compares
//! the name escaped again with what it was given, so each name has one text and each text one name.

use std::{borrow::Borrow, ffi::OsStr, fmt, os::unix::ffi::OsStrExt, path::Path};

/// Bytes a name may have (Linux: NAME_MAX).
pub const MAX_NAME_BYTES: usize = 255;

/// The name of a directory entry: 1 to 255 bytes, without NUL and `/`, and neither `.` nor `..`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Box<[u8]>);

/// Why bytes are not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// No bytes.
    #[error("an entry has an empty name")]
    Empty,
    /// `.` or `..`.
    #[error("an entry is named {0:?}")]
    Dots(String),
    /// Too long.
    #[error("a name has {0} bytes, more than {MAX_NAME_BYTES}")]
    TooLong(usize),
    /// A NUL or a slash.
    #[error("the name {0:?} contains a slash or a NUL byte")]
    Forbidden(String),
    /// Text with a backslash that starts no escape.
    #[error(
        "{0:?} is not an escaped name: a backslash must be followed by a backslash or by x and two lowercase hexadecimal digits"
    )]
    Escape(String),
}

impl Name {
    /// Checks and takes a name.
    ///
    /// # Errors
    /// [`NameError`] says which rule it breaks.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self, NameError> {
        let bytes = bytes.into();
        let text = || String::from_utf8_lossy(&bytes).into_owned();
        match bytes.as_slice() {
            [] => Err(NameError::Empty),
            b"." | b".." => Err(NameError::Dots(text())),
            b if b.len() > MAX_NAME_BYTES => Err(NameError::TooLong(b.len())),
            b if b.iter().any(|&c| c == 0 || c == b'/') => Err(NameError::Forbidden(text())),
            _ => Ok(Self(bytes.into_boxed_slice())),
        }
    }

    /// The bytes of the name.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The name as the standard library wants it.
    pub fn as_os_str(&self) -> &OsStr {
        OsStr::from_bytes(&self.0)
    }
}

impl TryFrom<&OsStr> for Name {
    type Error = NameError;

    fn try_from(name: &OsStr) -> Result<Self, NameError> {
        Self::new(name.as_bytes())
    }
}

impl TryFrom<&str> for Name {
    type Error = NameError;

    fn try_from(name: &str) -> Result<Self, NameError> {
        Self::new(name.as_bytes())
    }
}

impl Borrow<[u8]> for Name {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<Path> for Name {
    fn as_ref(&self) -> &Path {
        Path::new(self.as_os_str())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&escape(&self.0))
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", escape(&self.0))
    }
}

/// Any bytes as text, by the rules at the top of this module.
pub fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c == '\\' {
                text.push('\\');
            }
            text.push(c);
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// The bytes that [`escape`] made `text` from.
///
/// # Errors
/// [`NameError::Escape`] for text that [`escape`] never makes.
pub fn unescape(text: &str) -> Result<Vec<u8>, NameError> {
    let error = || NameError::Escape(text.to_owned());
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = match (byte, after) {
            (b'\\', [b'\\', after @ ..]) => {
                bytes.push(b'\\');
                after
            }
            (b'\\', [b'x', high, low, after @ ..]) => {
                let digits = [*high, *low];
                let mut value = [0];
                hex::decode_to_slice(digits, &mut value).map_err(|_| error())?;
                bytes.push(value[0]);
                after
            }
            (b'\\', _) => return Err(error()),
            _ => {
                bytes.push(byte);
                after
            }
        };
    }
    if escape(&bytes) == text { Ok(bytes) } else { Err(error()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rules_of_names() {
        assert_eq!(Name::new(""), Err(NameError::Empty));
        assert_eq!(Name::new("."), Err(NameError::Dots(".".into())));
        assert_eq!(Name::new(".."), Err(NameError::Dots("..".into())));
        assert!(matches!(Name::new("a/b"), Err(NameError::Forbidden(_))));
        assert!(matches!(Name::new("a\0"), Err(NameError::Forbidden(_))));
        assert_eq!(Name::new(vec![b'a'; 256]), Err(NameError::TooLong(256)));
        assert!(Name::new(vec![b'a'; 255]).is_ok());
        assert!(Name::new("...").is_ok());
    }

    #[test]
    fn escaping_by_example() {
        for (bytes, text) in [
            (&b"plain.txt"[..], "plain.txt"),
            ("grüße".as_bytes(), "grüße"),
            (b"back\\slash", "back\\\\slash"),
            (b"\xff\xfe", "\\xff\\xfe"),
            (b"caf\xe9", "caf\\xe9"),
            // A truncated sequence: every byte of it is escaped.
            (b"\xe2\x82", "\\xe2\\x82"),
            // What looks like an escape stays apart from one.
            (b"\\xff", "\\\\xff"),
        ] {
            assert_eq!(escape(bytes), text);
            assert_eq!(unescape(text).unwrap(), bytes);
        }
    }

    #[test]
    fn other_escapes_are_refused() {
        // The last three would decode to bytes that have another text.
        for bad in ["\\", "a\\n", "\\x", "\\xf", "\\xFF", "\\xg0", "\\x41", "\\xc3\\xa9", "\\x5c"] {
            assert!(unescape(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_round_trip(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(unescape(&escape(&bytes)).unwrap(), bytes);
        }

        #[test]
        fn any_text_is_refused_or_canonical(text in "[\\\\x0-9a-fé]{0,12}") {
            if let Ok(bytes) = unescape(&text) {
                prop_assert_eq!(escape(&bytes), text);
            }
        }
    }
}
