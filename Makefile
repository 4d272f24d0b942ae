# make demo: install and run the main job on the embedded default.  make test: install and run the tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt
TEXT ?=
# Tests start many processes: Python keeps what it has compiled.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all lint bench crashes fuzz audit advisories browser clean

demo: .venv/installed-user
	$(BIN)/gramian compare --name demo --overwrite

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-all: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or not slow"

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: .venv/installed-dev
	$(BIN)/python benchmarks/observation_overhead.py
	$(BIN)/python benchmarks/shaped_attention.py
	$(BIN)/python benchmarks/block_speed.py
	$(BIN)/python benchmarks/int8_speed.py
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/covariance_sde.py
	$(BIN)/python benchmarks/ntk.py
	$(BIN)/python benchmarks/trajectory.py
	$(BIN)/python benchmarks/pruning.py
	$(BIN)/python benchmarks/graphs.py
	$(BIN)/python benchmarks/projector.py
	$(BIN)/python benchmarks/field_speed.py

# A hundred kills of each job that can be resumed; half an hour on a quiet core.
crashes: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/crashes.py --kills 100

# 10⁵ hostile files for every loader, in limited processes; an hour on two quiet cores.
fuzz: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzzing.py --count 100000 --write

# Known advisories of everything that is installed, in an environment of its own; fails where it cannot ask.
audit: .venv/installed-dev .audit/installed
	$(BIN)/python -m pip list --format=freeze --exclude-editable | sed 's/+[A-Za-z0-9.]*$$//' > .audit/packages.txt
	.audit/bin/pip-audit --strict --disable-pip --no-deps --requirement .audit/packages.txt

# The same of those that are the newest of their kind, which a mirror of PyPI tells too.
advisories: .venv/installed-dev
	$(BIN)/python tests/advisories.py

.audit/installed:
	$(PYTHON) -m venv .audit
	.audit/bin/python -m pip install --quiet "pip-audit>=2.9"
	touch $@

# The report's browser test runs when Chromium is there (Debian: as root).
browser:
	apt-get install -y chromium

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed-user: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e .
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e ".[all,dev]"
	touch $@ .venv/installed-user

clean:
	rm -rf .venv .audit .pytest_cache .ruff_cache
