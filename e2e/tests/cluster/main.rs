//! Tests on the real cluster. Each runs in a namespace of its own and alone if wished:
//! `cargo test -p aether-e2e --test cluster NAME`. They bring the cluster up when it is not.

mod harness;
mod review;
mod store_access;
mod store_nodes;
mod story;

use aether_e2e::testing::{self, Test};
use anyhow::Result;

/// The program that nodes run, as cargo built it for these tests.
const HARNESS: &str = env!("CARGO_BIN_EXE_aether-cluster");

async fn with_namespace(name: &str, body: impl AsyncFnOnce(&Test) -> Result<()>) -> Result<()> {
    testing::with_namespace(HARNESS, name, body).await
}

async fn alone_with_namespace(name: &str, body: impl AsyncFnOnce(&Test) -> Result<()>) -> Result<()> {
    testing::alone_with_namespace(HARNESS, name, body).await
}
