//! The audit log: one line for each state change of a commit, an approval or a note, which nobody can change, remove or
//! reorder without its being found out.
//!
//! [`chain`] is the format: every line carries the hash of the one before it, so that the hash of the last line ([`Head`])
//! speaks for all. [`log`] keeps the lines in the store: segments in one tree, of which an anchor elsewhere says which one it is. [`Memory`] is what a writer
//! knows of them.
//!
//! What a chain alone cannot show is that its end was cut off: whoever wants to know compares with a head that was written
//! down elsewhere ([`chain::Verifier`] says whether a head was passed).

pub mod chain;
pub mod log;
mod memory;

pub use chain::{Broken, Entry, Head, Object, TooLong, Verb};
pub use log::{Anchor, Error, Held, Log, Refusal, Seen};
pub use memory::Memory;
