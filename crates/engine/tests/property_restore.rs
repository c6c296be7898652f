//! A session restored in place shows the target, whatever the two trees are.
//!
//! Random operations run through a real mount; at random moments the session is restored to one of its earlier trees,
//! and then both the merged view and the tree of its upper must equal that. See `property_upper.rs` for the variables.

mod random;

use aether_engine::upper::Interpretation;
use random::scenario::{self, Habits};

const HABITS: Habits = Habits { checks: 4, restores: 6 };

#[test]
fn a_restored_session_shows_its_target() {
    let right = Interpretation::default();
    let failed = match random::number("AETHER_SEED") {
        Some(seed) => random::alone(|scratch| scenario::run(seed, scratch, HABITS, right)).map(|failure| (seed, failure)),
        None => {
            let seeds = random::number("AETHER_SEEDS").unwrap_or(2000);
            random::search(seeds, |seed, scratch| scenario::run(seed, scratch, HABITS, right))
        }
    };
    if let Some((seed, failure)) = failed {
        let shrunk = random::alone(|scratch| scenario::shrink(failure, scratch, right));
        panic!("AETHER_SEED={seed}: {shrunk}");
    }
}
