#!/usr/bin/env bash
# Builds the CPU library with gcc's address and undefined-behaviour sanitizers and runs the kernels'
# tests with it, on every instruction set of this machine. With --cuda instead the emulator of CUDA
# kernels and its tests.
#
#   scripts/sanitize.sh [--cuda] [PYTEST ARGUMENTS]
#
# The build goes to build/sanitize and leaves the normal one alone. The tests are tests/cpu and
# tests/ops, or those of tests/cuda that run on the emulator, unless the arguments name others. PYTHON picks the interpreter (python3 unless set), which
# needs what `make test` needs; QKERNELS_ISA names one instruction set instead of all. The status is 0
# if every test passed and the sanitizers reported nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
cuda=0
if [ "${1:-}" = --cuda ]; then
  cuda=1
  shift
fi
# Not resolved: a virtual environment's python is a link.
python=$(command -v "${PYTHON:-python3}")
case $python in /*) ;; *) python=$root/$python ;; esac
build=$root/build/sanitize

if [ "$cuda" -eq 0 ]; then
  QKERNELS_SANITIZE=1 QKERNELS_CUDA=0 "$python" setup.py --quiet build --build-lib "$build"
  export PYTHONPATH=$build
fi

cxx=${CXX:-g++}
# The runtimes have to come before all other libraries, and libasan looks up C++ functions when it starts.
runtimes=$(for library in libasan.so libstdc++.so; do $cxx -print-file-name=$library; done)
export LD_PRELOAD=${runtimes//$'\n'/:}
reports=$build/reports
rm -rf "$reports"
mkdir -p "$reports"
# Leaks: the interpreter frees little at exit. Memory that is refused is what some tests are about, and
# gets a warning. Reports go to files, since pytest captures the streams.
export ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1:log_path=$reports/address"
export UBSAN_OPTIONS="print_stacktrace=1:log_path=$reports/undefined"

if [ "$cuda" -eq 0 ]; then
  # In a folder without the normal library, which `python -m` would find first.
  cd "$build"
  "$python" -c "
from qkernels import _C
assert _C.__file__.startswith('$build'), _C.__file__
assert '__asan_' in open(_C.__file__, 'rb').read().decode('latin1'), 'built without sanitizers'"
  isas=${QKERNELS_ISA:-$("$python" -c "from qkernels import _C; print(*_C.available_isas())")}
  tests=("$root/tests/cpu" "$root/tests/ops")
else
  export QKERNELS_SANITIZE=1  # tests/helpers/cuda.py builds accordingly
  isas=$("$python" -c "from qkernels import _C; print(_C.available_isas()[-1])")
  mapfile -t tests < <(grep -l "ops: Any" "$root"/tests/cuda/test_*.py)
fi
for argument in "$@"; do
  [ -e "$root/${argument%%::*}" ] && tests=()
done
arguments=()
for argument in "$@"; do
  [ -e "$root/${argument%%::*}" ] && argument=$root/$argument
  arguments+=("$argument")
done

failed=0
for isa in $isas; do
  [ "$cuda" -eq 1 ] && printf 'sanitize: emulated kernels\n' || printf 'sanitize: %s kernels\n' "$isa"
  QKERNELS_ISA=$isa "$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" \
    -p no:cacheprovider -q "${tests[@]}" "${arguments[@]}" || failed=1
done

find "$reports" -type f | while read -r file; do
  grep -qvE '^$|WARNING: AddressSanitizer failed to allocate' "$file" || rm "$file"
done
if [ -n "$(ls -A "$reports")" ]; then
  failed=1
  head -n 60 "$reports"/* >&2
  printf 'sanitize: %s reports, in %s\n' "$(find "$reports" -type f | wc -l)" "$reports" >&2
fi
exit "$failed"
