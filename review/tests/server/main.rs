//! The server as its client sees it.

mod audit;
mod changes;
mod cluster;
mod notes;
mod trust;
