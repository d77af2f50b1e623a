#!/usr/bin/env bash
# On a machine with a GPU: builds the CUDA kernels against that machine's torch, runs the GPU benchmarks,
# and then, side by side, tests/cuda on the GPU and compute-sanitizer on a small set.
#
#   scripts/gpu_check.sh [--built] OUTDIR
#
# Takes less than ten minutes; with --built, which takes the libraries that are there, less than four.
# PYTHON picks the interpreter (python3 unless set), which needs torch with
# CUDA, setuptools, ninja, numpy, hypothesis, pytest and pytest-timeout; nothing is installed. OUTDIR
# gets check.md and check.json (what passed), gpu.md and gpu.json (times) and a log of each step. The
# status is 0 if everything passed.
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
failed=0

# step NAME SECONDS COMMAND...: its output goes to NAME.log.
step() {
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  printf '%s\t%s\t%s\n' "$name" "$status" $((SECONDS - start)) >>"$out/steps.tsv"
  if [ "$status" -eq 0 ]; then
    say "$name passed in $((SECONDS - start)) s"
  else
    failed=1
    say "$name failed with status $status (124: it took longer than $limit s); see $out/$name.log"
    tail -n 15 "$out/$name.log"
  fi
  return "$status"
}

on_gpu="device and not emulator"
few="$on_gpu and (test_shapes or test_groups or test_bytes_and_inverse or test_int_mm or test_any_strides)"
pytest=("$python" -m pytest -q -p no:cacheprovider --tb=short)

if [ "$built" -eq 1 ] || step build 240 "$python" setup.py build_ext --inplace; then
  # First and alone: where time runs out, tests are the part that can be had elsewhere.
  step bench 180 "$python" -m qkernels.bench.cuda "$out" --seconds 120
  # A process each: after a fault a process cannot use the GPU any more.
  for file in $(grep -l "ops: Any" tests/cuda/test_*.py) tests/nn/test_devices.py; do
    step "$(basename "$file" .py)" 120 "${pytest[@]}" "$file" -k "$on_gpu" &
  done
  for tool in memcheck racecheck synccheck; do
    step "$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "${pytest[@]}" tests/cuda -x -k "$few" &
  done
  step memcheck_warpgroups 120 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "${pytest[@]}" tests/cuda -x -k "$on_gpu and warpgroups" &
  # Torch's own kernels take part here, so only for what no kernel may do.
  step memcheck_matmul 120 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "${pytest[@]}" tests/cuda/test_matmul.py -x -k "$on_gpu and test_products" &
  wait
  cut -f 2 "$out/steps.tsv" | grep -qvx 0 && failed=1
fi

"$python" - "$out" <<'PYTHON' || failed=1
import json
import sys
from pathlib import Path

from qkernels.bench.cuda import facts

out = Path(sys.argv[1])
rows = [line.split("\t") for line in (out / "steps.tsv").read_text().splitlines()]
steps = [{"step": s, "status": int(status), "seconds": int(t)} for s, status, t in rows]
last = {s["step"]: (out / f"{s['step']}.log").read_text().rstrip().rpartition("\n")[2] for s in steps}
(out / "check.json").write_text(json.dumps({"facts": facts(), "steps": steps}, indent=1) + "\n")
lines = ["# GPU check", "", *(f"- {k}: {v}" for k, v in facts().items()), ""]
lines += ["| step | result | seconds | last line |", "| --- | --- | --- | --- |"]
for s in steps:
    word = "passed" if s["status"] == 0 else f"failed ({s['status']})"
    lines.append(f"| {s['step']} | {word} | {s['seconds']} | {last[s['step']].strip()[:120]} |")
(out / "check.md").write_text("\n".join(lines) + "\n")
PYTHON
rm -f "$out/steps.tsv"
exit "$failed"
