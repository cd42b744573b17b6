PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
# Files whole, in the order of tests/conftest.py.
ORDER := --dist loadfile --no-loadscope-reorder
ALONE := tests/bench tests/formats/onnx/runtimes

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick lint format docs clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(STAMP) ## make the virtual environment and install everything pinned

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "compress needs Python 3.11 or newer; name one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip check
	@# pip compiles on one core, and packages' own tests too. A file for another version of Python is left as it is.
	$(BIN)/python -W ignore -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib || true
	@touch $@

demo: $(STAMP) ## run the quickstart recipe on real data and show its report
	$(BIN)/compress run recipes/quickstart.yaml

test: $(STAMP) ## run every test, those on real models too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not alone" -n $(WORKERS) $(ORDER)
	$(BIN)/python -m pytest -m alone $(ALONE)

test-quick: $(STAMP) ## run the tests that need no download and no browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not browser and not alone" -n $(WORKERS) $(ORDER)
	$(BIN)/python -m pytest -m "not slow and not browser and alone" $(ALONE)

lint: $(STAMP) ## check style, formatting, types and what imports what
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## put files into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## write docs/commands.md and docs/recipe.schema.json from the code
	$(BIN)/python docs/generate.py

clean: ## remove the virtual environment and caches (artifacts stay)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
