"""The streamed run finds the very codes that the slow way in memory finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.models import BUILDERS, randomise, save
from tests.quantization.reference import quantize_in_memory, stored_weight

import lightgptq
from lightgptq import QuantScheme
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.companions import arithmetic_on
from lightgptq.core.types import QuantizedWeight
from lightgptq.quantization import job
from lightgptq.quantization.calibration import CalibrationSet

SCHEMES = {
    "4-bit": QuantScheme(bits=4, group_size=32),
    "3-bit asymmetric, groups that follow the order": QuantScheme(
        bits=3, group_size=24, sym=False, static_groups=False
    ),
    "8-bit, one group, left to right": QuantScheme(bits=8, group_size=-1, act_order=False),
}


def assert_same(expected: dict[str, QuantizedWeight], out: Path, scheme: QuantScheme) -> None:
    """Bit for bit: both ways run the same operations in the same order on the same batches."""
    reader = CheckpointReader.open(out)
    quantized = {name.removesuffix(".qweight") for name in reader.names() if name.endswith(".qweight")}
    assert quantized == set(expected)
    for name, want in expected.items():
        have = stored_weight(reader, name, scheme, "gptq_v2")
        different = int((have.codes != want.codes).sum())
        assert different == 0, f"{name}: {different} of {want.codes.numel()} codes differ"
        assert torch.equal(have.scales, want.scales), name
        assert torch.equal(have.zeros, want.zeros), name
        assert torch.equal(have.g_idx, want.g_idx), name


@pytest.mark.parametrize("name", ["llama", "llama-untied", "opt", "opt-projected", "bloom", "gpt-neox"])
def test_streaming_finds_the_codes_of_the_slow_way_in_memory(
    name: str,
    model_folder: Callable[[str], Path],
    windows: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job, "BATCH_TOKENS", 4 * windows.seq_len)
    scheme = SCHEMES["4-bit"]
    lightgptq.quantize(
        model_folder(name), tmp_path / "out", scheme, calibration=windows, checkpoint_format="gptq_v2"
    )
    expected = quantize_in_memory(model_folder(name), scheme, list(windows.input_ids.split(4)))
    assert_same(expected, tmp_path / "out", scheme)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_streaming_finds_the_codes_of_the_slow_way_with_every_kind_of_scheme(
    scheme: QuantScheme, model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path
) -> None:
    lightgptq.quantize(
        model_folder("llama"), tmp_path / "out", scheme, calibration=windows, checkpoint_format="gptq_v2"
    )
    expected = quantize_in_memory(model_folder("llama"), scheme, [windows.input_ids])
    assert_same(expected, tmp_path / "out", scheme)


@pytest.mark.parametrize("saved", ["bfloat16", "float16", "sharded", "bin"])
def test_the_way_the_source_is_saved_does_not_matter(
    saved: str, windows: CalibrationSet, tmp_path: Path
) -> None:
    """bfloat16 sources are computed in bfloat16 where the CPU has it, float16 ones in float32: no CPU has float16."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(saved, torch.float32)
    source = save(
        randomise(BUILDERS["llama"]()),
        tmp_path / "source",
        dtype=dtype,
        shard_bytes=60_000 if saved == "sharded" else None,
        as_bin=saved == "bin",
    )
    if saved == "sharded":
        assert len(list(source.glob("model-*.safetensors"))) > 3
    scheme = SCHEMES["4-bit"]
    lightgptq.quantize(source, tmp_path / "out", scheme, calibration=windows, checkpoint_format="gptq_v2")
    compute = arithmetic_on(dtype, torch.device("cpu"))
    assert_same(quantize_in_memory(source, scheme, [windows.input_ids], compute), tmp_path / "out", scheme)
