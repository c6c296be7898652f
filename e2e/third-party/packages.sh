#!/usr/bin/env bash
# Installs the Debian packages that the test cluster runs: etcd, the container runtime, CNI plugins and network tools.
source "$(dirname "$0")/lib.sh"

need_packages etcd-server containerd runc containernetworking-plugins iptables conntrack iproute2 \
    mmdebstrap btrfs-progs util-linux git unzip gcc libc6-dev
