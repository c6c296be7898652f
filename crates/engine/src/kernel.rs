//! What the running kernel can do, found out by doing it.

/// What was probed at start.
#[derive(Debug, Clone)]
pub struct Report {}
