# make quickstart: train the embedded default on the simulator and show what it learnt
# make test:       all tests          make lint: format, lint and types
# Each makes its own virtual environment in .venv; PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(wildcard csrc/*.cpp csrc/include/flexrec/*.hpp)
RUN := runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
# Fewer steps than the defaults, so that a laptop is done in minutes; QUICK=1 shortens further, for continuous integration.
STEPS := $(if $(QUICK),--warmup-steps 8 --listwise-steps 8 --steps 8 --no-listwise-baseline,\
	--warmup-steps 20 --listwise-steps 25 --steps 25)

# make test-core: the C++ core under sanitizers       make bench: speed against peers
.PHONY: quickstart test test-core lint format bench clean

quickstart: $(VENV)/installed
	$(BIN)/flexrec train --dataset simulated $(STEPS) --output $(RUN)

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.hpp')

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.hpp')

# The C++ core alone, under the address and undefined-behaviour sanitizers.
test-core: $(VENV)/installed
	PATH="$(abspath $(BIN)):$$PATH" cmake -G Ninja -B build/sanitize -DCMAKE_BUILD_TYPE=Debug -DFLEXREC_PYTHON=OFF \
		-DFLEXREC_TESTS=ON -DFLEXREC_SANITIZE=address,undefined
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/sanitize
	build/sanitize/flexrec_core_tests

bench: $(VENV)/installed
	$(BIN)/python -m pytest bench

$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(CORE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf build dist *.egg-info $(VENV)
