# Two commands: `make demo` shows what the package does, `make test` shows that it is right.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet -c constraints.txt
OUTPUT ?= demo-output
PYTEST_ARGS ?=

.PHONY: demo test lint clean help

help:
	@echo "make demo   install into .venv and run the whole story on the embedded model (offline, some minutes)"
	@echo "make test   install into .venv with the test extras and run the tests"
	@echo "make lint   style, types and import rules"

$(BIN)/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "Python 3.11 or newer is needed; got '$(PYTHON)'. Set PYTHON=/path/to/python3.11."; exit 1; }
	@echo "== making $(VENV) with $(PYTHON)"
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "== installing sae-lens-multimodal (pinned by constraints.txt)"
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "== installing sae-lens-multimodal with its test extras (pinned by constraints.txt)"
	$(PIP_INSTALL) -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/.installed-test
	@echo "== installing the lint and build tools"
	$(PIP_INSTALL) -e '.[test,dev]'
	@touch $@

demo: $(VENV)/.installed
	@echo "== running the demo; it writes to $(OUTPUT)/"
	$(BIN)/sae-lens-multimodal demo --output $(OUTPUT)

test: $(VENV)/.installed-test
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null \
	  || echo "== no chromium found: the browser tests will be skipped (Debian: apt-get install chromium chromium-driver)"
	@echo "== running the tests"
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	@echo "== style"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== types"
	$(BIN)/mypy
	@echo "== import rules"
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info $(OUTPUT)
