//! What tests of several crates need: a fake API server of Kubernetes, a real S3 service. Never in production.

pub mod api_server;
pub mod bucket;

pub use api_server::{ApiServer, Fate, Write};
