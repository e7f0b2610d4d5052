# `make demo` and `make test` do all the set-up: Python 3.11 or newer, make, and a package index.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo ui test test-all check fuzz faults audit bench bench-gpu pages data clean
.DELETE_ON_ERROR:

# constraints.txt pins every version, torch among them; on a machine with a GPU see "With a GPU" in the README
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/workbench demo

ui: $(STAMP)
	$(BIN)/workbench ui

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-all: $(STAMP)
	$(BIN)/python -m pytest -n 2

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# every parser of outside files, with at least a million inputs; what is kept in build/fuzz is gone on from
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz

# licences, and known vulnerabilities where their data can be reached
audit: $(STAMP)
	$(BIN)/python -m tests.supply

bench: $(STAMP)
	WORKBENCH_PROGRESS=0 $(BIN)/python -m tests.benchmarks

bench-gpu: $(STAMP)
	WORKBENCH_PROGRESS=0 $(BIN)/python -m tests.benchmarks device-gpu speed-gpu maps-gpu fold-gpu

# every fault at eight events of each step of every verb that writes: about two hours on two cores
faults: $(STAMP)
	$(BIN)/python -m tests.faults

pages: $(STAMP)
	WORKBENCH_PROGRESS=0 $(BIN)/python -m tests.pages

data: $(STAMP)
	$(BIN)/python -m data.build

clean:
	rm -rf $(VENV) runs build *.egg-info
