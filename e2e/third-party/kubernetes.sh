#!/usr/bin/env bash
# Builds the Kubernetes server programs from Debian's source package (complete and vendored) into the cache folder,
# once per machine, and prints the folder that holds them. Five minutes on two cores.
source "$(dirname "$0")/lib.sh"

version=1.20.2
out="$AETHER_CACHE/kubernetes-$version/bin"
source="$AETHER_CACHE/kubernetes-$version/source"
programs=(kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy)

exec 9>"$AETHER_CACHE/kubernetes.lock"
flock 9
if [ ! -e "$out/.complete" ]; then
    need_packages golang-go rsync gcc libc6-dev golang-github-modern-go-reflect2-dev
    say "kubernetes $version: fetching the source"
    mkdir -p "$out"
    [ -e "$source/.unpacked" ] || { debian_source kubernetes "$source"; touch "$source/.unpacked"; }

    # The vendored reflect2 reads runtime internals that moved before this Go; Debian's package follows them.
    reflect2="$source/vendor/github.com/modern-go/reflect2"
    find "$reflect2" -maxdepth 1 -name '*.go' -delete
    find "$reflect2" -maxdepth 1 -name '*.s' -delete
    cp /usr/share/gocode/src/github.com/modern-go/reflect2/*.go /usr/share/gocode/src/github.com/modern-go/reflect2/*.s "$reflect2/"

    say "kubernetes $version: building ${programs[*]} (about five minutes)"
    log="$AETHER_CACHE/kubernetes-$version/build.log"
    (cd "$source" && env -u GOFLAGS GO111MODULE=off CGO_ENABLED=0 KUBE_GIT_VERSION="v$version" KUBE_GIT_TREE_STATE=clean \
        KUBE_GIT_COMMIT=debian make WHAT="${programs[*]/#/cmd/}" >"$log" 2>&1) ||
        { tail -30 "$log" >&2; say "the build failed; its log is $log"; exit 1; }
    for program in "${programs[@]}"; do
        install -m 0755 "$source/_output/bin/$program" "$out/$program"
    done
    rm -rf "$source/_output"
    # The program of a pod's sandbox, static, for an image that holds nothing else.
    gcc -Os -Wall -static -DVERSION="v3.2" -o "$out/pause" "$source/build/pause/linux/pause.c"
    touch "$out/.complete"
    say "kubernetes $version: built"
fi
echo "$out"
