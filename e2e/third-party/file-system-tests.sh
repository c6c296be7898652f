#!/usr/bin/env bash
# Installs the public test programs for file systems, pjdfstest (what POSIX asks of the calls) and fsx (random reads and writes
# of one file), from the Rust registry, once per machine and version, and prints the folder of the programs. SQLite comes with
# Python.
source "$(dirname "$0")/lib.sh"

pjdfstest=0.2.2
fsx=0.3.2
out="$AETHER_CACHE/file-system-tests-$pjdfstest-$fsx"

exec 9>"$AETHER_CACHE/file-system-tests.lock"
flock 9
need_packages build-essential libacl1-dev acl git python3
if [ ! -e "$out/bin/pjdfstest" ] || [ ! -e "$out/bin/fsx" ]; then
    say "pjdfstest $pjdfstest, fsx $fsx: compiling (about two minutes)"
    work=$(mktemp -d "$AETHER_CACHE/file-system-tests.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    # Outside of any checkout, so that no configuration of a workspace is taken over.
    cd "$work"
    for crate in "pjdfstest@$pjdfstest" "fsx@$fsx"; do
        env -u RUSTFLAGS CARGO_TARGET_DIR="$work/target" cargo install --quiet --locked --no-track --root "$work/out" "$crate" >&2
    done
    rm -rf "$out"
    mv "$work/out" "$out"
    say "pjdfstest $pjdfstest, fsx $fsx: compiled"
fi
echo "$out/bin"
