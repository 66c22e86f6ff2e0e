# `make demo` and `make test` do all the set-up in .venv, from a fresh clone on.
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PYTEST := $(BIN)/python -m pytest
PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: help demo test test-all lint format docs notebooks clean

help:
	@echo "make demo      convert the embedded model, prove it right, name photographs"
	@echo "make test      run the short tests; make test-all runs all of them"
	@echo "make lint      check style and types; make format mends style"
	@echo "make docs      build the documentation into site/"
	@echo "make notebooks run the notebooks of the documentation and keep what they show"
	@echo "make clean     remove the environment and what was built"

demo: $(STAMPS)/demo
	$(BIN)/levit-flax demo

# Without optimizations XLA compiles in half the time, which dominates here. test-all compiles as users do.
test: $(STAMPS)/test
	JAX_DISABLE_MOST_OPTIMIZATIONS=true $(PYTEST) -m "not slow and not measurement and not network" $(PARALLEL)

# The measurements come last and alone.
test-all: $(STAMPS)/test
	($(PYTEST) -m "not measurement" $(PARALLEL) && $(PYTEST) -m measurement) | tee tests/last_full_run.txt; \
		test $${PIPESTATUS[0]} -eq 0

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMPS)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebooks: $(STAMPS)/test
	JAX_PLATFORMS=cpu $(BIN)/python tools/run_notebooks.py docs/notebooks/*.ipynb

clean:
	rm -rf $(VENV) build dist site *.egg-info

test-all: SHELL := /bin/bash

# A stamp is written only after its installation ended well, and anew when pyproject.toml changes.
$(STAMPS)/%: pyproject.toml $(STAMPS)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

$(STAMPS)/python:
	"$$(sh tools/newest_python.sh)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@mkdir -p $(STAMPS) && touch $@
