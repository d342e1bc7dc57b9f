# Each target first makes .venv with the pinned packages. On Windows, README.md has the plain pip lines.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process $(shell nproc 2>/dev/null || echo 1)
ARGS ?=

.PHONY: train bench test test-e2e ui lint format clean help

help:  ## show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1: /p' Makefile

train: $(VENV)/.installed  ## train configs/quickstart.toml; more options: make train ARGS="--resume --set run.steps=100"
	$(LAUNCH) train.py --config configs/quickstart.toml $(ARGS)

ui: $(VENV)/.installed-ui  ## the web UI on http://127.0.0.1:7860; other options: make ui ARGS="--port 7000"
	$(BIN)/lora-diffusion ui $(ARGS)

bench: $(VENV)/.installed  ## seconds per step and memory; beside other trainers: see docs/speed.md
	$(BIN)/python -m benchmarks.training $(ARGS)

test: $(VENV)/.installed-dev  ## run the CPU tests; a part of them: make test ARGS="tests/unit -k config"
	$(BIN)/python -m pytest -m "not browser and not slow" -n auto --maxprocesses 4 --dist worksteal $(ARGS)

test-e2e: $(VENV)/.installed-dev  ## run the tests that take long or need a browser (Debian's chromium)
	$(BIN)/python -m pytest -m "browser or slow" $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed-dev  ## put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and caches; runs and samples stay
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build *.egg-info

$(VENV)/.installed: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.installed-ui: $(VENV)/.installed
	$(INSTALL) -e '.[ui]'
	@touch $@

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Python 3.11 or newer is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	         "If you have another one: make train PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "'$(PYTHON)' cannot make virtual environments. On Debian or Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
