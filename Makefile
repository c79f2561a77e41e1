# `make demo` and `make test`, each by itself, set up everything on a fresh machine: .venv, the pinned requirements,
# the native module, and the job.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
DEMO_ARGS ?=
BENCH_ARGS ?=
GPU_ARGS ?=
# A worker that is done takes over what another has waiting: what compiles takes a hundred times as long as the rest.
TEST_ARGS ?= -n $(JOBS) --dist worksteal
# Of the slow tests and the sweeps: 2/3 is the second of three parts.
PART ?= 1/1

NATIVE := $(shell find csrc/cpu -type f) CMakeLists.txt setup.py pyproject.toml
CPP := $(shell find csrc/cpu tests/native tests/ptxsim -name '*.cpp' -o -name '*.h' -o -name '*.c')
CUDA := $(shell find csrc/cuda -name '*.cu' -o -name '*.h')

.DEFAULT_GOAL := help
.PHONY: help demo test test-all slow sweep gpu bench docs lint format install clean

help:
	@echo "make demo    train and compare five encodings on real text (about 6 minutes); DEMO_ARGS for more"
	@echo "make test    what finds nearly every mistake, in minutes; TEST_ARGS replaces pytest's arguments"
	@echo "make test-all  and then the slow ones: mutants, rare combinations, installs into fresh environments"
	@echo "make sweep   what is left: each of them everywhere else; PART=2/8 for the second of eight parts"
	@echo "make gpu     the first hour on a GPU, into gpu-report/; GPU_ARGS, e.g. --minutes 8"
	@echo "make bench   posattn beside its peers on this machine (under 15 minutes); BENCH_ARGS, e.g. --full"
	@echo "make docs    the documentation site, into build/site"
	@echo "make lint    ruff, mypy and clang-format; make format applies the formats"
	@echo "make clean   remove what was built; .venv stays"

demo: install
	$(BIN)/posattn demo $(DEMO_ARGS)

test: install
	$(BIN)/python -m pytest -m "not slow and not sweep" $(TEST_ARGS)

test-all: test
	$(MAKE) slow

slow: install
	$(BIN)/python -m pytest -m slow --part $(PART) $(TEST_ARGS)

sweep: install
	$(BIN)/python -m pytest -m sweep --part $(PART) $(TEST_ARGS)

# Where there is a GPU: a report within 25 minutes, then the GPU's own list of calls. The same command goes on.
gpu: install
	$(BIN)/posattn gpu $(GPU_ARGS)
	$(BIN)/python -m pytest tests/backends/test_gpu_parity.py -k on_the_gpu

bench: install
	$(BIN)/posattn bench $(BENCH_ARGS)

docs: $(VENV)/.requirements-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP) $(CUDA)

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP) $(CUDA)

install: $(VENV)/.installed

# Everything is pinned, so the build tools of the requirements serve in place of an isolated build.
$(VENV)/.installed: $(VENV)/.requirements $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

# torch first and by itself, so that nothing else can choose its version.
$(VENV)/.requirements: requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install -r requirements-dev.txt
	@touch $@

$(VENV)/.requirements-docs: $(VENV)/.requirements requirements-docs.txt
	$(BIN)/python -m pip install -r requirements-docs.txt
	@touch $@

clean:
	rm -rf build dist *.egg-info demo-out bench-out posattn/_cpu*.so $(VENV)/.installed
