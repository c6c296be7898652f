//! Preparation of a git working copy.
