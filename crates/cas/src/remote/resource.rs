//! Names of blobs on the ByteStream service, as REAPI defines them for BLAKE3.
//!
//! ```text
//! {instance}/blobs/blake3/{hash}/{size}                      to read
//! {instance}/uploads/{uuid}/blobs/blake3/{hash}/{size}{/…}   to write; what follows the size is ignored
//! ```
//!
//! The instance and its slash are absent when it is empty. REAPI lets a client leave the digest
//! function out only for older functions; here the name then means SHA-256 and is refused.

use crate::Blob;

const BLAKE3: &str = "blake3";

/// A text that is not the name of a blob to read or write.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is not a resource of this store: {problem}")]
pub struct ResourceError {
    name: String,
    problem: &'static str,
}

/// A blob to be written under an upload's id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UploadName {
    /// REAPI instance, usually empty.
    pub instance: String,
    /// The client's id of this upload.
    pub id: String,
    /// What is to be written.
    pub blob: Blob,
}

/// Name for reading `blob` from the nameless instance.
pub fn read_name(blob: &Blob) -> String {
    format!("blobs/{BLAKE3}/{}/{}", blob.digest, blob.size)
}

/// Name for writing `blob` to the nameless instance.
pub fn upload_name(id: &str, blob: &Blob) -> String {
    format!("uploads/{id}/{}", read_name(blob))
}

/// Splits a name for reading into instance and blob.
///
/// # Errors
/// [`ResourceError`] says what is wrong with the name.
pub fn parse_read(name: &str) -> Result<(String, Blob), ResourceError> {
    let parts: Vec<&str> = name.split('/').collect();
    let (instance, rest) = split_at_word(&parts, "blobs", name)?;
    let (blob, more) = parse_blob(rest, name)?;
    if more {
        return Err(error(name, "something follows the size"));
    }
    Ok((instance, blob))
}

/// Splits a name for writing.
///
/// # Errors
/// [`ResourceError`] says what is wrong with the name.
pub fn parse_upload(name: &str) -> Result<UploadName, ResourceError> {
    let parts: Vec<&str> = name.split('/').collect();
    let (instance, rest) = split_at_word(&parts, "uploads", name)?;
    match rest {
        [id, "blobs", rest @ ..] if !id.is_empty() => {
            Ok(UploadName { instance, id: (*id).to_owned(), blob: parse_blob(rest, name)?.0 })
        }
        [_, "compressed-blobs", ..] => Err(error(name, COMPRESSED)),
        _ => Err(error(name, UPLOAD_FORM)),
    }
}

const COMPRESSED: &str = "compressed blobs are not supported, send plain bytes to blobs/";
const READ_FORM: &str = "expected [instance/]blobs/blake3/<64 hexadecimal digits>/<size>";
const UPLOAD_FORM: &str = "expected [instance/]uploads/<id>/blobs/blake3/<64 hexadecimal digits>/<size>";
const NO_FUNCTION: &str = "the digest function is missing (which means SHA-256) or unknown; only blake3 is supported";

fn split_at_word<'a, 'b>(
    parts: &'a [&'b str],
    word: &str,
    name: &str,
) -> Result<(String, &'a [&'b str]), ResourceError> {
    // REAPI reserves these words, so that an instance may have slashes.
    match parts.iter().position(|part| matches!(*part, "blobs" | "uploads" | "compressed-blobs")) {
        Some(at) if parts[at] == word => Ok((parts[..at].join("/"), &parts[at + 1..])),
        Some(at) if parts[at] == "compressed-blobs" => Err(error(name, COMPRESSED)),
        _ if word == "blobs" => Err(error(name, READ_FORM)),
        _ => Err(error(name, UPLOAD_FORM)),
    }
}

/// The blob at the start of `parts`, and whether something follows it.
fn parse_blob(parts: &[&str], name: &str) -> Result<(Blob, bool), ResourceError> {
    match parts {
        [BLAKE3, hash, size, rest @ ..] => {
            let blob = Blob::from_parts(hash, size).ok_or_else(|| error(name, READ_FORM))?;
            Ok((blob, !rest.is_empty()))
        }
        _ => Err(error(name, NO_FUNCTION)),
    }
}

fn error(name: &str, problem: &'static str) -> ResourceError {
    ResourceError { name: name.chars().take(300).collect(), problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        let blob = Blob::of(b"x");
        assert_eq!(parse_read(&read_name(&blob)), Ok((String::new(), blob)));
        let name = format!("some/instance/{}", read_name(&blob));
        assert_eq!(parse_read(&name), Ok(("some/instance".to_owned(), blob)));
        let upload = parse_upload(&upload_name("id", &blob)).unwrap();
        assert_eq!((upload.id.as_str(), upload.blob), ("id", blob));
        let name = format!("{}/with/metadata", upload_name("id", &blob));
        assert_eq!(parse_upload(&name).unwrap(), upload);
    }

    #[test]
    fn other_names_are_refused_with_the_reason() {
        let blob = Blob::of(b"x");
        let hash = blob.digest;
        for (name, reason) in [
            (format!("blobs/{hash}/1"), "digest function"),
            (format!("blobs/sha256/{hash}/1"), "digest function"),
            (format!("blobs/blake3/{hash}/01"), "expected"),
            (format!("blobs/blake3/{hash}/1/x"), "follows"),
            (format!("compressed-blobs/zstd/blake3/{hash}/1"), "compressed"),
            (String::new(), "expected"),
        ] {
            let error = parse_read(&name).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        for (name, reason) in [
            (format!("uploads//blobs/blake3/{hash}/1"), "expected"),
            (format!("uploads/a/compressed-blobs/zstd/blake3/{hash}/1"), "compressed"),
            (format!("uploads/a/blobs/{hash}/1"), "digest function"),
            (format!("blobs/blake3/{hash}/1"), "expected"),
        ] {
            let error = parse_upload(&name).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
