//! A session restored in place shows the target, whatever the two trees are.
//!
//! Random operations run through a real mount; at random moments the session is restored to one of its earlier trees,
//! and then both the merged view and the tree of its upper must equal that.

use crate::random::scenario::{self, Habits};

const HABITS: Habits = Habits { checks: 4, restores: 6 };

#[test]
fn a_restored_session_shows_its_target() {
    scenario::must_hold(HABITS);
}
