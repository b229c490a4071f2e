#!/usr/bin/env bash
# Builds the native tests for 64-bit Arm and runs them under emulation: NEON, and the portable kernels that a CPU without
# the dot product gets. Needs qemu-user and a compiler for Arm, Debian's g++-aarch64-linux-gnu or PyPI's ziglang
# (ZIG_PYTHON names the Python that has it). Emulation says what is correct, not what is fast.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
if [[ $(uname -m) == aarch64 ]]; then
  echo "NEON: this machine is an Arm, scripts/native_tests.sh runs it"
  exit 0
fi
emulator=$(command -v qemu-aarch64-static || command -v qemu-aarch64 || true)
if [[ -z $emulator ]]; then
  echo "NEON: NOT TESTED, there is no qemu-aarch64 here (Debian: apt-get install qemu-user-static)"
  exit 0
fi
if compiler=$(command -v aarch64-linux-gnu-g++); then
  :
elif "${ZIG_PYTHON:-python3}" -c 'import ziglang' 2>/dev/null; then
  compiler=$PWD/scripts/zig-c++
  export ZIG_TARGET=aarch64-linux-musl
else
  echo "NEON: NOT TESTED, there is no compiler for Arm here (Debian: g++-aarch64-linux-gnu; PyPI: ziglang)"
  exit 0
fi
folder=build/native-tests-aarch64
mkdir -p build
cmake -G Ninja -S native -B $folder -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  "-DCMAKE_CXX_COMPILER=$compiler" -DCMAKE_EXE_LINKER_FLAGS=-static -DLGQ_TESTS=ON -DLGQ_OPENMP=OFF \
  "-DLGQ_OUTPUT_DIRECTORY=$PWD/$folder" >$folder.log 2>&1 || { cat $folder.log; exit 1; }
cmake --build $folder --target lightgptq_tests >>$folder.log 2>&1 || { tail -n 50 $folder.log; exit 1; }
for cpu in max cortex-a53; do
  echo "native tests for Arm, emulated $cpu"
  "$emulator" -cpu $cpu $folder/lightgptq_tests | tee $folder.out
done
if grep -q neon $folder.out; then
  echo "an emulated Cortex-A53 has no dot product, yet the library offered NEON"
  exit 1
fi
