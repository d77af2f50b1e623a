#!/usr/bin/env bash
# On a machine with a GPU: builds the CUDA kernels against that machine's torch, runs the GPU benchmarks,
# and then, side by side, tests/cuda on the GPU and compute-sanitizer on a small set.
#
#   scripts/gpu_check.sh [--built] OUTDIR
#
# Takes less than ten minutes; with --built, which takes the libraries that are there, less than six.
# PYTHON picks the interpreter (python3 unless set), which needs torch with CUDA, setuptools, ninja, numpy,
# hypothesis, pytest and pytest-timeout; nothing is installed. OUTDIR gets check.md and check.json (what
# passed, and what the failed said), gpu.md and gpu.json (times) and a log of each step.
#
# The steps grouped_wgmma_* are about the kernel that QKERNELS_GROUPED_WGMMA=1 asks for, on Hopper: when all
# of them pass, check.md says that it may become the default. The status is 0 if all others passed.
set -uo pipefail

say() { printf 'gpu_check: %s\n' "$*"; }

built=0
if [ "${1:-}" = --built ]; then
  built=1
  shift
fi
if [ $# -ne 1 ]; then
  say "expected one argument, the folder for the results: scripts/gpu_check.sh [--built] OUTDIR" >&2
  exit 2
fi
python=${PYTHON:-python3}
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2

arch=$("$python" - <<'PYTHON'
import sys
try:
    import torch
except ModuleNotFoundError:
    sys.exit("torch is not installed; set PYTHON to an interpreter that has a torch with CUDA")
if not torch.cuda.is_available():
    built = "has no CUDA" if torch.version.cuda is None else "sees no GPU"
    sys.exit(f"there is no GPU to check on: torch {torch.__version__} {built}")
major, minor = torch.cuda.get_device_capability()
if major < 8:
    sys.exit(f"the GPU is sm_{major}{minor}; the kernels need sm_80 or newer")
print(f"{major}{minor}" + ("a" if major >= 9 else ""))
PYTHON
) || { say "nothing was checked" >&2; exit 1; }

export QKERNELS_CUDA=1 QKERNELS_CUDA_ARCHS=${QKERNELS_CUDA_ARCHS:-$arch}
export MAX_JOBS=${MAX_JOBS:-$(nproc)} PYTHONPATH=$PWD
: >"$out/steps.tsv"

# step NAME SECONDS COMMAND...: its output goes to NAME.log.
step() {
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  printf '%s\t%s\t%s\n' "$name" "$status" $((SECONDS - start)) >>"$out/steps.tsv"
  say "$name: status $status after $((SECONDS - start)) s of $limit"
  return "$status"
}

on_gpu="device and not emulator"
# test_groups is of linear_float and of linear_int8.
few="$on_gpu and (test_shapes or test_groups or test_bytes_and_inverse or test_int_mm or test_any_strides)"
pytest=("$python" -m pytest -q -p no:cacheprovider --tb=short)
grouped=tests/cuda/test_linear_int8_grouped.py
others=(tests/cuda --ignore="$grouped")

# sanitizer TOOL NAME ARGUMENTS...: pytest under one of compute-sanitizer's tools; 9 is what it found.
sanitizer() {
  step "$2" 200 compute-sanitizer --tool "$1" --error-exitcode 9 "${pytest[@]}" "${@:3}"
}

if [ "$built" -eq 1 ] || step build 240 "$python" setup.py build_ext --inplace; then
  # First and alone: where time runs out, tests are the part that can be had elsewhere.
  step bench 120 "$python" -m qkernels.bench.cuda "$out" --seconds 90
  # From here on there are more processes than CPUs.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
  # A process each: after a fault a process cannot use the GPU any more.
  for file in $(grep -l "ops: Any" tests/cuda/test_*.py) tests/nn/test_devices.py; do
    [ "$file" = "$grouped" ] || step "$(basename "$file" .py)" 200 "${pytest[@]}" "$file" -k "$on_gpu" &
  done
  for tool in memcheck racecheck synccheck; do
    sanitizer "$tool" "$tool" "${others[@]}" -x -k "$few" &
  done
  sanitizer memcheck memcheck_warpgroups "${others[@]}" -x -k "$on_gpu and warpgroups" &
  # Torch's own kernels take part here, so only for what no kernel may do.
  sanitizer memcheck memcheck_matmul tests/cuda/test_matmul.py -x -k "$on_gpu and test_products" &
  if [ "$arch" = 90a ]; then
    step grouped_wgmma_tests 200 "${pytest[@]}" "$grouped" -k "$on_gpu" &
    for tool in memcheck racecheck synccheck; do
      sanitizer "$tool" "grouped_wgmma_$tool" "$grouped" -k "$on_gpu and not again" &
    done
  fi
  wait
fi

"$python" scripts/gpu_check_report.py "$out"
