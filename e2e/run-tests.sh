#!/usr/bin/env bash
# Runs the tests by what they need: `checks` (format, lints, generated files), `unit` (no root), `mounts` (root, real kernel mounts), `cluster` (the two-node Kubernetes),
# or `all`. Says what runs and how long each part took; the first failing part ends the run.
source "$(dirname "$0")/third-party/lib.sh"

top=$(cd "$(dirname "$0")/.." && pwd)
cd "$top"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$AETHER_CACHE/target}"
unset KEEP

# Each part is a run of this script of its own: in a condition, `set -e` would be off inside it.
part() {
    local began=$SECONDS
    say "== $1"
    "$top/e2e/run-tests.sh" "$1" || { say "== $1 FAILED after $((SECONDS - began)) s"; exit 1; }
    say "== $1: $((SECONDS - began)) s"
}

# Every selection is the whole workspace, filtered by target: cargo builds a dependency again for another set of packages.
cargo_test() { cargo test --quiet --workspace --locked "$@"; }

# Integration tests by the name of their file or folder.
targets() {
    local kind=$1 target name found=0
    for target in crates/*/tests/*.rs */tests/*.rs crates/*/tests/*/main.rs */tests/*/main.rs; do
        [ -e "$target" ] || continue
        name=${target%/main.rs}
        name=$(basename "$name" .rs)
        case "$target" in
            e2e/tests/*) [ "$kind" = cluster ] ;;
            */mount_* | */property_*) [ "$kind" = mounts ] ;;
            *) [ "$kind" = unit ] ;;
        esac || continue
        printf -- '--test\n%s\n' "$name"
        found=1
    done
    [ $found = 1 ]
}

unit() {
    local tests
    tests=$(targets unit)
    # A program's own tests that mount are in modules called mount_races.
    # shellcheck disable=SC2086  # one word a line
    cargo_test --lib --bins $tests -- --skip mount_races::
}

mounts() {
    [ "$(id -u)" = 0 ] || { say "tests with real mounts need root; \`make check\` is what runs without"; return 1; }
    e2e/third-party/packages.sh
    local tests
    tests=$(targets mounts)
    cargo_test --bins mount_races::
    # shellcheck disable=SC2086
    cargo_test $tests
}

cluster() {
    [ "$(id -u)" = 0 ] || { say "the test cluster needs root"; return 1; }
    tool="$CARGO_TARGET_DIR/debug/aether-cluster"
    local tests
    tests=$(targets cluster)
    local helm
    helm=$(e2e/third-party/kubectl-helm.sh)/helm
    "$helm" lint --quiet --strict charts/aether
    "$helm" template aether charts/aether >/dev/null
    make --no-print-directory build
    trap '"$tool" down' EXIT
    "$tool" up --install
    # shellcheck disable=SC2086
    cargo_test $tests -- --nocapture --test-threads=2
}

checks() {
    cargo fmt --all --check
    cargo run --quiet --locked -p aether-api --bin aether-generate -- --check
    cargo clippy --quiet --workspace --all-targets --locked -- -D warnings
}

case "${1:-}" in
    checks | unit | mounts | cluster) "$1" ;;
    all) for name in checks unit mounts cluster; do part "$name"; done ;;
    *)
        echo "usage: e2e/run-tests.sh checks|unit|mounts|cluster|all" >&2
        exit 2
        ;;
esac
