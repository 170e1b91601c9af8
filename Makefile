# The two commands of the README, and what keeps the house clean. `make help` lists them.
#
# Everything is installed into .venv from pinned versions (docker/constraints.txt), with your own pip
# settings. Without a GPU, torch's CPU build is smaller by gigabytes:
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make quickstart

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The first Python that is new enough; `make PYTHON=/path/to/python3 ...` chooses another.
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.14
PYTHON ?= $(firstword $(foreach p,$(CANDIDATES),$(shell \
	$(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := docker/constraints.txt

.PHONY: help quickstart test test-all lint format clean install-run install-test install-dev

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

quickstart: install-run ## fine-tune a small real model with and without TMKL (7 minutes on 2 cores)
	$(BIN)/moored compare recipes/quickstart/slurm-headers.yaml
	@echo "picture  runs/quickstart/report/frontier.png"
	@echo "page     runs/quickstart/report/report.html"
	@echo "MLflow   $(BIN)/mlflow ui --backend-store-uri sqlite:///$(CURDIR)/runs/mlflow.db"

# Two at a time: many wait more than they compute, for processes to start or for SLURM.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: install-test ## the tests, but for those marked long
	$(PYTEST) -m "not long" $(PYTEST_ARGS)

test-all: install-test ## all tests, with SLURM's faults, launchers and meshes
	$(PYTEST) $(PYTEST_ARGS)

lint: install-dev ## what CI checks besides the tests
	@failed=; for check in "ruff check ." "ruff format --check ." "pyright --project pyproject.toml" \
	    "lint-imports"; do echo "$$check"; $(BIN)/$$check || failed="$$failed, $$check"; done; \
	test -z "$$failed" || { echo "lint: failed: $${failed#, }" >&2; exit 1; }

format: install-dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf src/*.egg-info

install-run: $(VENV)/.installed-run
install-test: $(VENV)/.installed-test
install-dev: $(VENV)/.installed-dev

# One stamp per set of extras: `make quickstart` needs no linters. A stamp older than the versions or
# the metadata means installing again; a checkout that was moved needs a new .venv.
EXTRAS_run := [train]
EXTRAS_test := [test]
EXTRAS_dev := [dev]
PLACE := $(shell cat $(VENV)/.place 2>/dev/null || echo $(CURDIR))

ifneq ($(PLACE),$(CURDIR))
$(shell rm -f $(VENV)/.installed-*)
endif

$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { \
	    echo "make: Python 3.11 or newer is needed: install it, or name it (make PYTHON=...)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "make: $(PYTHON) cannot make a .venv: apt install python3-venv, or your system's like" >&2; exit 2; }
	@if test ! -x $(BIN)/python -o "$(PLACE)" != "$(CURDIR)"; then $(PYTHON) -m venv --clear $(VENV); fi
	@echo "installing into $(VENV) (a few minutes and 2 to 3 GB the first time)"
	$(BIN)/python -m pip install --disable-pip-version-check \
	    --constraint $(CONSTRAINTS) --editable '.$(EXTRAS_$*)' \
	    | sed -u '/^Requirement already satisfied/d'
	@echo "$(CURDIR)" > $(VENV)/.place
	@touch $@
