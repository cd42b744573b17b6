PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MADE := $(VENV)/.made
CORE := $(VENV)/.core
EXTRAS := $(VENV)/.extras
STAMP := $(VENV)/.installed
# Written by `make requirements` from constraints.txt, with the SHA-256 of every file. apart.txt has what takes pip
# longest to unpack or to build, which `make --jobs=2 setup` does beside the core.
HASHED := .ci/requirements
REQUIRED := pyproject.toml $(wildcard $(HASHED)/*.txt)
WORKERS ?= 2
# Files whole, the longest first (tests/durations.json). A worker that dies ends the tests: a new one would begin with
# the test that it died of.
ORDER := --dist loadfile --no-loadscope-reorder --max-worker-restart=0
# Files of tests that judge times, beside which nothing runs (tests/conftest.py).
ALONE := $(addprefix tests/,benchmark/test_noise.py benchmark/test_session.py benchmark/test_generation.py \
	formats/onnx/runtimes/test_onnxruntime_web.py)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick requirements upgrade sbom durations lint format docs site clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(STAMP) ## make the virtual environment and install everything pinned

demo: $(CORE) ## run the quickstart recipe on real data and show its report; installs only what it needs
	$(BIN)/compress run recipes/quickstart.yaml

# Nothing is compiled by pip, which does so on one core and compiles packages' own tests too. Packages from source are
# built by the setuptools of build.txt, and not by one that pip would download without a hash.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile --no-deps --no-build-isolation
# Models of transformers are some hundred packages, of which a run imports a few; of ExecuTorch's backends it imports
# XNNPACK. A file for another version of Python is left as it is.
COMPILE = $(BIN)/python -W ignore -m compileall -qq -j 0 -x '$(SKIPPED)' $(VENV)/lib || true
SKIPPED = /tests/|/transformers/models/|/ray/(rllib|tune|serve|data|train)/|/executorch/(examples|backends/(?!xnnpack|transforms))|-packages/(pip|sqlalchemy|nltk|databricks|kagglesdk|mypyc?)/

$(MADE): $(REQUIRED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "compress needs Python 3.11 or newer; name one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --require-hashes --requirement $(HASHED)/build.txt
	@touch $@

$(CORE): $(MADE)
	$(INSTALL) --require-hashes --requirement $(HASHED)/torch-cpu.txt || \
		$(INSTALL) --require-hashes --requirement $(HASHED)/torch-cuda.txt
	$(INSTALL) --require-hashes --requirement $(HASHED)/core.txt
	$(INSTALL) --editable .
	@nice $(COMPILE) & # while the demo begins, or the rest is installed
	@touch $@

$(EXTRAS): $(MADE)
	$(INSTALL) --require-hashes --requirement $(HASHED)/apart.txt
	@touch $@

$(STAMP): $(CORE) $(EXTRAS)
	$(INSTALL) --require-hashes --requirement $(HASHED)/rest.txt
	$(BIN)/python -m pip check
	@$(COMPILE)
	@touch $@

test: $(STAMP) ## run the tests, with an eighth of the slow ones; ROTATION=slow: with all of them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not alone" -n $(WORKERS) $(ORDER)
	$(BIN)/python -m pytest -m alone $(ALONE)

test-quick: $(STAMP) ## run the tests that need no download and no browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not browser and not alone" -n $(WORKERS) $(ORDER)
	$(BIN)/python -m pytest -m "not slow and not browser and alone" $(ALONE)

requirements: ## write .ci/requirements/, after a change of constraints.txt or pyproject.toml
	$(PYTHON) .ci/requirements.py

upgrade: ## install the newest versions into a copy, run the quick tests, and write upgrade.md
	$(PYTHON) .ci/upgrade.py

sbom: $(STAMP) ## write the bill of materials of this tool, CycloneDX
	$(BIN)/python -P .ci/sbom.py bom.cdx.json

durations: $(STAMP) ## run every test and record how long each file takes, by which files are ordered
	ROTATION=slow COMPRESS_RECORD_DURATIONS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not alone" -n $(WORKERS) $(ORDER)

lint: $(STAMP) ## check style, formatting, types and what imports what
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## put files into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## write the pages and schemas that come from the code and from benchmarks/results
	$(BIN)/python docs/generate.py

site: $(STAMP) ## build the documentation as a site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict # with --quiet no warning would count

clean: ## remove the virtual environment and caches (artifacts stay)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache site *.egg-info
