#!/usr/bin/env bash
# Makes a bare git repository of a few commits out of the Kubernetes source tree, as imported by the demo, and prints its
# path. Names and dates are fixed, so its commits have the same ids on every machine.
source "$(dirname "$0")/lib.sh"

version=1.20.2
out="$AETHER_CACHE/kubernetes-$version/kubernetes.git"

exec 9>"$AETHER_CACHE/kubernetes-repository.lock"
flock 9
if [ ! -e "$out" ]; then
    need_packages git
    say "kubernetes $version: making a git repository of its source"
    work=$(mktemp -d "$AETHER_CACHE/repository.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    debian_source kubernetes "$work/tree"
    rm -rf "$work/tree/debian" "$work/tree/.pc"
    export GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null
    export GIT_AUTHOR_NAME="The Kubernetes Authors" GIT_AUTHOR_EMAIL=kubernetes@example.invalid
    export GIT_COMMITTER_NAME="$GIT_AUTHOR_NAME" GIT_COMMITTER_EMAIL="$GIT_AUTHOR_EMAIL"
    day=13
    # Ignored files are part of the tree as released.
    record() {
        local message=$1; shift
        export GIT_AUTHOR_DATE="2021-01-${day}T13:00:00Z" GIT_COMMITTER_DATE="2021-01-${day}T13:00:00Z"
        git -C "$work/tree" add --force -- "$@"
        git -C "$work/tree" commit --quiet --message "$message"
        day=$((day + 1))
    }
    git -C "$work/tree" -c init.defaultBranch=main init --quiet
    git -C "$work/tree" config core.autocrlf false
    record "Add the vendored dependencies" vendor third_party
    record "Add the libraries" staging
    record "Add the programs and their tests" cmd pkg plugin test
    record "Release $version" .
    git -C "$work/tree" tag --annotate "v$version" --message "Kubernetes $version"
    git clone --quiet --bare "$work/tree" "$work/bare"
    git -C "$work/bare" remote remove origin
    git -C "$work/bare" repack -a -d -q
    mv "$work/bare" "$out"
    say "kubernetes $version: $(git -C "$out" ls-tree -r HEAD | wc -l) files at $(git -C "$out" rev-parse --short HEAD)"
fi
echo "$out"
