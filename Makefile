# Each target makes its own environment in .venv first, so a fresh clone needs nothing but Python and make.
#
#   make demo     see a language model pruned, recovered and compared with the original
#   make test     run the test suite
#   make quality  lint, formatting, types
#   make docs     build the documentation into site/
#   make clean    remove everything that these targets made

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TEST_PROCESSES ?= 2

.PHONY: demo test quality docs clean
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

# One thread: the built-in model's and the tests' matrices are so small that more threads mostly wait for each other.
demo test: export OMP_NUM_THREADS ?= 1

demo: $(INSTALLED)
	$(BIN)/spine demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) $(PYTEST_ARGS)

quality: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) spine-demo site dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
