#!/usr/bin/env bash
# Makes the root file system that all images of the test cluster share, as an uncompressed tar in the cache folder, and
# prints its path. The name carries a hash of this script, so that a change of the list below makes a new one.
source "$(dirname "$0")/lib.sh"

include=ca-certificates,git,git-lfs,openssh-client,btrfs-progs,mount,procps,python3
out="$AETHER_CACHE/base-image-$(sha256sum "$0" | cut -c1-16).tar"

exec 9>"$AETHER_CACHE/base-image.lock"
flock 9
if [ ! -e "$out" ]; then
    need_packages mmdebstrap
    sources=$(debian_sources)
    say "base image: Debian with $include (about a minute)"
    log="$AETHER_CACHE/base-image.log"
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
    SOURCE_DATE_EPOCH=1700000000 mmdebstrap --mode=root --variant=minbase --format=tar --include="$include" "${trim[@]}" \
        --customize-hook="$finish" bookworm "$out.part" "$sources" >"$log" 2>&1 ||
        { tail -20 "$log" >&2; say "mmdebstrap failed; its log is $log"; rm -f "$out.part"; exit 1; }
    mv "$out.part" "$out"
    find "$AETHER_CACHE" -maxdepth 1 -name 'base-image-*.tar' ! -path "$out" -delete
fi
echo "$out"
