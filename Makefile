# All targets need only Python: they create .venv and install the packages that they use into it.
PYTHON ?= $$(sh tools/newest_python.sh)
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PYTEST := $(BIN)/python -m pytest
PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal
COVERAGE := # --cov measures coverage

.PHONY: help demo test test-all lint format docs notebooks clean

help:
	@echo "make demo      convert the embedded model, verify it against PyTorch's logits, classify photographs"
	@echo "make test      run the fast tests (three minutes on two cores); make test-all runs all tests"
	@echo "make lint      check style, types, imports and lengths; make format fixes the style"
	@echo "make docs      build the documentation into site/"
	@echo "make notebooks run the notebooks of the documentation and store their outputs"
	@echo "make clean     remove the environment and all build outputs"

demo: $(STAMPS)/demo
	$(BIN)/levit-flax demo

# Compilation dominates the fast tests, and XLA compiles twice as fast without optimizations. test-all uses the defaults.
test: $(STAMPS)/test
	JAX_DISABLE_MOST_OPTIMIZATIONS=true $(PYTEST) -m "not slow and not measurement and not network" $(PARALLEL) $(COVERAGE)

# Measurements need an idle machine, so they run last and one at a time.
test-all: $(STAMPS)/test
	$(PYTEST) -m "not measurement" $(PARALLEL)
	$(PYTEST) -m measurement

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_lengths.py levit_flax benchmarks tools tests

format: $(STAMPS)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebooks: $(STAMPS)/test
	JAX_PLATFORMS=cpu $(BIN)/python tools/run_notebooks.py docs/notebooks/*.ipynb

clean:
	rm -rf $(VENV) build dist site *.egg-info

# A stamp records that an extra is installed. If pyproject.toml changes, the extra is installed again.
$(STAMPS)/%: pyproject.toml $(STAMPS)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

$(STAMPS)/python:
	"$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@mkdir -p $(STAMPS) && touch $@
