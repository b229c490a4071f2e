"""Transformers with our hook for the length of a test, and checkpoints to load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lightgptq
from lightgptq import CalibrationSet, QuantScheme


@pytest.fixture(autouse=True)
def _tiny_models_on_one_thread(one_thread: None) -> None:
    pass


@pytest.fixture
def registered() -> Iterator[None]:
    """``lightgptq.register()`` for one test."""
    lightgptq.register()
    yield
    lightgptq.unregister()


@pytest.fixture(scope="session")
def mixed(
    model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A Llama of 4 bits, some linears of 8, one not quantized, a quantized head whose embedding was tied."""
    out = tmp_path_factory.mktemp("loading") / "mixed"
    rules = (r".*down_proj=bits:8,group_size:16", r".*layers\.1\..*up_proj=skip")
    lightgptq.quantize(
        model_folder("llama"), out, QuantScheme(group_size=32), calibration=windows, rules=rules, lm_head=True
    )
    return out


@pytest.fixture(scope="session")
def with_biases(
    model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An OPT with biases: 3 bits, asymmetric, zeros as they are (gptq_v2), permuted groups."""
    out = tmp_path_factory.mktemp("loading") / "opt"
    scheme = QuantScheme(bits=3, group_size=32, sym=False, static_groups=False)
    lightgptq.quantize(model_folder("opt"), out, scheme, calibration=windows, checkpoint_format="gptq_v2")
    return out
