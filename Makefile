# `make run` and `make test` do all set-up themselves; the rest is for developers. `make help` lists everything.
SHELL := /bin/bash
PYTHON ?= python3
PORT ?= 8000
DURATION ?= 30m
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The real programs that the tests use as clients, backends and peers.
PACKAGES := bind9-dnsutils busybox-static curl dnsmasq-base haproxy libnginx-mod-stream netcat-openbsd nginx-light \
	openssh-client openssh-server podman \
	redis-server redis-tools runc socat systemd wrk

.PHONY: help run test lint format bench soak clean setup packages

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 20

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Dormant needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Name another one: make PYTHON=python3.12"; exit 1; }
	@echo "setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

setup: $(READY) ## make .venv with everything that Python needs

packages: ## install the Debian packages that the tests use (as root; otherwise say what is missing)
	@missing=""; for package in $(PACKAGES); do dpkg -s $$package >/dev/null 2>&1 || missing="$$missing $$package"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing$$missing"; \
		export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1; \
		{ apt-get update -qq && apt-get install -qq -y --no-install-recommends $$missing; } >/dev/null \
			|| echo "could not install all of:$$missing; the tests that need them are skipped"; \
	else \
		echo "not installed, the tests that need them are skipped:$$missing"; \
	fi

run: $(READY) ## run the quickstart in the foreground: three sleeping services on PORT, PORT+1 and PORT+2
	@PATH="$(CURDIR)/$(BIN):$$PATH" PORT=$(PORT) config/quickstart/run.sh

test: $(READY) packages ## install what is missing, check the code, run all tests
	@$(BIN)/python -m pytest $(ARGS)

lint: $(READY) ## ruff, mypy and import-linter alone
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

format: $(READY) ## format the code
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

bench: $(READY) packages ## measure beside the peers: everything, or ARGS="--short", ARGS="--only relay.new,cold", ARGS=--help
	@$(BIN)/python -m tests.bench $(ARGS)

soak: $(READY) ## a mixed load with reloads, upgrades and killed workers for DURATION (30m): nothing may fail or grow
	@$(BIN)/python -m tests.soak --duration $(DURATION) $(ARGS)

clean: ## remove what was made here
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
