# The doors. Continuous integration opens the same ones (.ci/run).
#
#   make run     fetch the demo model, build, start a cluster of two workers, ask it one question, serve until Ctrl-C
#   make smoke   the same, but end after the answer
#   make test    everything that must hold: format, lints, tests of all parts and of the whole system, docs
#   make check   make test, and cargo-deny where it is installed
#   make bench   speed of kernels, links and models beside this machine's ceilings; about ten minutes
#   make gpu-test, make gpu-bench   the CUDA backend's tests, and its speed, on an NVIDIA card; they say so where none is
#
# Needed: a Rust toolchain, Python 3 with pip, a C and a C++ compiler (the second for tests only, which run CUDA kernels by
# emulation), and the network for what is fetched once into .cache/.

SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
EVENER := $(TARGET)/release/evener
MODEL := .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
SDK_PYTHON := $(CURDIR)/.cache/sdk/python
QUESTION := What is the capital of France? Answer in one sentence.
# Compiled kernels of tests are kept here.
export EVENER_CACHE ?= $(CURDIR)/.cache/evener
# The card of gpu-test and gpu-bench.
CARD ?= 0
# Options of `evener up` to add, such as ARGS="--shares 2:1 --listen 127.0.0.1:9090".
ARGS ?=

.PHONY: run smoke test check bench gpu-test gpu-bench deny model etcd sdk nvrtc release fmt lint unit docs clean help

help:
	@sed -n 's/^#   //p' Makefile

model:
	@$(PYTHON) scripts/fetch-model

etcd:
	@scripts/fetch-etcd

sdk:
	@scripts/sdk-env

# Without it kernels are not compiled for cards, and the test says so; nothing else needs it.
nvrtc:
	@scripts/fetch-nvrtc >/dev/null || true

release:
	$(CARGO) build --release -p evener

run: model release
	$(EVENER) up --model $(MODEL) --workers 2 --ask "$(QUESTION)" $(ARGS)

smoke: model release
	$(EVENER) up --model $(MODEL) --workers 2 --listen 127.0.0.1:0 --ask "$(QUESTION)" \
	    --exit-after-answer $(ARGS) | tee .cache/smoke.txt
	@grep -q Paris .cache/smoke.txt || { echo "the answer does not name Paris" >&2; exit 1; }

fmt:
	$(CARGO) fmt --all --check

lint:
	$(CARGO) clippy --workspace --all-targets -- -D warnings

# One build serves unit, integration and system tests: the system tests start the binary that this build leaves in the
# target directory.
unit: model etcd sdk nvrtc
	if $(CARGO) nextest --version >/dev/null 2>&1; then \
	    EVENER_SDK_PYTHON=$(SDK_PYTHON) $(CARGO) nextest run --workspace --no-fail-fast; \
	    $(CARGO) test --workspace --doc; \
	else \
	    EVENER_SDK_PYTHON=$(SDK_PYTHON) $(CARGO) test --workspace --no-fail-fast; \
	fi

docs:
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps

test: fmt lint docs unit

check: test deny

deny:
	@if $(CARGO) deny --version >/dev/null 2>&1; then \
	    $(CARGO) deny check; \
	else \
	    echo "cargo-deny is not installed, so advisories and bans were not checked;" \
	        "licences and sources are checked by tests/tests/licences.rs in any case"; \
	fi

bench: model release
	$(EVENER) bench --model $(MODEL) --synthetic llama-1b --format q4_0,q4_k_m,q8_0,bf16 --kernels \
	    --svg $(dir $(EVENER))roofline.svg $(ARGS)

gpu-test: model release
	$(CARGO) test -p evener-worker --test backends --test mixtral --test cuda --no-run
	@$(EVENER) doctor --device cuda:$(CARD) || { echo "make gpu-test needs an NVIDIA card; nothing was run" >&2; exit 1; }
	EVENER_TEST_CARD=$(CARD) $(CARGO) test -p evener-worker --test backends --test mixtral --test cuda -- --test-threads 1
	@if command -v compute-sanitizer >/dev/null; then \
	    EVENER_TEST_CARD=$(CARD) compute-sanitizer --error-exitcode 1 --target-processes all \
	        $(CARGO) test -p evener-worker --test cuda -- --test-threads 1; \
	else \
	    echo "compute-sanitizer is not installed, so memory accesses on the card were not checked"; \
	fi

gpu-bench: release
	$(CARGO) build --release -p evener-worker --example cuda
	@$(EVENER) doctor --device cuda:$(CARD) || { echo "make gpu-bench needs an NVIDIA card; nothing was run" >&2; exit 1; }
	$(TARGET)/release/examples/cuda --card $(CARD) $(ARGS)
	@CUDA_VISIBLE_DEVICES=$(CARD) $(PYTHON) scripts/bench-torch --compile || [ $$? = 2 ]

clean:
	$(CARGO) clean
	rm -rf .cache
