# `make demo` and `make test` do all their set-up themselves; it is quick when nothing has changed.
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench devcluster clean

PYTHON ?= python3
BIN := .venv/bin
APT_PACKAGES := g++ python3-dev pkg-config libopencv-dev libturbojpeg0-dev dataset-fashion-mnist \
	slurm-wlm slurmdbd munge mariadb-server chromium
SETUP := .venv/.setup-done

help:
	@echo "make demo    the whole chain on Fashion-MNIST, ending in a table of results"
	@echo "make test    lint, types and all tests"
	@echo "make bench   our speed beside the plain way, as ratios"
	@echo "make devcluster  a Slurm of four nodes on this machine, to rehearse job chains on"
	@echo "make setup   system packages, .venv and pinned Python packages; the others call it"

setup: $(SETUP)

$(SETUP): constraints.txt pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	@missing=$$(for package in $(APT_PACKAGES); do dpkg -s $$package >/dev/null 2>&1 || echo $$package; done; \
	  $(PYTHON) -c 'import ensurepip' 2>/dev/null || echo python3-venv); \
	if [ -n "$$missing" ]; then \
	  echo "installing system packages:" $$missing; \
	  sudo=$$([ $$(id -u) = 0 ] || echo sudo); \
	  $$sudo apt-get update -q && $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $$missing; \
	fi
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/gowide encode fashion-mnist --out data/fashion-mnist
	$(BIN)/gowide run jobs/demo.yaml

test: setup lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

devcluster: setup
	slurm/devcluster/cluster.sh up

bench: setup
	$(BIN)/gowide encode fashion-mnist --out data/fashion-mnist
	$(BIN)/python -m tests.bench jobs/fashion_mnist_basic.yaml

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
