#!/usr/bin/env bash
# Builds the native tests with sanitizers for a CPU without AVX-512, or without its bfloat16 dot products, and runs both
# kinds of AVX-512 kernels on it, their intrinsics emulated by SIMDe (Debian's libsimde-dev). Emulation says what is
# correct, not what is fast, and not what compilers make of the real intrinsics. Takes minutes, most of them to compile.
# Usage: scripts/avx512_tests.sh [SANITIZERS], as in -fsanitize=; default: address,undefined.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
flags=" $(grep -m 1 '^flags' /proc/cpuinfo 2>/dev/null || true) "
if [[ $flags == *" avx512_bf16 "* ]]; then
  echo "AVX-512: this CPU has it, scripts/native_tests.sh runs it"
  exit 0
fi
if [[ $flags != *" avx2 "* ]]; then
  echo "AVX-512: NOT TESTED, its emulation needs a CPU with AVX2, under Linux"
  exit 0
fi
if ! "${CXX:-c++}" -E -x c++ - <<<'#include <simde/x86/avx512.h>' >/dev/null 2>&1; then
  echo "AVX-512: NOT TESTED, there is no SIMDe here (Debian: apt-get install libsimde-dev)"
  exit 0
fi
sanitizers=${1:-address,undefined}
folder=build/native-tests-avx512-${sanitizers//,/-}
mkdir -p build
cmake -G Ninja -S native -B "$folder" -DLGQ_TESTS=ON -DLGQ_EMULATE_AVX512=ON -DLGQ_OPENMP=OFF \
  "-DLGQ_SANITIZE=$sanitizers" -DCMAKE_BUILD_TYPE=Release "-DLGQ_OUTPUT_DIRECTORY=$PWD/$folder" \
  >"$folder.log" 2>&1 || { cat "$folder.log"; exit 1; }
cmake --build "$folder" --target lightgptq_tests >>"$folder.log" 2>&1 || { tail -n 50 "$folder.log"; exit 1; }
echo "native tests with -fsanitize=$sanitizers, AVX-512 emulated"
UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 "$folder/lightgptq_tests" | tee "$folder.out"
if ! grep -q avx512_bf16 "$folder.out"; then
  echo "AVX-512 is emulated, yet the library did not offer it"
  exit 1
fi
