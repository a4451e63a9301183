# Everything a contributor runs. `make test` works on a fresh clone: it builds its own environment first.
#   make test PYTHON=python3.12 VENV=/tmp/cc      another interpreter, another place for the environment

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
ARGS ?=
SHARED ?= $(or $(CAUSAL_COMPRESS_SHARED),../shared)

BIN := $(VENV)/bin
STAMP := $(VENV)/.causal-compress-installed
CODE := causal_compress tests benchmarks examples
NOT_SLOW := not slow

.DEFAULT_GOAL := help
.PHONY: help setup fmt lint types test test-all demo bench check clean

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(STAMP) ## build the environment in $(VENV), once

# Only what the package needs can make the stamp stale; sources are used where they lie (editable install).
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

fmt: $(STAMP) ## format, and mend what ruff can mend
	$(BIN)/python -m ruff check --fix $(CODE)
	$(BIN)/python -m ruff format $(CODE)

lint: $(STAMP) ## style, names, complexity, docstrings
	$(BIN)/python -m ruff check $(CODE)
	$(BIN)/python -m ruff format --check $(CODE)

types: $(STAMP) ## mypy, strict
	$(BIN)/python -m mypy

test: lint types ## what CI runs: style, types, all tests but the slow ones
	$(BIN)/python -m pytest -m '$(NOT_SLOW)' $(ARGS)

test-all: lint types ## slow tests too
	$(BIN)/python -m pytest $(ARGS)

demo: $(STAMP) ## train a small network on digits, compress it, print table and path
	$(BIN)/causal-compress demo --out $(OUT)

bench: $(STAMP) ## measure the tables that need shared data only (ckatorch is installed for comparison), fill documents
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ckatorch
	$(BIN)/python $(SHARED)/data/get-data .cache/data
	$(BIN)/python benchmarks/cka_speed.py --checkpoint $(SHARED)/checkpoints/resnet56-4bfd9763.th --data .cache/data/cifar10.npz
	$(BIN)/python benchmarks/tables.py

check: test-all ## all tests, and whether documents show what the results say
	$(BIN)/python benchmarks/tables.py --check

clean: ## remove caches and the environment; run folders stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
