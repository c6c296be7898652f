//! Trees of uppers and restores, on real mounts: EROFS image, data-only layer and upper, as in the product.
//!
//! Needs root. Mounts are made in a private mount namespace of each worker thread and go with it.
//!
//! - [`upper`]: the tree computed from an upper equals the merged view, under random operations;
//! - [`restore`]: a session restored in place shows its target, under random operations;
//! - [`promises`]: what a restore promises to processes that live through it;
//! - [`costs`]: what a digest reads, makes and counts;
//! - [`git`]: the first `git status` in a session reads no contents.
//!
//! `AETHER_SEEDS` sets the number of random seeds (2,000 by default), `AETHER_SEED` runs one.

mod costs;
mod git;
mod promises;
mod random;
mod restore;
mod upper;
