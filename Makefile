# Two commands: `make run` and `make test`. Each makes its own environment in .venv first.
PYTHON ?= python3
SUITE ?= quick
ARGS ?=
# The versions this is tested with; `make run CONSTRAINTS=` installs the newest allowed ones instead.
CONSTRAINTS ?= constraints.txt
PIP := .venv/bin/python -m pip install --disable-pip-version-check --quiet $(addprefix -c ,$(CONSTRAINTS))

.PHONY: run test test-quick test-full audit nightly benchmark published lint format clean

run: .venv/run
	.venv/bin/moebench run suite $(SUITE) $(ARGS)

test: lint
	.venv/bin/python -m pytest

# Without the browser, the wheel and the long end-to-end runs.
test-quick: .venv/dev
	.venv/bin/python -m pytest -m "not browser and not wheel and not slow and not full"

# Every kernel on the full product of shapes: hours in the interpreter.
test-full: .venv/dev
	.venv/bin/python -m pytest -m full

# Every shipped kernel in every shipped tile, compiled for each of its targets; fails on a fault. No GPU.
audit: .venv/run
	.venv/bin/moebench audit --all $(ARGS)

# The current commit into the history under .asv, its site in .asv/html. A regression is `Error 3`, for which GNU make
# itself ends with 2. docs/nightly.md.
nightly: .venv/nightly
	.venv/bin/python -m moebench_suites.run_nightly $(ARGS)

# The nightly's cases under pytest-benchmark: the first time stores a baseline, later ones compare with the newest.
benchmark: .venv/dev
	.venv/bin/python -m pytest tests/benchmarks/test_benchmarks.py --benchmark-only \
	  $(if $(wildcard .benchmarks/*/*.json),--benchmark-compare --benchmark-compare-fail=median:10%,--benchmark-save=baseline) $(ARGS)

# The tables of README.md, reports/README.md and docs/kernel-notes.md, from the runs under reports/.
published: .venv/run
	.venv/bin/python -m moebench_suites.published $(ARGS)

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.venv/run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "moebench needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "installing into .venv (PyTorch is large: a few minutes the first time)"
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	@touch $@

.venv/nightly: .venv/run
	$(PIP) -e '.[nightly]'
	@touch $@

.venv/dev: .venv/run
	$(PIP) -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
