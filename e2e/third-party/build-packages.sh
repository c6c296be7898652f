#!/usr/bin/env bash
# Installs what a build of the workspace and its quick tests need from Debian: a C++ compiler and libclang for RocksDB,
# OpenSSL for composefs; Git LFS and an ssh server for what the importer is tested against, etcd for a real API server.
source "$(dirname "$0")/lib.sh"
need_packages build-essential clang libclang-dev pkg-config libssl-dev git \
    git-lfs openssh-client openssh-server etcd-server
