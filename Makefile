# make quickstart: train the embedded default on the simulator and show what it learnt
# make test:       all tests          make lint: format, lint and types
# Each makes its own virtual environment in .venv; PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV := .venv
comma := ,
BIN := $(VENV)/bin
CORE := $(wildcard csrc/*.cpp csrc/include/flexrec/*.hpp)
RUN := runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
# Fewer steps than the defaults, so that a laptop is done in minutes; QUICK=1 shortens further, for continuous integration.
STEPS := $(if $(QUICK),--warmup-steps 8 --listwise-steps 8 --steps 8 --no-listwise-baseline,\
	--warmup-steps 20 --listwise-steps 25 --steps 25)

# make test-core: the C++ core under sanitizers       make bench: speed against peers
# make test-oldest-triton: the Triton tests with the oldest Triton that pyproject.toml allows; with COMPILE=1 it compiles
#                          every kernel for every GPU too, which takes some minutes
# make kernels: docs/kernels.md anew                  make gpu-dry-run: bench/gpu.sh as far as a CPU can
.PHONY: quickstart test test-oldest-triton test-core lint format bench kernels gpu-dry-run clean

quickstart: $(VENV)/installed
	$(BIN)/flexrec train --dataset simulated $(STEPS) --output $(RUN)

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# The oldest Triton lies in front of the installed one. Its interpreter cannot loop over tensors with NumPy 2.4.
OLDEST_TRITON := $(shell sed -n "s/.*\"triton>=\([0-9.]*\);.*/\1/p" pyproject.toml)
OLDEST := build/triton-$(OLDEST_TRITON)

test-oldest-triton: $(VENV)/installed $(OLDEST)/installed
	PYTHONPATH="$(abspath $(OLDEST))" $(BIN)/python -c 'import triton; assert triton.__version__ == "$(OLDEST_TRITON)"'
	PYTHONPATH="$(abspath $(OLDEST))" OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n auto --dist loadfile tests/ops -k "triton $(if $(COMPILE),,and not triton_compile)"

$(OLDEST)/installed: pyproject.toml
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --target $(OLDEST) --no-deps triton==$(OLDEST_TRITON) "numpy<2.4"
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.hpp')

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.hpp')

# The C++ core alone, tested and fuzzed under the address and undefined-behaviour sanitizers; SANITIZE=thread for races.
SANITIZE ?= address,undefined
SANITIZED = build/sanitize-$(subst $(comma),-,$(SANITIZE))
test-core: $(VENV)/installed
	PATH="$(abspath $(BIN)):$$PATH" cmake -G Ninja -B $(SANITIZED) -DCMAKE_BUILD_TYPE=Debug -DFLEXREC_PYTHON=OFF \
		-DFLEXREC_TESTS=ON -DFLEXREC_SANITIZE=$(SANITIZE)
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(SANITIZED)
	$(SANITIZED)/flexrec_core_tests
	$(SANITIZED)/flexrec_fuzz_rankings

bench: $(VENV)/installed
	$(BIN)/python -m pytest bench

kernels: $(VENV)/installed
	$(BIN)/python -m flexrec.triton_kernels.aot --write docs/kernels.md

gpu-dry-run: $(VENV)/installed
	PYTHON="$(abspath $(BIN))/python" bench/gpu.sh --dry-run build/gpu-dry-run

$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(CORE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf build dist *.egg-info $(VENV)
