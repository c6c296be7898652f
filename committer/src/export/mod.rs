//! A copy of a tree: the files of a directory, or the objects of a bucket.
//!
//! It holds what reviewers were shown, and no repositories; see [`tree`].

mod contents;
mod folder;
mod s3;
mod tree;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use crate::failure::{Failure, Reason};

pub use folder::export as folder;
pub use s3::export as s3;

/// How the name of a directory ends that is not complete.
const PARTIAL: &str = ".partial";
/// How the names of the records in a bucket begin.
const RECORD: &str = ".aether-export";

/// Refuses a place in which a name would be taken for what an export keeps beside what it copies.
fn free<'a>(place: &str, mut names: impl Iterator<Item = &'a OsStr>) -> Result<(), Failure> {
    let kept = |name: &OsStr| {
        let name = name.as_bytes();
        name.ends_with(PARTIAL.as_bytes()) || name.starts_with(RECORD.as_bytes())
    };
    let Some(name) = names.find(|name| kept(name)) else { return Ok(()) };
    let message = format!(
        "{place} has {name:?} in it, as exports that are not complete yet and their records are called: export to another path"
    );
    Err(Failure::new(Reason::Invalid, message))
}
