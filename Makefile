# `make demo` and `make test` do all their set-up themselves; it is quick when nothing has changed.
.DEFAULT_GOAL := help
.PHONY: help setup setup-test demo test lint bench devcluster container clean

PYTHON ?= python3
BIN := .venv/bin
TRAINING := g++ python3-dev pkg-config libopencv-imgproc-dev libturbojpeg0-dev libgl1 libglib2.0-0 dataset-fashion-mnist
TESTS := slurm-wlm slurmdbd munge mariadb-server chromium

help:
	@echo "make demo    the whole chain on Fashion-MNIST, ending in a table of results"
	@echo "make test    lint, types and all tests"
	@echo "make bench   our speed beside the plain way, as ratios"
	@echo "make devcluster  a Slurm of four nodes on this machine, to rehearse job chains on"
	@echo "make container  gowide.sqsh, an image for Apptainer and enroot"
	@echo "make setup   what training needs: system packages, .venv and pinned Python packages; the others call it"
	@echo "make setup-test  and what the tests need: Slurm, its database, a browser, linters"

setup: .venv/.training
setup-test: .venv/.tests

# $(call packages,NAMES): install those of Debian's packages that are missing, and say so before.
define packages
@missing=$$(for package in $(1); do dpkg -s $$package >/dev/null 2>&1 || echo $$package; done; \
  $(PYTHON) -c 'import ensurepip' 2>/dev/null || echo python3-venv); \
if [ -n "$$missing" ]; then \
  echo "installing system packages:" $$missing; \
  sudo=$$([ $$(id -u) = 0 ] || echo sudo); \
  $$sudo apt-get update -q && $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $$missing; \
fi
endef

# ffcv's build wants all of OpenCV and calls its resize alone. Debian's libopencv-dev would bring 300 packages, VTK and Qt
# among them; these two files let core and imgproc do.
.venv/opencv/opencv4.pc: Makefile
	@mkdir -p .venv/opencv/opencv2
	@printf '#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' > .venv/opencv/opencv2/opencv.hpp
	@printf 'Name: opencv4\nDescription: core and imgproc\nVersion: 4\nLibs: -lopencv_core -lopencv_imgproc\n' > $@

.venv/.training: constraints.txt pyproject.toml Makefile .venv/opencv/opencv4.pc
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(call packages,$(TRAINING))
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	@echo "installing the pinned Python packages that training needs into .venv"
	@PKG_CONFIG_PATH="$(CURDIR)/.venv/opencv" CPATH="$(CURDIR)/.venv/opencv:/usr/include/opencv4" $(BIN)/pip install --quiet --disable-pip-version-check --use-pep517 -c constraints.txt -e .
	@touch $@

.venv/.tests: .venv/.training
	$(call packages,$(TESTS))
	@echo "installing the pinned Python packages of the tests into .venv"
	@$(BIN)/pip install --quiet --disable-pip-version-check --use-pep517 -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/gowide encode fashion-mnist --out data/fashion-mnist
	$(BIN)/gowide run jobs/demo.yaml
	@echo "Next: open runs/demo/report/report.html; run it again (all is found done); your own images: docs/photos.md"

test: setup-test lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

devcluster: setup-test
	slurm/devcluster/cluster.sh up

container:
	slurm/container/build.sh gowide.sqsh

bench: setup-test
	$(BIN)/gowide encode fashion-mnist --out data/fashion-mnist
	$(BIN)/python -m tests.bench jobs/fashion_mnist_basic.yaml

lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
