# `make help` lists what there is.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:

PYTHON ?= python3.11
# What `make env` installs. Without a CPU build of torch at hand: make env ENV_GROUPS="base ray dev"
ENV_GROUPS ?= base ray dev vllm

VENV := .venv
PY := $(VENV)/bin/python
BENCH_VENV := .venv-bench
BACKENDS_VENV := .venv-backends
LOCKS := $(ENV_GROUPS:%=requirements/%.txt)

# Stamps carry the hash of what they stand for, so that content decides, not a file's time.
digest = $(shell cat $(1) | sha256sum | cut -c1-16)
PACKAGES := $(VENV)/.packages-$(call digest,$(LOCKS))
PROJECT := $(VENV)/.project-$(call digest,pyproject.toml)
BENCH_PACKAGES := $(BENCH_VENV)/.packages-$(call digest,requirements/bench.txt)
BACKENDS_PACKAGES := $(BACKENDS_VENV)/.packages-$(call digest,requirements/backends.txt)

# The files are complete, hence --no-deps (which also keeps the CUDA packages out that vLLM would bring);
# flock, because two shells may say `make env` at once.
pip_install = flock $(1) $(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps

.PHONY: help env env-bench env-backends system-packages lock demo test slow escapes chaos backends hosts lint format types layers bench clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: system-packages $(PACKAGES) $(PROJECT) ## .venv with everything tests and demo need, and ray-guard in it

system-packages:
	@scripts/system-packages

$(PACKAGES):
	$(PYTHON) -m venv $(VENV)
	$(call pip_install,$(VENV)) --require-hashes $(LOCKS:%=-r %)
	rm -f $(VENV)/.packages-* && touch $@

# The build backend comes from requirements/dev.txt: nothing is fetched to build with.
$(PROJECT): $(PACKAGES)
	$(call pip_install,$(VENV)) --no-build-isolation --editable .
	$(PY) -m compileall -q ray_guard # as pip does for what it copies: a cold start loads a hundred modules
	rm -f $(VENV)/.project-* && touch $@

env-bench: env $(BENCH_PACKAGES) ## .venv-bench with the peers that are measured against

$(BENCH_PACKAGES):
	$(PYTHON) -m venv $(BENCH_VENV)
	$(call pip_install,$(BENCH_VENV)) --require-hashes -r requirements/bench.txt
	rm -f $(BENCH_VENV)/.packages-* && touch $@

env-backends: env $(BACKENDS_PACKAGES) ## .venv-backends with Phoenix (850 MB), which traces are sent to

$(BACKENDS_PACKAGES):
	$(PYTHON) -m venv $(BACKENDS_VENV)
	$(call pip_install,$(BACKENDS_VENV)) --require-hashes -r requirements/backends.txt
	rm -f $(BACKENDS_VENV)/.packages-* && touch $@

lock: ## resolve all versions anew into requirements/*.txt (ONLY=bench, ONLY=backends)
	# pip 23, which comes with Python 3.11, finds no solution for the peers' beta releases.
	folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; $(PYTHON) -m venv "$$folder"
	"$$folder"/bin/python -m pip install --quiet 'pip>=26'
	"$$folder"/bin/python requirements/lock.py $(ONLY)

demo: env ## the ROME incident, replayed and attributed (ARGS=--no-guard: what would have got out)
	$(PY) examples/rome_incident.py $(ARGS)

test: env ## all tests but the slow ones
	# Real processes on whatever machine: what misses its time under somebody else's load gets a second go, and
	# the report says so (RERUN). No attack does.
	scripts/system-packages firewall || true  # the test that wants them says what is missing
	$(PY) -m pytest -m "not slow" --reruns 1 -raR

slow: env ## the slow tests
	$(PY) -m pytest -m slow

escapes: env ## every way out, here and in other sandboxes; the table goes to docs/escapes.md
	scripts/system-packages peers || true  # a column of the table says what is not installed
	$(MAKE) env-bench || true
	$(PY) -m pytest tests/escapes --peers --table docs/escapes.md

chaos: env ## what breaks around a job, and what is lost of it (root); the table goes to docs/chaos.md
	$(PY) -m pytest tests/chaos --faults docs/chaos.md

backends: env-backends ## jobs that send their traces to real backends, which die meanwhile
	$(PY) -m pytest tests/backends

hosts: env ## the suites that meet the kernel on every simulated host, and as an ordinary user (root; half an hour)
	$(PY) tests/hosts/everywhere.py $(HOSTS)

lint: env ## ruff: rules and format
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

format: env ## let ruff repair what it can
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

types: env ## mypy, strict
	$(VENV)/bin/mypy

layers: env ## who may import whom
	$(VENV)/bin/lint-imports

bench: env-bench ## measurements, beside the peers
	for script in $(filter-out benchmarks/harness.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(PY) "$$script"; done

clean: ## caches and outputs
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist out
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## the environments too
	rm -rf $(VENV) $(BENCH_VENV) $(BACKENDS_VENV)
