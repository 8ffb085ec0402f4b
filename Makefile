# Each target sets up all that it needs: a fresh clone and `make demo` or `make test` are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The tests start hundreds of processes: each compiles what is imported if bytecode is not kept.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
# Programs of others that run through the switch, and torchao; their environment sees the packages of the first one.
CLIENTS := $(VENV)/clients
CLIENTS_INSTALLED := $(CLIENTS)/.installed
PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))

.DEFAULT_GOAL := help
.PHONY: help demo test test-clients test-slow check format clean

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	# DeepSpeed's build looks for the torch that it will run with; its operations are compiled only when one is asked for.
	$(BIN)/python -m pip install --quiet setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	@touch $@

$(CLIENTS_INSTALLED): $(INSTALLED)
	$(PYTHON) -m venv $(CLIENTS)
	$(BIN)/python -c '$(PACKAGES)' > "$$($(CLIENTS)/bin/python -c '$(PACKAGES)')/first.pth"
	$(CLIENTS)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(CLIENTS)/bin/python -m pip install --quiet --constraint constraints.txt --group clients
	@touch $@

demo: $(INSTALLED)  ## train a small language model on this machine's devices
	$(BIN)/paceline launch examples/language_model.py

test: $(INSTALLED)  ## the tests, without the long sweeps (two at a time)
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/docs -m "not slow and not gpu and not gpus2"

test-clients: $(CLIENTS_INSTALLED)  ## TRL through the switch against TRL on Accelerate, and fp8, in an environment of their own
	PYTHONPATH=$(CURDIR)/src PYTHONDONTWRITEBYTECODE= $(CLIENTS)/bin/python -m pytest tests/compat/test_trl.py tests/ranks/test_fp8.py

test-slow: $(INSTALLED)  ## the long sweeps as well
	$(PYTEST) -m "not gpu and not gpus2" --timeout 900

check: $(INSTALLED)  ## format, lint, types, layers, docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) --quiet tests/docs

format: $(INSTALLED)  ## rewrite the code in the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the virtual environment and what runs wrote
	rm -rf $(VENV) runs build dist
