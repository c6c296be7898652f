//! A copy of a tree: the files of a directory, or the objects of a bucket.

mod contents;
mod folder;
mod s3;

pub use folder::export as folder;
pub use s3::export as s3;
