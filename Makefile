# Two targets matter to a newcomer: `make demo` and `make test`.
# Everything a target needs it installs or builds itself; built things are kept in $(AETHER_CACHE), outside the checkout.

export AETHER_CACHE ?= $(HOME)/.cache/aether
export CARGO_TARGET_DIR ?= $(AETHER_CACHE)/target

# RocksDB's C++ is compiled once per machine and version, by `make prepare`.
export ROCKSDB_LIB_DIR ?= $(AETHER_CACHE)/rocksdb-$(shell sed -n '/^name = "librocksdb-sys"$$/{n;s/version = "\(.*\)"/\1/p}' Cargo.lock)
export ROCKSDB_STATIC := 1

CARGO := cargo
CLUSTER_TOOL := $(CARGO_TARGET_DIR)/debug/aether-cluster

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list.
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: prepare
prepare: ## Install the packages that a build needs.
	@e2e/third-party/build-packages.sh
	@e2e/third-party/rocksdb.sh >/dev/null

.PHONY: build
build: prepare ## Build every binary.
	$(CARGO) build --workspace --bins --locked
	@# Commands run in any image, so the worker is linked statically; naming the target keeps the flag from build scripts.
	RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --locked --package aether-worker --target x86_64-unknown-linux-gnu

.PHONY: generate
generate: prepare ## Write crds/, the chart's copy and docs/reference.md from crates/api.
	$(CARGO) run --quiet --locked -p aether-api --bin aether-generate

.PHONY: check
check: prepare ## The quick half: format, lints, generated files, unit and property tests without mounts. Needs root only to install packages.
	e2e/run-tests.sh checks
	e2e/run-tests.sh unit

.PHONY: test
test: prepare ## Everything: check, real mounts, the real two-node cluster. Needs root.
	e2e/run-tests.sh all

.PHONY: fuzz
fuzz: prepare ## Fuzz the decoders for long: FUZZ=name for one, FUZZ_SECONDS=60 each. A short run is part of `make test`.
	@fuzz/run.sh

.PHONY: bench
bench: build ## Measure beside copy, git, overlays, XFS, btrfs, FUSE and JuiceFS. BENCH=case for some. Needs root.
	AETHER_BENCH_REPOSITORY=$$(e2e/third-party/kubernetes-repository.sh) \
	AETHER_BENCH_PEERS=$$(e2e/third-party/bench-peers.sh) $(CARGO_TARGET_DIR)/debug/aether-bench

.PHONY: bench-density
bench-density: build ## Mount 10,000 sessions on this machine and measure what each costs. Needs root.
	@e2e/third-party/packages.sh
	AETHER_BENCH_REPOSITORY=$$(e2e/third-party/kubernetes-repository.sh) \
	$(CARGO_TARGET_DIR)/debug/aether-bench --density

.PHONY: bench-kubelet
bench-kubelet: build ## What 10,000 mounts cost the real kubelet and containerd of a node, in processor time. Needs root.
	@trap '$(CLUSTER_TOOL) down' EXIT; $(CLUSTER_TOOL) up >/dev/null && $(CLUSTER_TOOL) node measure node-1

.PHONY: bench-store
bench-store: build ## Measure imports and the store beside git clone, copies and plain files. Needs root.
	@e2e/third-party/packages.sh
	AETHER_BENCH_REPOSITORY=$$(e2e/third-party/kubernetes-repository.sh) \
	$(CARGO_TARGET_DIR)/debug/aether-bench --store

.PHONY: demo
demo: build ## The whole story on a two-node cluster. KEEP=1 leaves it up, STEPS=a,b plays only some; CLUSTER=current plays on yours.
	$(CARGO_TARGET_DIR)/debug/aether-demo

.PHONY: cluster-up
cluster-up: build ## Start the two-node cluster with Aether installed, and print how to use it.
	$(CLUSTER_TOOL) up --install

.PHONY: cluster-down
cluster-down: ## End the cluster and everything of it.
	@if [ -x $(CLUSTER_TOOL) ]; then $(CLUSTER_TOOL) down; fi
