//! The server as its client sees it.

mod changes;
mod cluster;
mod notes;
mod trust;
