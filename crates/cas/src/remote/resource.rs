//! Names of contents on the ByteStream service, as REAPI defines them.
//!
//! ```text
//! {instance}/blobs/{content}                                      to read
//! {instance}/compressed-blobs/zstd/{content}                      to read, compressed
//! {instance}/uploads/{uuid}/blobs/{content}{/…}                   to write; what follows the content is ignored
//! {instance}/uploads/{uuid}/compressed-blobs/zstd/{content}{/…}   to write, compressed
//! ```
//!
//! The content is `blake3/{hash}/{size}`, or `{hash}/{size}` by SHA-256: REAPI has old digest functions left out. The
//! instance and its slash are absent when it is empty.

use std::fmt;

use crate::{
    Blob,
    sha256::{ContentName, Sha256Blob},
};

const BLAKE3: &str = "blake3";
const ZSTD: &str = "zstd";

/// A text that is not the name of a content to read or write.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is not a resource of this store: {problem}")]
pub struct ResourceError {
    name: String,
    problem: &'static str,
}

/// In which form the bytes of a content travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Form {
    /// As they are.
    Plain,
    /// As zstd frames.
    Zstd,
}

/// A content to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadName {
    /// REAPI instance, usually empty.
    pub instance: String,
    /// In which form.
    pub form: Form,
    /// What is to be read.
    pub content: ContentName,
}

/// A content to be written under an upload's id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UploadName {
    /// REAPI instance, usually empty.
    pub instance: String,
    /// The client's id of this upload.
    pub id: String,
    /// In which form.
    pub form: Form,
    /// What is to be written.
    pub content: ContentName,
}

impl fmt::Display for ReadName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}{}", Instance(&self.instance), Folder(self.form), Content(&self.content))
    }
}

impl fmt::Display for UploadName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (instance, id) = (Instance(&self.instance), &self.id);
        write!(f, "{instance}uploads/{id}/{}{}", Folder(self.form), Content(&self.content))
    }
}

struct Instance<'a>(&'a str);
struct Folder(Form);
struct Content<'a>(&'a ContentName);

impl fmt::Display for Instance<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, "{}/", self.0) }
    }
}

impl fmt::Display for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Form::Plain => f.write_str("blobs/"),
            Form::Zstd => write!(f, "compressed-blobs/{ZSTD}/"),
        }
    }
}

impl fmt::Display for Content<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            ContentName::Blake3(blob) => write!(f, "{BLAKE3}/{blob}"),
            ContentName::Sha256(name) => name.fmt(f),
        }
    }
}

/// Name for reading `blob` from the nameless instance.
pub fn read_name(blob: &Blob) -> String {
    ReadName { instance: String::new(), form: Form::Plain, content: ContentName::Blake3(*blob) }.to_string()
}

/// Name for writing `blob` to the nameless instance.
pub fn upload_name(id: &str, blob: &Blob) -> String {
    let (instance, id, content) = (String::new(), id.to_owned(), ContentName::Blake3(*blob));
    UploadName { instance, id, form: Form::Plain, content }.to_string()
}

/// Takes a name for reading apart.
///
/// # Errors
/// [`ResourceError`] says what is wrong with the name.
pub fn parse_read(name: &str) -> Result<ReadName, ResourceError> {
    let parts: Vec<&str> = name.split('/').collect();
    let at = keyword(&parts).ok_or_else(|| error(name, READ_FORM))?;
    if parts[at] == "uploads" {
        return Err(error(name, READ_FORM));
    }
    let instance = instance(&parts[..at], name, READ_FORM)?;
    let (form, content, more) = parse_content(&parts[at..], name, READ_FORM)?;
    if more {
        return Err(error(name, "something follows the size"));
    }
    Ok(ReadName { instance, form, content })
}

/// Takes a name for writing apart.
///
/// # Errors
/// [`ResourceError`] says what is wrong with the name.
pub fn parse_upload(name: &str) -> Result<UploadName, ResourceError> {
    let parts: Vec<&str> = name.split('/').collect();
    let at = keyword(&parts).ok_or_else(|| error(name, UPLOAD_FORM))?;
    let instance = instance(&parts[..at], name, UPLOAD_FORM)?;
    match &parts[at..] {
        ["uploads", id, rest @ ..] if !id.is_empty() => {
            let (form, content, _) = parse_content(rest, name, UPLOAD_FORM)?;
            Ok(UploadName { instance, id: (*id).to_owned(), form, content })
        }
        _ => Err(error(name, UPLOAD_FORM)),
    }
}

const READ_FORM: &str = "expected [instance/]blobs/[blake3/]<64 hexadecimal digits>/<size>, or compressed-blobs/zstd/ in the place of blobs/";
const UPLOAD_FORM: &str = "expected [instance/]uploads/<id>/blobs/[blake3/]<64 hexadecimal digits>/<size>, or compressed-blobs/zstd/ in the place of blobs/";
const FUNCTION: &str =
    "the digest function is not known: blake3 is named before the hash, SHA-256 is meant when none is named";
const COMPRESSOR: &str = "the compressor is not supported: zstd is";

/// Where the words begin that REAPI reserves, so that an instance may have slashes.
fn keyword(parts: &[&str]) -> Option<usize> {
    parts.iter().position(|part| matches!(*part, "blobs" | "uploads" | "compressed-blobs"))
}

/// What stands before the keyword: nothing, or parts of which none is empty.
fn instance(parts: &[&str], name: &str, form: &'static str) -> Result<String, ResourceError> {
    if parts.iter().any(|part| part.is_empty()) {
        return Err(error(name, form));
    }
    Ok(parts.join("/"))
}

/// The content at the start of `parts`, and whether something follows it.
fn parse_content(
    parts: &[&str],
    name: &str,
    expected: &'static str,
) -> Result<(Form, ContentName, bool), ResourceError> {
    let (form, rest) = match parts {
        ["blobs", rest @ ..] => (Form::Plain, rest),
        ["compressed-blobs", ZSTD, rest @ ..] => (Form::Zstd, rest),
        ["compressed-blobs", ..] => return Err(error(name, COMPRESSOR)),
        _ => return Err(error(name, expected)),
    };
    let (content, rest) = match rest {
        [BLAKE3, hash, size, rest @ ..] => (Blob::from_parts(hash, size).map(ContentName::Blake3), rest),
        [function, _, _, ..] if !is_hash(function) => return Err(error(name, FUNCTION)),
        [hash, size, rest @ ..] => (Sha256Blob::from_parts(hash, size).map(ContentName::Sha256), rest),
        _ => (None, rest),
    };
    let content = content.ok_or_else(|| error(name, expected))?;
    Ok((form, content, !rest.is_empty()))
}

/// Digest functions have letters beyond `f` in their names, or are shorter.
fn is_hash(part: &str) -> bool {
    part.len() >= 32 && part.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn error(name: &str, problem: &'static str) -> ResourceError {
    ResourceError { name: name.chars().take(300).collect(), problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents() -> [ContentName; 2] {
        [ContentName::Blake3(Blob::of(b"x")), ContentName::Sha256(Sha256Blob::of(b"x"))]
    }

    #[test]
    fn names_round_trip() {
        for content in contents() {
            for form in [Form::Plain, Form::Zstd] {
                for instance in ["", "some/instance"] {
                    let instance = instance.to_owned();
                    let read = ReadName { instance: instance.clone(), form, content };
                    assert_eq!(parse_read(&read.to_string()), Ok(read));
                    let upload = UploadName { instance, id: "id".to_owned(), form, content };
                    assert_eq!(parse_upload(&format!("{upload}/with/metadata")), Ok(upload));
                }
            }
        }
        let [ContentName::Blake3(blob), _] = contents() else { unreachable!() };
        assert_eq!(read_name(&blob), format!("blobs/blake3/{}/1", blob.digest));
        assert_eq!(upload_name("id", &blob), format!("uploads/id/blobs/blake3/{}/1", blob.digest));
    }

    #[test]
    fn other_names_are_refused_with_the_reason() {
        let hash = Blob::of(b"x").digest;
        for (name, reason) in [
            (format!("blobs/md5/{hash}/1"), "digest function"),
            (format!("blobs/sha256/{hash}/1"), "digest function"),
            (format!("blobs/blake3/{hash}/01"), "expected"),
            (format!("blobs/{hash}/01"), "expected"),
            (format!("blobs/blake3/{hash}"), "expected"),
            (format!("blobs/blake3/{hash}/1/x"), "follows"),
            (format!("blobs/{hash}/1/x"), "follows"),
            (format!("/blobs/{hash}/1"), "expected"),
            (format!("compressed-blobs/brotli/blake3/{hash}/1"), "compressor"),
            (format!("compressed-blobs/{hash}/1"), "compressor"),
            (format!("uploads/x/blobs/{hash}/1"), "expected"),
            (String::new(), "expected"),
        ] {
            let error = parse_read(&name).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        for (name, reason) in [
            (format!("uploads//blobs/blake3/{hash}/1"), "expected"),
            (format!("uploads/a/compressed-blobs/deflate/blake3/{hash}/1"), "compressor"),
            (format!("uploads/a/blobs/vso/{hash}/1"), "digest function"),
            (format!("uploads/a/{hash}/1"), "expected"),
            (format!("blobs/blake3/{hash}/1"), "expected"),
        ] {
            let error = parse_upload(&name).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
