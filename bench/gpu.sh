#!/usr/bin/env bash
# What only a GPU can say, in one command and under nine minutes: build, GPU tests, benchmarks, table of results.
#
#   bench/gpu.sh [--dry-run] [--seconds N] [--wheels FOLDER] [RESULTS]
#
# Needs Python with torch, triton, transformers, numba, pytest, pytest-benchmark, hypothesis, pybind11, cmake and ninja;
# downloads nothing. PYTHON chooses the interpreter (python3).
#
#   RESULTS    environment.txt, kernel-times.md, bench.json, language-model.json, report.md and log.txt go to
#              RESULTS/<name of the GPU>/ (default: bench/results)
#   --wheels   a folder of pure-Python wheels of peers (liger-kernel, cut-cross-entropy, trl), put in front of what is
#              installed, for this run only
#   --seconds  that all phases may take together (510); stopping a phase can take 20 more
#   --dry-run  every phase in small form on a CPU
#
# A phase that fails or takes too long is reported, and the next one begins; only a failed build ends the run. Of
# benchmarks that are cut off, those that ended are kept. The exit status is 0 if every phase went well.
set -uo pipefail

TOTAL=510
PYTHON=${PYTHON:-python3}
dry_run='' wheels='' root=$(dirname "$0")/results
while (($#)); do
  case $1 in
    --dry-run) dry_run=1 ;;
    --seconds)
      [[ ${2-} =~ ^[1-9][0-9]*$ ]] || { echo "bench/gpu.sh: --seconds needs a number, got '${2-}'" >&2 && exit 2; }
      TOTAL=$2 && shift
      ;;
    --wheels) wheels=${2:?--wheels needs a folder} && shift ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit ;;
    -*) echo "bench/gpu.sh: unknown option $1; see --help" >&2 && exit 2 ;;
    *) root=$1 ;;
  esac
  shift
done
root=$(realpath -m "$root") wheels=${wheels:+$(realpath "$wheels")}
cd "$(dirname "$0")/.."

gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 2
if [[ $dry_run ]]; then
  export CUDA_VISIBLE_DEVICES='' FLEXREC_BENCH_SMALL=1
  gpu=cpu-dry-run
elif [[ -z $gpu ]]; then
  echo "bench/gpu.sh: torch sees no GPU; --dry-run goes through every phase on the CPU" >&2
  exit 2
fi
results=$root/$(tr -cs '[:alnum:]._\n' - <<<"${gpu,,}")
mkdir -p "$results"
rm -f "$results"/{environment.txt,kernel-times.md,bench.json,language-model.json,report.md,log.txt} # an earlier run's must not pass for this one's
summary=''

left() { echo $((TOTAL - SECONDS)); }

# phase NAME SECONDS COMMAND...: run within both limits, log the output, note how it ended; returns its status.
phase() {
  local name=$1 limit=$2 start=$SECONDS status ended
  shift 2
  limit=$((limit < $(left) ? limit : $(left)))
  echo "== $name, at most $limit s: $*" | tee -a "$results/log.txt"
  # SIGINT lets pytest write what it has; in a background job it would be ignored.
  env --default-signal=INT timeout --signal=INT --kill-after=20 $((limit > 1 ? limit : 1)) "$@" 2>&1 |
    tee -a "$results/log.txt"
  status=${PIPESTATUS[0]}
  case $status in
    0) ended=passed ;;
    124 | 137) ended="cut off after $limit s" ;;
    *) ended="failed with status $status" ;;
  esac
  summary+=$(printf '%-12s %4d s  %s' "$name" $((SECONDS - start)) "$ended")$'\n'
  return "$status"
}

environment() {
  date --utc +%Y-%m-%dT%H:%MZ
  echo "commit $(git describe --always --dirty 2>/dev/null || echo unknown)"
  "$PYTHON" -VV
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit --format=csv,noheader \
    2>/dev/null || echo 'no nvidia-smi'
  "$PYTHON" -m pip list --format=freeze | grep -iE "^($(tr -s ' \n' '|' <<<"$PACKAGES")none)="
}
PACKAGES='torch triton numba numpy transformers accelerate tokenizers pybind11 cmake ninja hypothesis pytest
  pytest-benchmark pytest-xdist liger.kernel cut.cross.entropy trl flash.attn'

status=0
if [[ $wheels ]]; then
  rm -rf build/peers
  phase wheels 60 "$PYTHON" -m pip install --no-index --no-deps --target build/peers "$wheels"/*.whl || status=1
  export PYTHONPATH="$PWD/build/peers${PYTHONPATH:+:$PYTHONPATH}"
fi
environment 2>&1 | tee "$results/environment.txt"
if phase build 120 "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index -e .; then
  # Compiling takes most of the time of the tests, so they share the cores; the interpreter must be off on a GPU.
  tests=(-q -k 'triton or gpu' --ignore tests/ops/test_triton_compile.py)
  if [[ $dry_run ]]; then
    tests=(-q -k '(triton or gpu) and empty' --ignore tests/ops/test_triton_compile.py)
  elif "$PYTHON" -c 'import xdist' 2>/dev/null; then
    tests+=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
  fi
  phase tests 140 env -u TRITON_INTERPRET "$PYTHON" -m pytest --continue-on-collection-errors "${tests[@]}" tests || status=1
  phase kernels 30 "$PYTHON" bench/kernel_times.py --output "$results" || status=1
  phase bench $(($(left) - 130)) "$PYTHON" -m pytest --continue-on-collection-errors -q --durations=15 bench \
    --benchmark-json "$results/bench.json" || status=1
  phase models 120 "$PYTHON" bench/language_model.py --output "$results" --rounds 1 || status=1
  phase report 30 bash -c '"$1" bench/report.py "$2/bench.json" >"$2/report.md"' - "$PYTHON" "$results" || status=1
else
  status=1
fi

echo "== $gpu, $SECONDS s in all, results in $results
$summary" | tee -a "$results/log.txt"
exit $status
