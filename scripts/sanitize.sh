#!/usr/bin/env bash
# Runs the tests of the operators with the CPU code under AddressSanitizer and UndefinedBehaviorSanitizer.
#   scripts/sanitize.sh PYTHON [pytest arguments]        PYTHON: an interpreter with torch and the test requirements
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: scripts/sanitize.sh PYTHON [pytest arguments]}
shift
tests=("$@")
[ ${#tests[@]} -gt 0 ] || tests=(tests/test_product_key_topk.py tests/test_value_gather.py tests/test_chunk_scan.py
  tests/test_golden.py tests/test_edges.py tests/test_bad_input.py)

flags="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"
cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=None -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
  -DFWPKM_WITH_CUDA=OFF -DFWPKM_WITH_PYBIND=OFF -DCMAKE_CXX_FLAGS="$flags"
cmake --build build/sanitize
# The package as it is, with the instrumented library in it.
mkdir -p build/sanitize/python/fwpkm_cuda
cp python/fwpkm_cuda/*.py build/sanitize/python/fwpkm_cuda/
cmake --install build/sanitize --prefix build/sanitize/python

compiler=${CXX:-c++}
sanitizers="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libubsan.so)"
export PYTHONPATH=build/sanitize/python PYTHONSAFEPATH=1
# Leaks: the interpreter's own would be reported. Some bad inputs ask for more memory than there is.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD="$sanitizers" "$python" -c 'import fwpkm_cuda; print("tested:", fwpkm_cuda.library_path())'
LD_PRELOAD="$sanitizers" "$python" -m pytest -q -p no:cacheprovider "${tests[@]}"
