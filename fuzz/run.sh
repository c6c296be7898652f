#!/usr/bin/env bash
# Fuzzes the targets of `fuzz/src/lib.rs` with libFuzzer, guided by coverage: all one after the other, or FUZZ=name; FUZZ_SECONDS each.
# What was found to reach new code is kept in $AETHER_CACHE/fuzz, failing inputs in target/fuzz. The stable compiler will do.
source "$(dirname "$0")/../e2e/third-party/lib.sh"

top=$(cd "$(dirname "$0")/.." && pwd)
cd "$top"
seconds=${FUZZ_SECONDS:-60}
# Cargo keeps what this wrapper has compiled apart from the rest, and compiles dependencies as ever.
export RUSTC_WORKSPACE_WRAPPER="$top/fuzz/coverage.sh"
cargo build --quiet --workspace --locked --features aether-fuzz/libfuzzer --bin aether-fuzz
program="${CARGO_TARGET_DIR:-target}/debug/aether-fuzz"
cargo_test=(env -u RUSTC_WORKSPACE_WRAPPER cargo test --quiet --workspace --locked --test fuzz_targets)
seeds="$AETHER_CACHE/fuzz/seeds"
mkdir -p target/fuzz
FUZZ_SEEDS="$seeds" "${cargo_test[@]}" >/dev/null
failed=0
ran=0
for folder in "$seeds"/*; do
    name=$(basename "$folder")
    [ -z "${FUZZ:-}" ] || [ "$FUZZ" = "$name" ] || continue
    ran=1
    corpus="$AETHER_CACHE/fuzz/corpus/$name"
    mkdir -p "$corpus"
    say "$name: $seconds s"
    AETHER_FUZZ="$name" "$program" -max_total_time="$seconds" -max_len=65536 -rss_limit_mb=1024 -timeout=5 -print_final_stats=1 -verbosity=0 \
        -artifact_prefix="target/fuzz/$name-" "$corpus" "$folder" >"target/fuzz/$name.log" 2>&1 || {
        failed=1
        grep -E 'panicked|ERROR|Test unit written' -A1 "target/fuzz/$name.log" >&2 || tail -5 "target/fuzz/$name.log" >&2
        say "$name FAILED; again: FUZZ_INPUT=<that file> cargo test --test fuzz_targets"
    }
    say "$name: $(sed -n 's/^stat::number_of_executed_units: *//p' "target/fuzz/$name.log") executions, $(ls "$corpus" | wc -l) inputs that reach different code"
done
[ $ran = 1 ] || {
    say "there is no target ${FUZZ:-}; there are: $(ls "$seeds" | xargs)"
    exit 1
}
exit $failed
