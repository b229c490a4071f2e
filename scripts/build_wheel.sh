#!/bin/sh
# Builds the wheel into dist/ and tests it in a clean environment: imports, native library, one product.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
rm -rf build/wheel-env && mkdir -p dist
"$python" -m pip wheel . --no-deps --wheel-dir dist
wheel=$(ls -t dist/lightgptq-*.whl | head -n 1)
"$python" -m venv build/wheel-env
build/wheel-env/bin/pip install --quiet ${TORCH_REQUIREMENT:-torch==2.13.0}
build/wheel-env/bin/pip install --quiet "$wheel" pytest hypothesis
cp -r tests build/wheel-env/tests
cd build/wheel-env
bin/python -c 'from lightgptq import native; assert native.available(); print("native library:", native.isa())'
bin/python -m pytest -q -p no:cacheprovider tests/test_native.py tests/ops
