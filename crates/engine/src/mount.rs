//! The kernel's mount API.
