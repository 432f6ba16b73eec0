# What a developer needs, from a fresh clone: `make run`, `make test`. `make` alone tells the rest.
# Debian 12 with python3.11, python3.11-venv, make and git is enough, as root or as any user.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup run test check format lock docs bench faults clean environment

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# Each process of the tests has a PostgreSQL and a NATS server of its own.
JOBS ?= 4

# What is installed is right for one lock, one set of metadata and one directory (an environment
# cannot be moved); the stamp's name says for which.
KEY := $(shell { echo '$(CURDIR)'; cat requirements.lock setup.cfg pyproject.toml; } | sha256sum | cut -c1-16)
STAMP := $(VENV)/installed-$(KEY)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

help: ## Say what there is
	@echo 'make TARGET [ARGS="..."]'
	@sed -nE 's/^([a-z]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name what; do \
	    printf '  %-7s %s\n' "$$name" "$$what"; done

setup: $(STAMP) ## Make .venv with everything in it, unless it stands already
	@echo 'Ready: $(BIN)/glamd, $(BIN)/glamctl, $(BIN)/glam-terminal'

run: setup ## Run the daemon with all it needs embedded: glamd dev ARGS
	@exec $(BIN)/glamd dev $(ARGS)

test: check ## Check, then run the tests on all cores: pytest ARGS
	$(BIN)/pytest --numprocesses=auto --maxprocesses=$(JOBS) --dist=worksteal $(ARGS)

check: setup ## Lint, check the formatting, the types and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: setup ## Pin the newest versions that setup.cfg allows, by hash: pip-compile ARGS
	$(BIN)/pip-compile --quiet --upgrade --all-extras --generate-hashes --allow-unsafe --strip-extras \
	    --no-header --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-annotate \
	    --output-file requirements.lock $(ARGS) setup.cfg

docs: setup ## Write what the docs say of the code: docs/openapi.json, the matrix in docs/api.md
	$(BIN)/python -m glamd.http.openapi > docs/openapi.json
	$(BIN)/python -m glamd.http.matrix docs/api.md

bench: setup ## Measure what spec and README promise: python -m bench ARGS
	$(BIN)/python -m bench $(ARGS)

faults: setup ## Break things under load and check that nothing is lost: python -m tests.faults ARGS
	$(BIN)/python -m tests.faults $(ARGS)

clean: ## Remove .venv and every cache; the state of `glamd dev` stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP):
	@if [ -d $(VENV) ] && ! { $(BIN)/python -c '' && grep -qF '$(CURDIR)/$(BIN)/' $(BIN)/pip; } 2>/dev/null; then \
	    echo '==> $(VENV) is broken or was moved, making it anew'; rm -rf $(VENV); \
	fi
	@[ -d $(VENV) ] || $(MAKE) --no-print-directory environment
	@rm -f $(VENV)/installed-*
	@echo '==> installing the packages of requirements.lock (about half a minute)'
	@$(PIP) install --quiet --require-hashes --no-deps --requirement requirements.lock
	@echo '==> installing glamd itself, from this directory'
	@$(PIP) install -qq --no-deps --no-build-isolation --editable .
	@touch $@

# A venv module without ensurepip is what Debian ships when python3.11-venv is not installed.
environment:
	@if $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo '==> $(PYTHON) -m venv $(VENV)'; $(PYTHON) -m venv $(VENV); \
	elif command -v uv >/dev/null; then \
	    echo '==> uv venv $(VENV)'; uv venv --quiet --seed --python 3.11 $(VENV); \
	elif command -v virtualenv >/dev/null; then \
	    echo '==> virtualenv $(VENV)'; virtualenv --quiet --python $(PYTHON) $(VENV); \
	else \
	    echo 'Please install the Debian package python3.11-venv.' >&2; exit 1; \
	fi
