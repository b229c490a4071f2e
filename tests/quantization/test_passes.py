"""Each calibration token goes through each block once; doing it again instead of waiting gives the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.folders import contents
from torch import Tensor, nn

import lightgptq
from lightgptq import QuantScheme
from lightgptq.quantization import job
from lightgptq.quantization.calibration import CalibrationSet

BATCHES = 6
SCHEME = QuantScheme(bits=4, group_size=32)


@pytest.fixture(autouse=True)
def _small_batches(windows: CalibrationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "BATCH_TOKENS", windows.input_ids.numel() // BATCHES)


@contextmanager
def counted_tokens() -> Iterator[Counter[int]]:
    """Tokens that each linear's arithmetic saw, in order of first use; what runs without data does not count."""
    seen: Counter[int] = Counter()
    alive: list[nn.Linear] = []  # so that no id is given twice
    original = nn.Linear.forward

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        if input.device.type == "meta":
            return original(self, input)
        if id(self) not in seen:
            alive.append(self)
        seen[id(self)] += input.numel() // input.shape[-1]
        return original(self, input)

    nn.Linear.forward = forward  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        nn.Linear.forward = original  # type: ignore[method-assign]


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "gpt-neox"])
def test_every_token_passes_every_linear_once(
    name: str, model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    with counted_tokens() as seen:
        report = lightgptq.quantize(model_folder(name), tmp_path / "out", SCHEME, calibration=windows)
    total = windows.input_ids.numel()
    per_block = len(report.modules) // 2
    assert (
        list(seen.values()) == [total + total // BATCHES] * per_block + [total] * per_block
    )  # the probe: one batch


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "gpt-neox"])
def test_replaying_gives_the_same_bytes_as_waiting(
    name: str, model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    lightgptq.quantize(model_folder(name), tmp_path / "waiting", SCHEME, calibration=windows)
    with counted_tokens() as seen:
        lightgptq.quantize(
            model_folder(name), tmp_path / "replayed", SCHEME, calibration=windows, max_memory=1
        )
    assert max(seen.values()) >= 4 * windows.input_ids.numel(), "nothing was replayed"
    assert contents(tmp_path / "replayed") == contents(tmp_path / "waiting")


def test_the_batch_size_hardly_matters(
    model_folder: Callable[[str], Path],
    windows: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the order of float32 sums changes: at most a few codes in a thousand flip."""
    many = lightgptq.quantize(model_folder("llama"), tmp_path / "many", SCHEME, calibration=windows)
    monkeypatch.setattr(job, "BATCH_TOKENS", windows.input_ids.numel())
    one = lightgptq.quantize(model_folder("llama"), tmp_path / "one", SCHEME, calibration=windows)
    for a, b in zip(many.modules, one.modules, strict=True):
        assert a.tokens == b.tokens == windows.input_ids.numel()
        assert a.relative_loss == pytest.approx(b.relative_loss, rel=0.02)


def test_the_same_run_twice_gives_the_same_bytes(
    model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    for out in ("first", "second"):
        lightgptq.quantize(model_folder("opt"), tmp_path / out, SCHEME, calibration=windows)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert torch.is_grad_enabled()
