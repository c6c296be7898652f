//! The operator: reconciles sources, sessions, checkpoints, restores, commands and commits, serves the admission webhook, and never touches a file's contents.
//!
//! Each reconciler is one function of an object and a [`context::Context`], in named steps: it reads what the object names
//! (`dereference`), checks the rules (`validate`), decides and builds without I/O (`resolve`, `next`, `plan`,
//! `build`), creates what is missing, and writes the status last and only when it differs. It keeps no memory and does not
//! retry inside: the next activation is the retry. [`controllers`] says what activates which.
//!
//! What concerns a session that a node holds is that node's business (its driver's): the operator waits for it.

pub mod access;
pub mod admission;
pub mod audit;
pub mod checkpoint;
pub mod command;
pub mod commit;
pub mod config;
pub mod context;
pub mod controllers;
pub mod crash;
pub mod damage;
pub mod error;
pub mod events;
pub mod leader;
pub mod nodes;
pub mod objects;
pub mod orphans;
pub mod pins;
pub mod pod;
pub mod provision;
pub mod restore;
pub mod schedule;
pub mod session;
pub mod signature;
pub mod source;
pub mod store_certificate;
pub mod sweep;
