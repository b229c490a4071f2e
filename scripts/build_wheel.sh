#!/usr/bin/env bash
# Builds the wheel into dist/ and tests it in a clean environment: imports, native library, products.
#
#   COMPILER=zig scripts/build_wheel.sh           with PyPI's ziglang, no system compiler: for any Linux from glibc 2.17 on
#   COMPILER=zig ARCH=aarch64 scripts/build_wheel.sh   for the other kind of machine, not tested here
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
machine=$(uname -m)
arch=${ARCH:-$machine}
rm -rf build/wheel && mkdir -p dist build/wheel
if [[ ${COMPILER:-system} == zig ]]; then
  "$python" -m venv build/wheel-tools
  build/wheel-tools/bin/pip install --quiet ziglang wheel
  export ZIG_PYTHON=$PWD/build/wheel-tools/bin/python ZIG_TARGET=$arch-linux-gnu.2.17 CXX=$PWD/scripts/zig-c++
  CMAKE_ARGS="-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$arch -DCMAKE_MODULE_LINKER_FLAGS=-s" \
    "$python" -m pip wheel . --no-deps --wheel-dir build/wheel --config-settings=install.strip=false
  "$ZIG_PYTHON" -m wheel tags --remove --platform-tag "manylinux_2_17_$arch" build/wheel/lightgptq-*.whl
elif [[ $arch == "$machine" ]]; then
  "$python" -m pip wheel . --no-deps --wheel-dir build/wheel
else
  echo "building for $arch on $machine needs COMPILER=zig" >&2
  exit 2
fi
wheel=$(basename build/wheel/lightgptq-*.whl)
"$python" -m zipfile -l "build/wheel/$wheel" | grep liblightgptq || { echo "$wheel has no native library" >&2; exit 1; }
cp "build/wheel/$wheel" dist/
echo "dist/$wheel"
if [[ $arch != "$machine" ]]; then
  echo "for $arch: not tested here"
  exit 0
fi
rm -rf build/wheel-env
"$python" -m venv build/wheel-env
build/wheel-env/bin/pip install --quiet "${TORCH_REQUIREMENT:-torch==2.13.0}"
build/wheel-env/bin/pip install --quiet "dist/$wheel" pytest hypothesis
cp -r tests build/wheel-env/tests
cd build/wheel-env
bin/python -c 'from lightgptq import native; assert native.available(); print("native library:", native.isa())'
bin/python -m pytest -q -p no:cacheprovider tests/test_native.py tests/ops tests/core/test_sweep_cpu.py tests/core/test_gram_cpu.py
