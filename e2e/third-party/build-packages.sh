#!/usr/bin/env bash
# Installs what a build of the workspace needs from Debian: a C++ compiler and libclang for RocksDB, OpenSSL for composefs.
source "$(dirname "$0")/lib.sh"
need_packages build-essential clang libclang-dev pkg-config libssl-dev git
