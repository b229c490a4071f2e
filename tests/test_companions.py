"""What a checkpoint's dtype computes in on a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lightgptq
from lightgptq.companions import arithmetic_on

MODEL = Path(__file__).parents[1] / "examples" / "pep-llama-6m"
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def capability(monkeypatch: pytest.MonkeyPatch, name: str, bfloat16: bool = False) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16)


@pytest.mark.parametrize(
    ("name", "bfloat16", "dense", "quantized"),
    [
        ("AVX2", False, torch.float32, torch.float32),
        ("AVX512", False, torch.float32, torch.bfloat16),
        ("AVX512", True, torch.bfloat16, torch.bfloat16),
        ("SVE256", False, torch.bfloat16, torch.bfloat16),
    ],
)
def test_bfloat16_is_computed_in_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, name: str, bfloat16: bool, dense: torch.dtype, quantized: torch.dtype
) -> None:
    capability(monkeypatch, name, bfloat16)
    assert arithmetic_on(torch.bfloat16, CPU) == dense
    assert arithmetic_on(torch.bfloat16, CPU, quantized=True) == quantized


def test_other_dtypes_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    capability(monkeypatch, "AVX2")
    assert arithmetic_on(torch.float16, CPU) == torch.float32
    assert arithmetic_on(torch.float64, CPU) == torch.float64
    assert arithmetic_on(torch.bfloat16, GPU) == torch.bfloat16


def test_a_bfloat16_model_goes_through_a_cpu_without_bfloat16_in_float32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run on such a CPU took four times as long before."""
    capability(monkeypatch, "AVX2")
    scheme = lightgptq.QuantScheme(bits=4)
    report = lightgptq.quantize(MODEL, tmp_path / "out", scheme, samples=2, seq_len=32)
    assert report.job["dtype"] == "float32"
    assert lightgptq.load(tmp_path / "out", device="cpu").dtype == torch.float32
    model = lightgptq.load(tmp_path / "out", device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
