# make study   environment, recipes/quickstart.yaml, its table and the path of its report
# make test    environment, tests, notebooks
# make lint    style and types
# make bench   side-by-side timings
# make readme  the README's tables, from the code
# make clean   drop the environment
#
# PYTHON=/path/to/python3.12 make study   chooses the interpreter; VENV=... the environment's folder.

# The first of these that runs, is 3.11 or newer and can make an environment.
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python3.13 python3.14; do \
  $$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
# A sentence's matrices are too small to share between threads: on a busy machine of 2 cores, 2 threads that wait for
# each other took 10 times the CPU seconds of 1.
export OMP_NUM_THREADS ?= 1
BIN := $(VENV)/bin
# Byte code is written when a module is first imported; compiling everything at once takes a third of the installation.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt

.PHONY: study test lint bench readme clean
.DELETE_ON_ERROR:

study: $(VENV)/.demo
	$(BIN)/lmleak run quickstart

# The longest first, and whoever is done takes over: nothing long is left for one process at the end.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal --nbmake --nbmake-timeout=300 notebooks tests

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.demo
	for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

readme: $(VENV)/.dev
	$(BIN)/python tests/test_readme.py

clean:
	rm -rf $(VENV)

# Stamps: what is installed stays until pyproject.toml or constraints.txt changes.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[demo,dev,peft,plot]'
	touch $@ $(VENV)/.demo

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 with venv found; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
