#!/usr/bin/env bash
# Compiles RocksDB's C++ from the sources that its crate carries, once per machine and version, and prints the folder of the
# library. Without this, cargo compiles it again (eight minutes on two cores) whenever the features of a build dependency differ
# between two selections of packages.
source "$(dirname "$0")/lib.sh"

top=$(cd "$(dirname "$0")/../.." && pwd)
crate=$(sed -n '/^name = "librocksdb-sys"$/{n;s/version = "\(.*\)"/\1/p}' "$top/Cargo.lock")
[ -n "$crate" ] || { say "librocksdb-sys is not in Cargo.lock"; exit 1; }
out="$AETHER_CACHE/rocksdb-$crate"

exec 9>"$AETHER_CACHE/rocksdb.lock"
flock 9
if [ ! -e "$out/librocksdb.a" ]; then
    "$top/e2e/third-party/build-packages.sh"
    say "rocksdb $crate: compiling (about eight minutes)"
    work="$AETHER_CACHE/rocksdb-build"
    # Its features (lz4, zstd) are those that the workspace's own dependency on rocksdb asks for.
    env -u ROCKSDB_LIB_DIR -u ROCKSDB_STATIC CARGO_TARGET_DIR="$work" \
        cargo build --quiet --locked --manifest-path "$top/Cargo.toml" -p librocksdb-sys
    mkdir -p "$out"
    cp "$(find "$work" -name librocksdb.a | head -1)" "$out/librocksdb.a.new"
    mv "$out/librocksdb.a.new" "$out/librocksdb.a"
    rm -rf "$work"
    say "rocksdb $crate: compiled"
fi
echo "$out"
