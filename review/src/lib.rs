//! The aggregated API server of group `review.aether.dev`: the contents of sessions for reviewers, as git reads them.
//!
//! It answers the API server only ([`front_proxy`]), asks it whether the user may read the checkpoint or commit
//! ([`authorize`]), compares two trees ([`changes`]) and sends what differs as a `git fast-import` stream
//! ([`fast_import`]). It serves single files ([`file`]) and says where the lines of notes have gone ([`follow`]). It keeps
//! no state but its certificate ([`keeper`]).

pub mod api;
mod audit;
pub mod authorize;
pub mod changes;
pub mod config;
mod discovery;
pub mod fast_import;
pub mod file;
pub mod follow;
pub mod front_proxy;
pub mod keeper;
pub mod metrics;
mod notes;
pub mod server;
pub mod status;
mod subject;
