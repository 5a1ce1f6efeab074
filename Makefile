# make demo   sets up and runs the main job on scikit-learn's digits
# make test   sets up and runs the tests (test-all: the slow ones too)
# make cross  installs what the ARM tests need (as root, on Debian and Ubuntu); without it they are skipped
# make opencl installs what runs the kernels for CUDA on the CPU (likewise); without it their tests are skipped
# make cuda   installs NVIDIA's compiler (105 MB, no card needed); without it the tests that compile for cards are skipped
# make lint   ruff and mypy          make bench   the kernel table

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTEST_ARGS ?=

CROSS_PROGRAMS := aarch64-linux-gnu-gcc arm-linux-gnueabihf-gcc qemu-aarch64-static qemu-arm-static
CROSS_PACKAGES := gcc-aarch64-linux-gnu libc6-dev-arm64-cross gcc-arm-linux-gnueabihf libc6-dev-armhf-cross qemu-user-static
CROSS_MISSING  := for program in $(CROSS_PROGRAMS); do command -v $$program >/dev/null || echo $$program; done
# Apart from the others, as not every distribution has it. Any LLVM from 16 on will do; "llvm" may be an older one.
MCA_PACKAGE    ?= llvm-19
MCA_MISSING    := for suffix in "" $$(seq -f -%g 16 40); do \
  version=$$(llvm-mca$$suffix --version 2>/dev/null | sed -n 's/.*LLVM version \([0-9]*\).*/\1/p'); \
  test "$${version:-0}" -lt 16 || exit 0; done; echo llvm-mca

# An OpenCL device that is the CPU: what makes one of it, and whether it is known to the loader of such devices.
OPENCL_PACKAGES := pocl-opencl-icd
OPENCL_MISSING  := ls /etc/OpenCL/vendors 2>/dev/null | grep -q pocl || echo PoCL

# NVIDIA's compiler and what looks into its code: a toolkit on the machine will do, but for the latter.
CUDA_MISSING := $(BIN)/python -c "$$CUDA_FOUND" 2>/dev/null || echo nvcc with cuobjdump
export CUDA_FOUND := from horq_tvm.cuda import toolkit; found = toolkit.find(); assert found.program("cuobjdump") and found.program("nvdisasm")

.PHONY: help setup demo cross say-cross opencl say-opencl cuda say-cuda test test-all lint format bench clean

help:
	@sed -n 's/^# //p' Makefile

# Installed once, and again when the requirements change.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "horq-tvm needs Python 3.10 or newer; found: $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make a virtual environment: install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[compiler,torch,dev]'
	touch $@

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/digits.py

cross:
	@test -z "$$($(CROSS_MISSING))$$($(MCA_MISSING))" || apt-get -qq update
	@test -z "$$($(CROSS_MISSING))" || apt-get -qq install --yes --no-install-recommends $(CROSS_PACKAGES)
	@test -z "$$($(MCA_MISSING))" || apt-get -qq install --yes --no-install-recommends $(MCA_PACKAGE)

say-cross:
	@missing=$$($(CROSS_MISSING)); test -z "$$missing" || \
	  echo "The tests of ARM are skipped: no $$(echo $$missing) here. Run: make cross (as root), or apt install $(CROSS_PACKAGES)"
	@missing=$$($(MCA_MISSING)); test -z "$$missing" || \
	  echo "Tests of ARM's static analysis are skipped: no llvm-mca from LLVM 16 on here. Run: make cross, or apt install $(MCA_PACKAGE)"

opencl:
	@test -z "$$($(OPENCL_MISSING))" || { apt-get -qq update; apt-get -qq install --yes --no-install-recommends $(OPENCL_PACKAGES); }

say-opencl:
	@missing=$$($(OPENCL_MISSING)); test -z "$$missing" || \
	  echo "The tests that execute kernels for CUDA are skipped: no $$missing here. Run: make opencl (as root), or apt install $(OPENCL_PACKAGES)"

cuda: $(STAMP)
	@test -z "$$($(CUDA_MISSING))" || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cuda]'

say-cuda: $(STAMP)
	@missing=$$($(CUDA_MISSING)); test -z "$$missing" || \
	  echo "Tests that compile for CUDA are skipped: no $$missing here. Run: make cuda (it needs g++ as well)"

test: $(STAMP) say-cross say-opencl say-cuda
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: $(STAMP) say-cross say-opencl say-cuda
	$(BIN)/python -m pytest -m "" $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.kernels

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
