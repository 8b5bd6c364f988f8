# make demo       install, plan for a 16 GB card, train the demo and show what it learned
# make test       install, then everything that CI checks
# make gpu-test   install, then the tests that need an NVIDIA GPU of 8 GB or more; CI has none
# Each sets up all it needs in .venv. PYTHON=python3.12 picks the interpreter (3.11 or newer).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test gpu-test check lint types serve docs wheel clean

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
  $$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Without an NVIDIA driver CUDA's torch is of no use: the demo then takes the tests' torch.
CONSTRAINTS ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo constraints.txt)
# Two workers on two cores, each with one thread: torch's own threads would fight over them.
WORKERS ?= 2

demo: $(VENV)/.demo
	$(BIN)/plan --model qwen2.5-14b --gpu 16GB
	$(BIN)/vramwise demo

test: $(VENV)/.dev check

gpu-test: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu -rs tests/gpu

check: lint types
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term:skip-covered

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

wheel: $(VENV)/.dev
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf $(VENV) build dist

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "vramwise needs Python 3.11 or newer (with venv)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "pip>=25.1"

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(if $(CONSTRAINTS),$(PIP) install --quiet -r $(CONSTRAINTS))
	$(PIP) install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) --editable ".[train]"
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet -r constraints.txt
	$(PIP) install --quiet -c constraints.txt --editable ".[train]" --group dev
	touch $@
