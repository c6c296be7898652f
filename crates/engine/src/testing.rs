//! Help for tests that mount.
