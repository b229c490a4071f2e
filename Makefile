# Everything runs in .venv, which the first target that needs it sets up. TORCH may name another build of PyTorch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test test-all test-oldest lint bench wheel setup clean

demo: setup
	$(BIN)/python examples/demo.py

test: setup lint
	$(BIN)/python -m pytest -m "not slow"

# The oldest Transformers that is supported, in a virtual environment of its own.
test-oldest: .venv-oldest/ready
	.venv-oldest/bin/python -m pytest tests/architectures tests/quantization/test_loading.py -m "not slow"

.venv-oldest/ready: pyproject.toml native/CMakeLists.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet "$(TORCH)" "transformers==5.17.*"
	.venv-oldest/bin/python -m pip install --quiet -e . pytest hypothesis
	touch .venv-oldest/ready

test-all: setup lint
	$(BIN)/python -m pytest
	scripts/native_tests.sh
	scripts/neon_tests.sh
	scripts/avx512_tests.sh

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m bench.bench_cpu_matmul
	$(BIN)/python -m bench.bench_solver
	$(BIN)/python -m bench.bench_repack
	$(BIN)/python -m bench.bench_generate
	$(BIN)/python -m bench.bench_streaming

wheel: setup
	PYTHON=$(BIN)/python scripts/build_wheel.sh

setup: .venv/ready

.venv/ready: pyproject.toml native/CMakeLists.txt $(wildcard native/src/* native/include/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch .venv/ready

clean:
	rm -rf .venv .venv-oldest build dist src/lightgptq/_native
