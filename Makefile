# `make demo`, `make train` and `make test` do all their own set-up; they need python3.11 or newer and nothing else.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/demo
FIRST ?= runs/first
COMPILERS ?= .compilers
BIN := $(VENV)/bin

.PHONY: demo train test test-long test-faults test-package test-docs test-browser docs docs-serve compile-check step-check lint setup

demo: setup
	$(BIN)/python -m experiments.demo --out=$(FIRST)

train: setup
	$(BIN)/python -m experiments.train --stage=full --workdir=$(WORKDIR)

test: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# Tests that take a quarter of a minute and more each: about ten minutes. A file stays in one process, as its fixtures are shared.
test-long: setup
	$(BIN)/python -m pytest -q -m long -n 2 --dist loadfile --durations=0

# Several processes, kills, damaged checkpoints, a full disk: about half an hour.
test-faults: setup
	$(BIN)/python -m pytest -q -m "multiprocess or chaos" --durations=0

# Source and wheel, tried in an empty environment: two minutes.
test-package: setup
	$(BIN)/python -m pytest -q -m package

# Runs the commands that README.md and docs/ show, on a phantom: some minutes.
test-docs: $(VENV)/.installed-docs
	$(BIN)/python -m pytest -q -m docs --durations=0

# The documentation as a site, in build/docs; a link that leads nowhere is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# The local page in a headless browser: two minutes. Where npm cannot install one, the test is skipped and says why.
test-browser: setup
	-npm ci --prefix tests/browser --no-audit --no-fund
	$(BIN)/python -m pytest -q -m browser tests/browser

# Where the compilers cannot be installed, the check says what it skips and why.
compile-check: setup
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(COMPILERS) -r requirements-aot.txt
	$(BIN)/python -m kernels.tools.compile_check --wheels=$(COMPILERS) --libtpu=$(COMPILERS)

# The paper's largest training step for eight H100, where `compile-check` has found a compiler.
step-check: setup
	test ! -d $(COMPILERS)/jax_plugins || $(BIN)/python -m experiments.compile_check --target=8xh100 --crop_px=976 --grid=128 \
		--phases=joint --wheels=$(COMPILERS)

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright --level error

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python 3.11 or newer is needed, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-docs: requirements-docs.txt $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@
