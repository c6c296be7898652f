//! Fakes for tests of Kubernetes clients; never in production.

pub mod api_server;

pub use api_server::{ApiServer, Fate, Write};
