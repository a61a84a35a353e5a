# Each target makes its own environment in .venv first, so a fresh clone needs nothing but Python and make.
#
#   make demo          see a language model pruned, recovered and compared with the original
#   make test          run the test suite
#   make test-engines  run the tests of the command line and of engines over processes, with older typer and rich
#   make quality       lint, formatting, types
#   make docs          build the documentation into site/
#   make clean         remove everything that these targets made

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TEST_PROCESSES ?= 2
ENGINES_VENV ?= .venv-engines
ENGINES_BIN := $(ENGINES_VENV)/bin
ENGINES_INSTALLED := $(ENGINES_VENV)/.installed
COMMAND_TESTS := tests/test_config.py tests/e2e/test_chain.py tests/e2e/test_hostile_inputs.py $(wildcard tests/*/test_*_command.py tests/*/*/test_*_command.py) tests/test_layering.py
ENGINE_TESTS := $(wildcard tests/federation/test_federation_engines_*.py)

.PHONY: demo test test-engines quality docs clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@sed -n 's/^#   //p' Makefile

# PyTorch goes first and alone: the pinned version settles which build is taken before anything else can ask for one.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

# Flower asks for older versions of typer and rich than the newest, so it has an environment of its own.
$(ENGINES_INSTALLED): pyproject.toml constraints-engines.txt
	$(PYTHON) -m venv $(ENGINES_VENV)
	$(ENGINES_BIN)/python -m pip install -c constraints-engines.txt torch==2.13.0
	$(ENGINES_BIN)/python -m pip install -c constraints-engines.txt -e '.[gguf,plots,nvflare,flower]' pytest pytest-xdist hypothesis
	@touch $@

# One thread: the built-in model's and the tests' matrices are so small that more threads mostly wait for each other.
demo test test-engines: export OMP_NUM_THREADS ?= 1

demo: $(INSTALLED)
	$(BIN)/spine demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) $(PYTEST_ARGS)

# The engines' tests in one process: each of them starts several, which all load torch. PYTEST_ARGS="-m 'not slow'" leaves
# out whole runs over processes.
test-engines: $(ENGINES_INSTALLED)
	$(ENGINES_BIN)/python -m pytest -n $(TEST_PROCESSES) -m 'not slow' $(COMMAND_TESTS)
	$(ENGINES_BIN)/python -m pytest $(ENGINE_TESTS) $(PYTEST_ARGS)

quality: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(ENGINES_VENV) spine-demo site dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
