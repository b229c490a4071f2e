"""Runs on a GPU; without one there is nothing to run (the kernels are interpreted elsewhere)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.folders import contents

import lightgptq
from lightgptq import QuantReport, QuantScheme
from lightgptq.quantization import job, run
from lightgptq.quantization.calibration import CalibrationSet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SCHEME = QuantScheme(group_size=32)


@pytest.fixture(autouse=True)
def several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "BATCH_TOKENS", 3 * 48)


def quantize(
    source: Path, out: Path, windows: CalibrationSet, scheme: QuantScheme = SCHEME, **options: object
) -> QuantReport:
    return lightgptq.quantize(source, out, scheme, calibration=windows, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "gpt-neox"])
@pytest.mark.parametrize(
    "scheme",
    [
        SCHEME,
        QuantScheme(group_size=32, static_groups=False),
        QuantScheme(group_size=32, mismatch=1.0, refine=1),
    ],
    ids=["fast", "dynamic", "balanced"],
)
def test_losses_are_those_of_a_cpu(
    name: str,
    scheme: QuantScheme,
    model_folder: Callable[[str], Path],
    windows: CalibrationSet,
    tmp_path: Path,
) -> None:
    """Rounding sends a few rows another way; their losses go up or down by a few per cent each, not together."""
    here = quantize(model_folder(name), tmp_path / "cpu", windows, scheme, device="cpu")
    there = quantize(model_folder(name), tmp_path / "gpu", windows, scheme, device="cuda")
    assert not there.problems
    assert there.peak_device_bytes is not None
    assert there.peak_device_bytes > 0
    for mine, other in zip(here.modules, there.modules, strict=True):
        assert mine.name == other.name
        assert mine.relative_loss == pytest.approx(other.relative_loss, rel=0.1)


def test_the_same_inputs_give_the_same_bytes(
    model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    scheme = QuantScheme(group_size=32, mismatch=1.0, refine=1)
    for out in ("one", "two"):
        quantize(model_folder("llama"), tmp_path / out, windows, scheme, device="cuda")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize(("device", "host"), [(0, 0), (1 << 30, 0), (0, 1 << 30)])
def test_where_activations_are_kept_changes_no_byte(
    device: int,
    host: int,
    model_folder: Callable[[str], Path],
    windows: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantize(model_folder("llama"), tmp_path / "plain", windows, device="cuda")

    def place(self: run.QuantizeRun, waiting: int, of_one_batch: int, budget: int) -> bool:
        assert self.flow is not None
        self.flow.once, self.flow.device_bytes, self.flow.host_bytes = False, device, host
        return True

    monkeypatch.setattr(run.QuantizeRun, "_place_activations", place)
    quantize(model_folder("llama"), tmp_path / "placed", windows, device="cuda")
    assert contents(tmp_path / "plain") == contents(tmp_path / "placed")
