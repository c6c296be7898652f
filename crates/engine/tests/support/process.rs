//! Processes that a test starts.

use std::process::Child;

/// A process that ends with the test, also when that fails.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
