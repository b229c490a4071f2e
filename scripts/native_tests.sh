#!/usr/bin/env bash
# Builds the native tests with sanitizers and runs them on every instruction set of this machine.
# Usage: scripts/native_tests.sh [SANITIZERS...], each as in -fsanitize=; default: address,undefined.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
mkdir -p build
for sanitizer in "${@:-address,undefined}"; do
  folder="build/native-tests-${sanitizer//,/-}"
  cmake -G Ninja -S native -B "$folder" -DLGQ_TESTS=ON -DLGQ_OPENMP=OFF "-DLGQ_SANITIZE=$sanitizer" \
    -DCMAKE_BUILD_TYPE=Release "-DLGQ_OUTPUT_DIRECTORY=$PWD/$folder" >"$folder.log" 2>&1 || { cat "$folder.log"; exit 1; }
  cmake --build "$folder" --target lightgptq_tests >>"$folder.log" 2>&1 || { tail -n 50 "$folder.log"; exit 1; }
  echo "native tests with -fsanitize=$sanitizer"
  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 "$folder/lightgptq_tests"
done
