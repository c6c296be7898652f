//! What tests of several crates need: an API server of Kubernetes, fake and real, a real S3 service, git over http and ssh. Never in production.

pub mod api_server;
pub mod bucket;
pub mod control_plane;
pub mod git_server;
pub mod sshd;

pub use api_server::{ApiServer, Fate, Write};
