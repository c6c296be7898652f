#!/usr/bin/env bash
# Runs the tests by what they need: `checks` (format, lints, generated files), `unit` (no root), `mounts` (root, real kernel mounts), `cluster` (the two-node Kubernetes),
# or `all`. Says what runs and how long each part, and each test program of more than a second, took; the first failing part ends the run.
# JOBS sets how many test programs run at the same time: one more than there are processors, because most of them mostly wait.
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

# Builds the test programs of a selection; of each, the folder of its package and where it is.
programs() {
    cargo test --quiet --workspace --locked --no-run --message-format=json-render-diagnostics "$@" |
        sed -n 's/^{"reason":"compiler-artifact".*"manifest_path":"\([^"]*\)\/Cargo.toml".*"profile":{[^}]*"test":true}.*"executable":"\([^"]*\)".*/\1\n\2/p'
}

# Runs them, several at the same time. They share nothing but the machine.
at_the_same_time() { xargs -d '\n' -P "${JOBS:-$(($(nproc) + 1))}" -n 2 "$top/e2e/run-tests.sh" program; }

# Runs one as cargo does. What it says is shown when it fails.
program() {
    local folder=$1 executable=$2 name began=$SECONDS
    name="$(basename "$folder"): $(basename "${executable%-*}")"
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    # shellcheck disable=SC2086  # several words
    if (cd "$folder" && AETHER_TOP=$top "$executable" --quiet ${TEST_ARGS:-}) >"$log" 2>&1; then
        [ $((SECONDS - began)) -lt 2 ] || say "$name: $((SECONDS - began)) s"
    else
        cat "$log" >&2
        say "$name FAILED after $((SECONDS - began)) s"
        return 1
    fi
}

# Integration tests by the name of their file or folder.
targets() {
    local kind=$1 target name found=0
    for target in crates/*/tests/*.rs */tests/*.rs crates/*/tests/*/main.rs */tests/*/main.rs; do
        [ -e "$target" ] || continue
        name=${target%/main.rs}
        name=$(basename "$name" .rs)
        case "$target" in
            e2e/tests/*) [ "$kind" = cluster ] ;;
            */property_* | */mount_conformance/*) [ "$kind" = beside ] ;;
            */mount_*) [ "$kind" = mount ] ;;
            *) [ "$kind" = unit ] ;;
        esac || continue
        printf -- '--test\n%s\n' "$name"
        found=1
    done
    [ $found = 1 ]
}

unit() {
    local tests built
    tests=$(targets unit)
    # Those that take long begin first. A program's own tests that mount are in modules called mount_races.
    # shellcheck disable=SC2086  # one word a line
    built=$(programs $tests && programs --lib --bins)
    TEST_ARGS='--skip mount_races::' at_the_same_time <<<"$built"
}

mounts() {
    [ "$(id -u)" = 0 ] || { say "tests with real mounts need root; \`make check\` is what runs without"; return 1; }
    e2e/third-party/packages.sh
    local tests
    tests=$(targets mount && targets beside)
    # Built before anything is timed.
    # shellcheck disable=SC2086  # one word a line
    { programs --bins && programs $tests; } >/dev/null
    printf '%s\n' mount beside | xargs -P 2 -n 1 "$top/e2e/run-tests.sh" lane
}

# Those that mount, freeze and kill come one after the other. Those that search through many states, and the suites of others, which have sessions of
# their own and measure nothing, run beside them.
lane() {
    local tests built
    tests=$(targets "$1")
    [ "$1" != mount ] || { built=$(programs --bins); JOBS=1 TEST_ARGS=mount_races:: at_the_same_time <<<"$built"; }
    # shellcheck disable=SC2086  # one word a line
    built=$(programs $tests)
    JOBS=1 at_the_same_time <<<"$built"
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
    lane | program) "$@" ;;
    all) for name in checks unit mounts cluster; do part "$name"; done ;;
    *)
        echo "usage: e2e/run-tests.sh checks|unit|mounts|cluster|all" >&2
        exit 2
        ;;
esac
