//! The facade of a node's engine.
