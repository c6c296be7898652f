# Shared by the scripts of this folder: where built third-party programs are kept, and how Debian's packages are had.
# Sourced, never run.
set -euo pipefail

# One folder per machine, outside the checkout, so that a second clone builds nothing twice.
AETHER_CACHE="${AETHER_CACHE:-$HOME/.cache/aether}"
mkdir -p "$AETHER_CACHE"

say() { printf '%s  %s\n' "$(date +%H:%M:%S)" "$*" >&2; }

# Installs the named Debian packages that are missing; silent and fast when there are none.
need_packages() {
    local package missing=()
    for package in "$@"; do
        dpkg-query -W -f='${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt_update_once
    # In a subshell, so that the trap is its own.
    (
        no_services
        apt-get install -y --no-install-recommends -o Dpkg::Options::=--force-confold -o DPkg::Lock::Timeout=300 \
            -o Dpkg::Use-Pty=0 -o APT::Update::Error-Mode=any "${missing[@]}" >"$AETHER_CACHE/apt.log" 2>&1
    ) ||
        { tail -20 "$AETHER_CACHE/apt.log" >&2; say "apt-get install failed; the whole log is $AETHER_CACHE/apt.log"; return 1; }
}

# Daemons of a package (etcd, containerd) are never wanted as services of this machine: we start our own. Until the shell
# that calls this ends, a policy (invoke-rc.d(8)) forbids to start any; a policy that is there already stays as it is.
no_services() {
    local policy=/usr/sbin/policy-rc.d
    [ ! -e "$policy" ] && [ ! -L "$policy" ] || return 0
    trap "rm -f $policy" EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
}

# The file in which this machine says where Debian's packages come from.
debian_sources() {
    local file
    for file in /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list; do
        [ -s "$file" ] && { echo "$file"; return 0; }
    done
    say "found neither /etc/apt/sources.list.d/debian.sources nor /etc/apt/sources.list: where do Debian's packages come from?"
    return 1
}

# The lists are read again at most once an hour.
apt_update_once() {
    [ -n "$(find /var/lib/apt/lists -maxdepth 0 -mmin -60 2>/dev/null)" ] && [ -n "$(ls /var/lib/apt/lists/*Packages* 2>/dev/null)" ] && return 0
    apt-get update -o DPkg::Lock::Timeout=300 >"$AETHER_CACHE/apt-update.log" 2>&1 ||
        { tail -5 "$AETHER_CACHE/apt-update.log" >&2; return 1; }
}

# Downloads a Debian source package ($1) and unpacks it as folder $2. The sources are added for this one call,
# from the machine's own mirror, so that nothing of the machine's apt configuration changes.
debian_source() {
    local package=$1 into=$2 work
    need_packages dpkg-dev
    work=$(mktemp -d "$AETHER_CACHE/source.XXXXXX")
    mkdir -p "$work/parts" "$work/lists/partial"
    local sources
    sources=$(debian_sources)
    case $sources in
    *.sources) sed 's/^Types:.*/Types: deb-src/' "$sources" >"$work/parts/src.sources" ;;
    *) sed -n 's/^deb[[:space:]]/deb-src /p' "$sources" >"$work/parts/src.list" ;;
    esac
    local options=(-o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$work/parts" -o "Dir::State::lists=$work/lists" -o APT::Sandbox::User=root)
    apt-get "${options[@]}" update >"$work/log" 2>&1 || { tail -5 "$work/log" >&2; return 1; }
    (cd "$work" && apt-get "${options[@]}" source "$package" >>"$work/log" 2>&1) || { tail -5 "$work/log" >&2; return 1; }
    rm -rf "$into"
    mv "$(find "$work" -maxdepth 1 -type d -name "$package-*" | head -1)" "$into"
    rm -rf "$work"
}

# Installs the packages of `npm-tree/` once, so that folder $1 becomes an npm cache from which they install without a network.
fill_npm_cache() {
    local cache=$1 work
    command -v npm >/dev/null || need_packages nodejs npm
    work=$(mktemp -d "$AETHER_CACHE/npm-tree.XXXXXX")
    cp -r "$(dirname "${BASH_SOURCE[0]}")/npm-tree/." "$work"
    (cd "$work" && npm ci --cache "$cache" --ignore-scripts --no-audit --no-fund --silent >"$work/npm.log" 2>&1) ||
        { tail -5 "$work/npm.log" >&2; rm -rf "$work"; say "npm could not fill its cache"; return 1; }
    rm -rf "$work"
}
