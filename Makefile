PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin

.PHONY: help anew dev demo test gate check tiny-model bench gpu clean

help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## / — /'

# Built once, and again if what it is built from changes. It is made anew if none is complete, if its
# Python is gone, or if PYTHON= names another Python than its own; without PYTHON= it keeps its own.
ITS_VERSION := -c 'import sys; print(sys.version)'
ifeq ($(and $(wildcard .venv/.ready),$(realpath $(BIN)/python)),)
ANEW := anew
else ifneq ($(origin PYTHON),file)
ifneq ($(shell $(PYTHON) $(ITS_VERSION)),$(shell $(BIN)/python $(ITS_VERSION)))
ANEW := anew
endif
endif

.venv/.ready: pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*/*.* csrc/*/*/*.*) $(ANEW)
ifdef ANEW
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15) and "clp needs Python 3.11 to 3.14, $(PYTHON) is Python %d.%d: name another one, as in make dev PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv --clear .venv
endif
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

dev: .venv/.ready  ## the environment: .venv with everything installed and the kernels built
	@$(BIN)/python -m clp_kernels.info

demo: .venv/.ready  ## train the tiny model, sweep the weights, print samples (SEED=1); starts runs/demo over
	rm -rf runs/demo
	$(BIN)/clp train --output-dir runs/demo --seed $(SEED)
	$(BIN)/clp eval runs/demo --seed $(SEED)

test: .venv/.ready  ## the whole CPU test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

gate: .venv/.ready  ## compile every kernel for sm_80, sm_90 and sm_100, without a GPU (5 minutes)
	$(BIN)/python -m pytest -m gate tests/test_build.py tests/ops/test_compile_gate.py

check: .venv/.ready  ## ruff, mypy, imports, README commands, pins against the package index
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py tests/test_readme.py::test_commands_exist
	$(BIN)/python -m pytest -m index tests/test_constraints.py

tiny-model: .venv/.ready  ## make the embedded model again (about ten minutes)
	$(BIN)/python scripts/tiny_model.py

bench: .venv/.ready  ## time the kernels against plain PyTorch on the CPU
	$(BIN)/python -m bench sample --device cpu
	$(BIN)/python -m bench linear_logprob --device cpu
	$(BIN)/python -m bench mixed_lora --device cpu
	$(BIN)/python -m bench mixed_lora --device cpu --grad

# Uses the python3 that has a CUDA build of PyTorch, not .venv.
gpu:             ## on a machine with a GPU: build in place, self-test, benchmark, GPU tests, sanitizer
	$(PYTHON) -m bench.gpu

clean:           ## remove what the other targets have made
	rm -rf .venv build dist runs *.egg-info clp_kernels/*.so
