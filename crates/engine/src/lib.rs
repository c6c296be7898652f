//! The session engine of a node: everything between "here is a tree" and "here is a directory to work in".
//!
//! It owns one directory of the node (by default `/var/lib/aether`) and promises that a session, once
//! acknowledged, survives the end of this process and of the machine. It knows nothing of Kubernetes or gRPC.
//!
//! Read [`engine`] first: it is the facade, and tells the story in the order in which it happens. Below it, from the
//! kernel upward: [`kernel`] probes what this node can do, [`mount`] talks to the kernel's mount API, [`pool`] keeps
//! the writable directories, [`image`] turns a tree into an EROFS image, [`freeze`] holds writers still, [`upper`]
//! turns changes back into a tree, [`restore`] applies a tree to a live session, [`session`] and [`checkpoint`] join
//! these into operations, [`state`] remembers, and [`repair`] puts right what a crash left half made.

#![warn(missing_docs)]

pub mod cache;
pub mod checkpoint;
pub mod crash;
mod draft;
pub mod engine;
pub mod error;
pub mod freeze;
pub mod git;
pub mod hydrate;
pub mod image;
pub mod kernel;
pub mod lazy;
pub mod limits;
pub mod mount;
mod mounted;
pub mod pool;
pub mod repair;
pub mod restore;
pub mod scan;
pub mod session;
pub mod state;
mod sys;
pub mod testing;
pub mod upper;
mod walk;
mod warm;
mod writeback;

pub use checkpoint::RestoreReport;
pub use engine::{Config, Engine, NodeStatistics};
pub use error::{Error, Result};
pub use lazy::Incomplete;
pub use limits::{PoolState, SessionUsage};
pub use session::SessionStatus;
pub use state::{Consistency, Digested, Image, ImageId, Session, Snapshot};
