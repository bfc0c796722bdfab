# make demo | build | test | test-full | sanitize | lint | format | wheel | test-matrix | kernel-table | kernel-traffic |
#      gpu-kit | gpu-check | clean
# Everything runs in the virtual environment .venv, which is made on first use and renewed when its inputs change.
#   PYTHON=python3.12       the Python it is made from (3.10 or newer)
#   TORCH=torch==2.11.0     the PyTorch it gets, in the words of pip install
#   ARGUMENTS=--check       options of the scripts behind kernel-table, gpu-kit and gpu-check
# and the variables of setup.py: FWPKM_WITH_CUDA=OFF, FWPKM_CUDA_ARCHS=90a-real, MAX_JOBS=2, ...
PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
ENVIRONMENT := $(VENV)/.environment
BUILD := $(VENV)/.build

BUILD_TOOLS = $(shell sed -n 's/^requires = \[\(.*\)\].*/\1/p' pyproject.toml | tr -d ,)
EXTRAS = $(shell sed -n 's/^\(test\|examples\|experiments\|dev\) = \[\(.*\)\].*/\2/p' pyproject.toml | tr -d ,)
CXX_FILES = $(shell find csrc tests/simt -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
# The installation is editable: Python files are read from the source tree, only these need a new build.
BUILD_INPUTS = $(shell find csrc cmake _build -type f ! -path '*/__pycache__/*') \
  CMakeLists.txt setup.py pyproject.toml python/fwpkm_cuda/_version.py
# A change of a variable counts as a change of an input.
SETTINGS = $(PYTHON) $(TORCH) $(BUILD_TOOLS) $(EXTRAS)
BUILD_VARIABLES = CXX CXXFLAGS CMAKE_ARGS $(filter-out FWPKM_TEST_FULL FWPKM_CPU_CAPABILITY FWPKM_LIBRARY,$(filter FWPKM_%,$(.VARIABLES)))
BUILD_SETTINGS = $(foreach name,$(sort $(BUILD_VARIABLES)),$(name)=$($(name)))

.PHONY: demo build test test-full sanitize lint format wheel test-matrix kernel-table kernel-traffic gpu-kit gpu-check clean FORCE
.DELETE_ON_ERROR:

demo: $(BUILD)
	$(BIN)/python -m fwpkm_cuda
	$(BIN)/python examples/remember_text.py

build: $(BUILD)

test: $(BUILD)
	$(BIN)/python -m pytest tests -q

test-full: $(BUILD)
	FWPKM_TEST_FULL=1 FWPKM_HYPOTHESIS_EXAMPLES=2000 $(BIN)/python -m pytest tests -q -rs
	$(MAKE) sanitize

sanitize: $(BUILD)
	PATH="$(abspath $(BIN)):$$PATH" scripts/sanitize.sh $(BIN)/python

lint: $(ENVIRONMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(ENVIRONMENT)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

wheel: $(ENVIRONMENT)
	$(BIN)/pip wheel --no-build-isolation --no-deps -w dist .

test-matrix: $(ENVIRONMENT)
	$(BIN)/python scripts/test_matrix.py

kernel-table: $(ENVIRONMENT)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/kernel_table.py $(ARGUMENTS)

kernel-traffic: $(BUILD)
	$(BIN)/python scripts/kernel_traffic.py

# What a machine with a GPU and without a network needs: build/gpu-kit.
gpu-kit: $(ENVIRONMENT)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/gpu_kit.py $(ARGUMENTS)

# On that machine, with the Python that is there: no environment is made.
gpu-check:
	$(PYTHON) scripts/gpu_check.py $(ARGUMENTS)

clean:
	rm -rf build dist .make python/*.egg-info python/fwpkm_cuda/*.so
	if [ -e $(VENV)/.made-by-make ]; then rm -rf $(VENV); fi

.make/settings: FORCE
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'fwpkm-cuda needs Python 3.10 or newer: make PYTHON=python3.12 ...' >&2; exit 1; }
	@mkdir -p .make
	@echo '$(SETTINGS)' | cmp -s - $@ || echo '$(SETTINGS)' > $@

.make/build-settings: FORCE | .make/settings
	@echo '$(BUILD_SETTINGS)' | cmp -s - $@ || echo '$(BUILD_SETTINGS)' > $@

$(ENVIRONMENT): .make/settings
	@if [ -e $(VENV) ] && [ ! -e $(VENV)/.made-by-make ]; then \
	  echo '$(VENV) exists and was not made by this Makefile: move it away first' >&2; exit 1; fi
	$(PYTHON) -m venv --clear $(VENV)
	touch $(VENV)/.made-by-make
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q $(TORCH) $(BUILD_TOOLS) $(EXTRAS)
	touch $@

$(BUILD): $(ENVIRONMENT) .make/build-settings $(BUILD_INPUTS)
	$(BIN)/pip install -q --no-build-isolation -e .
	touch $@
