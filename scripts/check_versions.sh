#!/usr/bin/env bash
# Builds qkernels for other releases of Python and torch, imports it and runs some of its tests.
#
#   scripts/check_versions.sh [PYTHON:TORCH ...]
#
# Each pair, such as 3.10:2.10.0, gets a copy of the sources and an environment in build/versions, both
# deleted afterwards. pip brings torch, for CUDA where that is what its index has: 3 GB to download and
# 6 GB of disk for each release. No GPU is needed. Where the checkout has the library of CUDA kernels, it
# has to load there too, since one build serves every torch. A pair whose Python is not on this machine
# is reported as not run. Ends with a table; the status is 0 if no pair failed and at least one ran.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
root=$PWD
work=$root/build/versions
tests=(tests/core tests/nn/test_linear.py tests/nn/test_conv.py tests/nn/test_model_files.py
  tests/nn/test_package.py tests/nn/test_processes.py tests/ops)

# The oldest torch that is supported, the first for CUDA 13, the one that requirements/ name, a newer one.
pairs=("$@")
[ $# -gt 0 ] || pairs=(3.10:2.10.0 3.11:2.11.0 3.12:2.13.0 3.13:2.14.1)

say() { printf 'check_versions: %s\n' "$*"; }

# The interpreter of a version such as 3.12, on the path or one that pyenv has.
interpreter() {
  local python
  for python in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1."*/bin/python; do
    if "$python" -c "import sys, venv; assert '%d.%d' % sys.version_info[:2] == '$1'" 2>/dev/null; then
      command -v "$python"
      return
    fi
  done
  return 1
}

# In a copy of the sources whose environment is ./env: prints what there is and whether it works.
look() {
  env/bin/python - <<'PYTHON'
import platform

import torch

import qkernels as qk
from qkernels import _cuda

x, w = torch.randn(8, 256), torch.nn.Linear(256, 64)
layer = qk.nn.QLinear.from_float(w, qk.W8A8())
error = ((layer(x) - w(x)).norm() / w(x).norm()).item()
assert error < 0.02, error
built = _cuda.LIBRARY.exists()
if torch.version.cuda and built:
    assert not _cuda.PROBLEM, _cuda.PROBLEM
cuda = torch.version.cuda or "none"
kernels = "not built" if not built else "load" if not _cuda.PROBLEM else "not loaded: CPU torch"
print(f"{platform.python_version()} | {torch.__version__} | {cuda} | {kernels}")
PYTHON
}

# step COMMAND...: its output goes to the pair's log.
step() {
  "$@" >>"$log" 2>&1 || { say "$pair failed at: $*; the end of $log:"; tail -n 20 "$log"; return 1; }
}

# One pair, in its folder; appends a row to the table.
check() {
  local python=$1 torch=$2 facts
  rm -rf "$folder" && mkdir -p "$folder" && : >"$log" || return 1
  git ls-files -z csrc docs qkernels tests pyproject.toml setup.py README.md LICENSE |
    xargs -0 cp --parents -t "$folder" || return 1
  [ ! -e qkernels/_C_cuda.so ] || cp qkernels/_C_cuda.so "$folder/qkernels/" || return 1
  # What the other tools are is as in `make test`; torch decides about what it needs itself.
  grep -E '^(hypothesis|ninja|pytest|pytest-timeout|rich|safetensors)==' requirements/constraints.txt \
    >"$folder/constraints.txt"
  cd "$folder" || return 1
  step "$python" -m venv env || return 1
  step env/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt \
    "torch==$torch" "setuptools>=77" wheel ninja numpy rich safetensors hypothesis pytest \
    pytest-timeout || return 1
  QKERNELS_CUDA=0 step env/bin/python setup.py build_ext --inplace || return 1
  facts=$(look 2>>"$log") || { say "$pair does not work:"; tail -n 20 "$log"; return 1; }
  say "$facts"
  step env/bin/python -m pytest -q -p no:cacheprovider "${tests[@]}" || return 1
  printf '| %s | %s |\n' "$facts" "$(tail -n 1 "$log" | tr -d '=')" >>"$table"
}

mkdir -p "$work" || exit 2
table=$work/table.md
printf '| Python | torch | its CUDA | CUDA kernels | tests |\n| --- | --- | --- | --- | --- |\n' >"$table"
failed=0 ran=0
for pair in "${pairs[@]}"; do
  folder=$work/${pair/:/-}  # a colon cannot be in the path of an environment
  log=$folder.log
  if ! python=$(interpreter "${pair%%:*}"); then
    printf '| %s | %s | | | not run: no such Python here |\n' "${pair%%:*}" "${pair##*:}" >>"$table"
    continue
  fi
  ran=1
  (check "$python" "${pair##*:}") || {
    failed=1
    printf '| %s | %s | | | failed, see %s |\n' "${pair%%:*}" "${pair##*:}" "$log" >>"$table"
  }
  rm -rf "$folder"
done
cat "$table"
[ "$ran" -eq 1 ] || say "none of these versions of Python is here"
[ "$failed" -eq 0 ] && [ "$ran" -eq 1 ]
