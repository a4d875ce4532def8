# Two commands on a fresh machine: `make demo` and `make test`. Both fetch uv into .tools when it is missing.

UV := $(shell command -v uv 2>/dev/null && uv --version >/dev/null 2>&1 || echo .tools/bin/uv)
UV := $(lastword $(UV))
RUN = $(UV) run --all-extras

.PHONY: demo test lint types unit notebooks benchmarks setup

demo: setup
	$(RUN) bayesrl fit digits_bandit --out runs/digits_bandit

# Types are checked beside the tests, which leave room for them now and then.
test: lint
	$(MAKE) -j2 types unit

lint: setup
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: setup
	$(RUN) mypy

# Bytecode of the package is kept, whatever the environment says: the tests start many processes that import it.
unit: setup
	PYTHONDONTWRITEBYTECODE= $(RUN) pytest

benchmarks: setup
	$(RUN) python -m benchmarks

setup: $(filter .tools/bin/uv,$(UV))
	$(UV) sync --all-extras --quiet --compile-bytecode

.tools/bin/uv:
	python3 -m pip install --quiet --target .tools --upgrade 'uv>=0.8,<1'
