# Two commands matter: `make cpt` and `make test`. `make help` lists the rest.
#   PYTHON=python3.12   the interpreter that creates the environment
#   VENV=path           the environment to create or use
#   FRESH=1             make cpt: forget the finished run and runs/cache (corpora, base models), start over
#   RUNS=patterns       make results: the runs of continued pretraining that are drawn and tabulated
#   OTHERS=patterns     make results: other finished runs that are tabulated with them, where they are there
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
FRESH ?=
RUNS ?= runs/tiny runs/sample-[123] runs/real-[123]
OTHERS ?= runs/qa-tiny runs/clinical-tiny runs/mixture-tiny runs/compare
NB ?=
ROW ?=
BIN := $(abspath $(VENV))/bin
PY := $(BIN)/python
NOTEBOOKS := $(PY) .ci/notebooks.py
# A process that may not keep what it compiled compiles every import again: 7 of 13 seconds, for every kernel and every command.
unexport PYTHONDONTWRITEBYTECODE
PYTEST := OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(PY) -m pytest tests --strict-markers --color=auto -ra -n 2 --dist loadfile

.NOTPARALLEL:
.PHONY: help setup oracles cpt test gate test-notebooks test-fast test-newest test-slow soak bench gpu-check outputs export readme results docs test-docs dist test-package ruff lint clean

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | while IFS=$$'\t' read -r name text; do printf 'make %-16s%s\n' "$$name" "$$text"; done

setup: ## create the environment and install into it, pinned
	@.ci/setup "$(PYTHON)" "$(abspath $(VENV))" dev

cpt: setup ## continued pretraining at scale tiny on the built-in sample: table and curve
ifneq ($(filter-out 0,$(FRESH)),)
	rm -rf runs/tiny runs/cache
endif
	$(BIN)/biomamba cpt --scale tiny

test: gate test-notebooks test-fast ## every check that a change has to pass, under 15 minutes

gate: setup ## exported modules, README, stored outputs: all belong to the notebooks
	$(NOTEBOOKS) gate

test-notebooks: setup ## run every cell of the library notebooks
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(BIN)/nbdev_test --file_re "$$($(NOTEBOOKS) library)" --n_workers 2 --do_print

oracles: setup ## add upstream's kernels and the trackers, which only the tests want
	@if [[ $$(uname -s) == Linux ]]; then .ci/setup "$(PYTHON)" "$(abspath $(VENV))" oracles; fi

test-fast: oracles ## pytest, without the slow tests
	$(PYTEST) -m "not slow"

test-newest: ## pytest, without the slow tests, with the newest of all that settings.ini asks for, in an environment of its own
	"$(PYTHON)" -m venv _proc/newest
	_proc/newest/bin/python -m pip install --disable-pip-version-check -e ".[dev]"
	$(subst $(PY),_proc/newest/bin/python,$(PYTEST)) -m "not slow"

test-slow: oracles ## pytest, the slow tests
	$(PYTEST) -m slow

soak: setup ## kill a training run twenty times and compare what it ends with, bit for bit
	$(PY) tests/soak.py

bench: setup ## measure speed and memory against stock transformers, a quarter of an hour; ROW="step-fp32 tokenizing" for some rows
	$(PY) -m benchmarks $(ROW)

gpu-check: setup ## hold what a GPU computes to the CPU, and measure it, at every scale; wants the extra cuda
	$(PY) -m benchmarks.gpu

outputs: setup ## execute the notebooks in place and store their outputs; NB="10_cpt index" for some of them
	$(NOTEBOOKS) outputs $(NB)

export: setup ## write the library's modules from the notebooks
	$(NOTEBOOKS) export

readme: setup ## write README.md from nbs/index.ipynb
	$(NOTEBOOKS) readme

results: cpt ## rebuild every table and figure that the finished runs can fill, into figures/; the same results give the same bytes
	mkdir -p runs/learning_curves runs/results
	$(BIN)/papermill nbs/13_learning_curves.ipynb runs/learning_curves/13_learning_curves.ipynb -k python3 -p run_dir figures -p runs "$(RUNS)"
	others=$$(for run in $(OTHERS); do if [[ -f $$run/results.json ]]; then printf ' %s' "$$run"; fi; done); \
	$(BIN)/papermill nbs/41_results.ipynb runs/results/41_results.ipynb -k python3 -p run_dir figures -p runs "$(RUNS)$$others"

docs: ## build the documentation site in _docs/, two minutes; Quarto renders it where it is installed, smalldocs elsewhere
	@.ci/setup "$(PYTHON)" "$(abspath $(VENV))" dev,docs
	$(PY) .ci/docs.py

test-docs: docs ## build the site and open every page of it in headless Chromium; screenshots in _proc/screenshots/
	@.ci/setup "$(PYTHON)" "$(abspath $(VENV))" dev,docs,browser
	BIOMAMBA_SITE="must be looked at" $(PY) -m pytest tests/test_site.py --strict-markers -ra

dist: setup ## build the source distribution and the wheel in dist/
	rm -rf dist
	$(PY) -m build

test-package: setup ## build, install in an empty environment without a network, and use what was installed
	$(PY) -m pytest tests/test_package.py --strict-markers -ra

ruff: ## find mistakes in Python files
	@.ci/setup "$(PYTHON)" "$(abspath $(VENV))" dev,lint
	$(BIN)/ruff check --config .ci/ruff.toml biomamba tests benchmarks .ci

lint: ruff ## the same, and check the types of the library
	$(BIN)/basedpyright --project .ci/pyrightconfig.json

clean: ## remove what can be made again, except runs and the environment
	rm -rf _proc _docs build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
