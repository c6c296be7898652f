#!/usr/bin/env bash
# Runs the tests by what they need: `checks` (format, lints, generated files), `unit` (no root), `mounts` (root, real kernel mounts), `cluster` (the two-node Kubernetes),
# or `all`. Says what runs and how long each part took; the first failing part ends the run.
source "$(dirname "$0")/third-party/lib.sh"

top=$(cd "$(dirname "$0")/.." && pwd)
cd "$top"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$AETHER_CACHE/target}"
unset KEEP

part() {
    local name=$1 began=$SECONDS
    shift
    say "== $name"
    "$@" || { say "== $name FAILED after $((SECONDS - began)) s"; exit 1; }
    say "== $name: $((SECONDS - began)) s"
}

# Every selection is the whole workspace, filtered by target: cargo builds a dependency again for another set of packages.
cargo_test() { cargo test --quiet --workspace --locked "$@"; }

# Integration tests by the name of their file.
targets() {
    local kind=$1 file name
    for file in crates/*/tests/*.rs */tests/*.rs; do
        name=$(basename "$file" .rs)
        case "$file" in
            e2e/tests/*) [ "$kind" = cluster ] ;;
            */mount_* | */property_*) [ "$kind" = mounts ] ;;
            *) [ "$kind" = unit ] ;;
        esac && printf -- '--test\n%s\n' "$name"
    done
    true
}

unit() {
    local tests
    mapfile -t tests < <(targets unit)
    cargo_test --lib --bins "${tests[@]}"
}

mounts() {
    [ "$(id -u)" = 0 ] || { say "tests with real mounts need root; \`make check\` is what runs without"; return 1; }
    e2e/third-party/packages.sh
    local tests
    mapfile -t tests < <(targets mounts)
    cargo_test "${tests[@]}"
}

cluster() {
    [ "$(id -u)" = 0 ] || { say "the test cluster needs root"; return 1; }
    local tool="$CARGO_TARGET_DIR/debug/aether-cluster" tests failed=0
    mapfile -t tests < <(targets cluster)
    cargo build --quiet --workspace --locked
    trap '"$tool" down' EXIT
    "$tool" up --install
    cargo_test "${tests[@]}" -- --nocapture || failed=1
    trap - EXIT
    "$tool" down
    return $failed
}

checks() {
    cargo fmt --all --check
    cargo run --quiet --locked -p aether-api --bin aether-generate -- --check
    cargo clippy --quiet --workspace --all-targets --locked -- -D warnings
}

case "${1:-}" in
    checks | unit | mounts | cluster) part "$1" "$1" ;;
    all)
        part "static checks" checks
        part "unit and property tests" unit
        part "tests with real mounts" mounts
        part "cluster tests" cluster
        ;;
    *) echo "usage: e2e/run-tests.sh checks|unit|mounts|cluster|all" >&2; exit 2 ;;
esac
