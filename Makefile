# make demo        install, plan for a 16 GB card, train the demo and show what it learned
# make test        install, then everything that CI checks; with LATEST=1 on the newest releases but torch's
# make test-fast   the tests that neither train, compile nor need a GPU
# make check       lint, types and these: what to run before a commit
# make coverage    how much of planner/ the unit tests reach
# make gpu-test    install, then the tests that need an NVIDIA GPU of 8 GB or more; CI has none
# make cold-start  how long a cold `plan` takes
# demo, test and gpu-test set up all they need in .venv. PYTHON=python3.12 picks the interpreter (3.11 or newer).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-fast gpu-test check lint types coverage cold-start serve docs site wheel clean FORCE

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
  $$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv$(if $(LATEST),-latest)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# pip would compile 13,000 files, half of its time: a third of them are ever imported, and compiled then.
INSTALL := $(PIP) install --quiet --no-compile
# What is installed: the locked releases, or the newest beside the torch that the formulas are proven with.
LOCK := $(if $(LATEST),$(VENV)/torch.txt,constraints.txt)
# Without an NVIDIA driver CUDA's torch is of no use: the demo then takes what the tests take.
CONSTRAINTS ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo constraints.txt)
# Three workers on two cores, since tests of processes wait; each with one thread: torch's own would fight over them.
WORKERS ?= 3
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS)
# The tests start many processes: what one has compiled the next need not.
export PYTHONDONTWRITEBYTECODE :=

demo: $(VENV)/.demo
	$(BIN)/plan --model qwen2.5-14b --gpu 16GB
	$(BIN)/vramwise demo

# Each of lint and types takes one core.
test: $(VENV)/.dev
	$(if $(LATEST),,$(MAKE) --no-print-directory --output-sync --jobs=2 lint types)
	$(PYTEST) --durations=20

test-fast:
	$(PYTEST) -m "not slow and not gpu"

gpu-test: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu -rs tests/gpu

check: lint types test-fast

# Tracing makes the planner's code three times as slow, so this stands beside the tests. Branches cost no more
# than lines in coverage's C tracer; the cheaper sys.monitoring, which it takes by itself from Python 3.14 on,
# knows no branches before.
coverage:
	$(PYTEST) -m "not slow" --cov --cov-report=term:skip-covered tests/unit

cold-start:
	$(BIN)/python -m benchmarks.cold_start

lint:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types:
	$(BIN)/mypy

serve: $(VENV)/.demo
	$(BIN)/vramwise tui

# Rewrites docs/commands.md, docs/knobs.md and the outputs in README.md from what the commands print.
docs:
	$(BIN)/python -m tests.write_docs

# The documentation as pages, in site/; a link that leads nowhere fails.
site: $(VENV)/.dev
	$(BIN)/zensical build --strict --clean

wheel: $(VENV)/.dev
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf .venv .venv-latest build dist site .cache

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "vramwise needs Python 3.11 or newer (with venv)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --upgrade pip

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) --editable ".[train]"
	touch $@

$(VENV)/.dev: pyproject.toml $(LOCK) $(if $(LATEST),FORCE) | $(VENV)/bin/python
	$(INSTALL) $(if $(LATEST),--upgrade --upgrade-strategy eager) \
	  -c $(LOCK) --build-constraint constraints.txt --editable ".[train,web,prices]" --group dev
	touch $@

.venv-latest/torch.txt: constraints.txt | .venv-latest/bin/python
	grep '^torch==' constraints.txt > $@
