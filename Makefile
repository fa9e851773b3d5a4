# `make serve` and `make test` are all a newcomer needs; `make check` is what CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONSAFEPATH := 1

.PHONY: serve test check lint install install-test clean help

help:
	@echo "make serve    install into $(VENV) and serve the demo model on http://127.0.0.1:23333"
	@echo "make test     install into $(VENV) and run the test suite"
	@echo "make check    format, lint, types, import rules and the test suite"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed tests/end_to_end/openai-2.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/openai-2 \
		-r tests/end_to_end/openai-2.txt
	@touch $@

install: $(VENV)/installed

install-test: $(VENV)/installed-test

serve: install
	$(BIN)/lmdserve --model demo $(ARGS)

test: install-test
	$(BIN)/pytest -m "not gpu" $(ARGS)

lint: install-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
