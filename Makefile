# make demo | test | lint; `make help` tells what each does.

PYTHON ?= python3.11
VENV := .venv
STAMP := $(VENV)/.installed
WORKERS ?= 2
CHECKED := vllm_compile relax_passes schedules targets runtime scripts examples
export OMP_NUM_THREADS ?= $(shell nproc)

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*  ## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

venv: $(STAMP)  ## virtual environment in .venv (PYTHON=python3.11)

demo: $(STAMP)  ## train, compile, serve a small Llama, compare it with Hugging Face (MODEL=DIR or hub id)
	@$(VENV)/bin/python examples/demo.py $(if $(MODEL),--model "$(MODEL)")

test: $(STAMP)  ## all tests, WORKERS=2 at a time
	@OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder -m "not timed"
	@$(VENV)/bin/python -m pytest -m timed $$(grep -rl 'mark\.timed' tests --include='test_*.py')

lint: $(STAMP)  ## ruff and mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy --explicit-package-bases $(CHECKED)

clean:  ## remove .venv, the demo's files and all caches
	rm -rf $(VENV) .demo build *.egg-info requirements/vllm/build requirements/vllm/*.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Whole only when the last line has run; a change of the lock or of pyproject.toml installs again.
# pip compiles modules on one core, for a minute; compileall does on all.  (Some are no modules of this Python.)
$(STAMP): requirements/cpu.lock requirements/vllm/pyproject.toml pyproject.toml
	@requirements/check.sh "$(PYTHON)"
	$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install --no-deps --no-compile -r requirements/cpu.lock || { echo "error: pip cannot install" \
	  "requirements/cpu.lock (its first lines tell where torch's build for CPUs comes from)" >&2; exit 1; }
	$(VENV)/bin/pip install --no-deps --no-build-isolation ./requirements/vllm -e .
	@$(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@
