//! Named points at which a test can end the process.
