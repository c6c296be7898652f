//! Content-addressed storage: digests, trees of directories, and the stores that hold them.
//!
//! A [`Blob`] is a BLAKE3-256 [`Digest`] with a size. A tree is named by the blob of its root
//! [`tree::Directory`]; the message format is Bazel's Remote Execution API v2 (REAPI), so that any
//! REAPI cache can hold a tree. [`Store`] is what every store can do; [`MemoryStore`],
//! [`LocalStore`] and [`RemoteStore`] implement it, and [`transfer`] moves trees between them.
//!
//! Two promises hold everywhere: bytes are verified against their digest when they are written and
//! when they are read, and a directory message is stored only after everything below it, so that
//! a directory found in a store is complete.

pub mod collect;
pub mod crash;
pub mod digest;
#[cfg(feature = "durable")]
pub mod durable;
pub mod lazy;
pub mod local;
pub mod memory;
pub mod remote;
pub mod sha256;
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;
pub mod transfer;
pub mod tree;

pub use digest::{Blob, Digest};
pub use local::{LocalConfig, LocalStore};
pub use memory::MemoryStore;
pub use remote::RemoteStore;
pub use sha256::{ContentName, Sha256Blob};
pub use store::{Store, StoreError};
