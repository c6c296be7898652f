#!/usr/bin/env bash
# Makes a root file system for images of the test cluster, as an uncompressed tar in the cache folder, and prints its path:
# `base-image.sh` the one that all images of the product share, `base-image.sh developer` one of a developer's pod, with node,
# cargo, and in /opt what it takes to run `npm ci` and `cargo build` of real packages without a network.
# The name carries a hash of what it is made from, so that a change of a list below makes a new one.
source "$(dirname "$0")/lib.sh"

here=$(cd "$(dirname "$0")" && pwd)
kind=${1:-base}
include=ca-certificates,git,git-lfs,openssh-client,btrfs-progs,mount,procps,python3
npm=10.9.2
made_from=("$0")
case $kind in
base) ;;
developer)
    include=$include,cargo,gcc,libc6-dev,nodejs,rustc
    made_from+=("$here"/npm-tree/* "$here"/cargo-tree/Cargo.* "$here"/cargo-tree/src/*)
    ;;
*) say "usage: base-image.sh [developer]"; exit 2 ;;
esac
out="$AETHER_CACHE/$kind-image-$(cat "${made_from[@]}" | sha256sum | cut -c1-16).tar"

# Fills folder $1 with what a developer's image has in /opt.
developer_files() {
    command -v npm >/dev/null || need_packages nodejs npm
    (cd "$1" && npm pack --silent "npm@$npm" >/dev/null && tar -xzf "npm-$npm.tgz" && rm "npm-$npm.tgz" && mv package npm)
    cp -r "$here/npm-tree" "$1/npm-tree"
    fill_npm_cache "$1/npm-cache"
    cp -r "$here/cargo-tree" "$1/cargo-tree"
    mkdir "$1/cargo-tree/.cargo"
    (cd "$1/cargo-tree" && cargo vendor --locked --versioned-dirs >.cargo/config.toml 2>>"$log")
}

exec 9>"$AETHER_CACHE/$kind-image.lock"
flock 9
if [ ! -e "$out" ]; then
    need_packages mmdebstrap
    sources=$(debian_sources)
    say "$kind image: Debian with $include (about a minute)"
    log="$AETHER_CACHE/$kind-image.log"
    trim=(--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*'
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*'
        --dpkgopt='path-exclude=/usr/share/i18n/*' --aptopt='Apt::Install-Recommends "false"')
    # Users for agents' pods, and for importers: ssh refuses to work for a uid that has no name.
    finish='echo "agent:x:1000:1000:agent:/home/agent:/bin/bash" >>"$1/etc/passwd"
            echo "aether:x:65532:65532::/tmp:/usr/sbin/nologin" >>"$1/etc/passwd"
            echo "aether:x:65532:" >>"$1/etc/group"
            echo "agent:x:1000:" >>"$1/etc/group"
            mkdir -p "$1/home/agent" && chown 1000:1000 "$1/home/agent"
            rm -rf "$1"/var/cache/* "$1"/var/lib/apt/lists/* "$1"/var/log/* "$1"/boot'
    hooks=(--customize-hook="$finish")
    if [ "$kind" = developer ]; then
        work=$(mktemp -d "$AETHER_CACHE/developer-image.XXXXXX")
        trap 'rm -rf "$work"' EXIT
        developer_files "$work" || { tail -5 "$log" >&2; exit 1; }
        chmod -R a+rX "$work"
        hooks+=(--customize-hook="cp -r --no-preserve=ownership '$work/.' \"\$1/opt/\"")
    fi
    SOURCE_DATE_EPOCH=1700000000 mmdebstrap --mode=root --variant=minbase --format=tar --include="$include" "${trim[@]}" \
        "${hooks[@]}" bookworm "$out.part" "$sources" >"$log" 2>&1 ||
        { tail -20 "$log" >&2; say "mmdebstrap failed; its log is $log"; rm -f "$out.part"; exit 1; }
    mv "$out.part" "$out"
    find "$AETHER_CACHE" -maxdepth 1 -name "$kind-image-*.tar" ! -path "$out" -delete
fi
echo "$out"
