#!/usr/bin/env bash
# Installs BuildGrid's command line (bgd), a Remote Execution API client that is not ours, from the Python registry into a
# virtual environment, once per machine and set of versions, and prints the folder of its programs. Every package is pinned.
source "$(dirname "$0")/lib.sh"

packages="$(dirname "${BASH_SOURCE[0]}")/buildgrid.txt"
version=$(sed -n 's/^buildgrid==//p' "$packages")
out="$AETHER_CACHE/buildgrid-$version-$(sha256sum "$packages" | cut -c1-12)"

exec 9>"$AETHER_CACHE/buildgrid.lock"
flock 9
if [ ! -e "$out/complete" ]; then
    say "buildgrid $version: installing"
    need() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
    need python3 || need_packages python3 python3-venv
    rm -rf "$out"
    # Where it stays: the programs of an environment name their interpreter by its path.
    python3 -m venv "$out"
    "$out/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary :all: --requirement "$packages" >"$out/pip.log" 2>&1 ||
        { tail -5 "$out/pip.log" >&2; say "pip could not install buildgrid; the whole log is $out/pip.log"; exit 1; }
    touch "$out/complete"
    say "buildgrid $version: installed"
fi
echo "$out/bin"
