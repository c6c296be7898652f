//! Applies the difference between two trees to a live session through its merged mount.
