//! The importer: brings a source into the store as one tree, and says what became of it.
//!
//! [`git`] fetches with the git program and stores the tree of a commit, [`s3`] reads the objects of a bucket, [`scan`] turns a
//! directory into a tree and uploads it,
//! [`report`] speaks to the operator (progress on stdout, the result in the container's termination message), and
//! [`failure`] says why an import failed in the words of the source's conditions. Secrets are read from files and
//! never reach an argument, a log, or the tree.

pub mod cli;
pub mod failure;
mod folder;
pub mod git;
pub mod report;
pub mod s3;
pub mod scan;
