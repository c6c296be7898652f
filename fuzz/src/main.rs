//! One target under libFuzzer: `AETHER_FUZZ=name`, the arguments are libFuzzer's. See `fuzz/run.sh`.
#![no_main]

use std::sync::LazyLock;

use aether_fuzz::{TARGETS, Target};

static TARGET: LazyLock<&'static Target> = LazyLock::new(|| {
    let name = std::env::var("AETHER_FUZZ").unwrap_or_default();
    TARGETS.iter().find(|target| target.name == name).expect("AETHER_FUZZ names no target")
});

libfuzzer_sys::fuzz_target!(|input: &[u8]| TARGET.run(input));
