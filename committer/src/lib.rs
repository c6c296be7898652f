//! The committer: carries a reviewed tree out of the store, and says what became of it.
//!
//! [`git`] makes one commit of what a session changed and pushes it, [`export`] copies the tree to a directory or a bucket, [`report`] writes the result as the container's
//! termination message, and [`failure`] says why there is none, and whether to try again. Whoever starts it twice, at
//! once or after a kill, gets one commit: it is known by a trailer that holds the UID of the request.
//! Secrets are read from files and reach no argument, no log and no message.

pub mod cli;
pub mod crash;
pub mod export;
pub mod failure;
pub mod git;
mod losses;
pub mod report;
