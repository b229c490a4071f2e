"""GPTQ -> compressed-tensors -> GPTQ gives the same weights, with valid configs on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightgptq.checkpoint.conversion import export_compressed_tensors, import_compressed_tensors
from lightgptq.checkpoint.quantized import QuantizedCheckpoint
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.errors import CheckpointError

CASES: list[dict[str, Any]] = [
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
    {"bits": 8, "group_size": -1},
    {"bits": 3, "group_size": 32, "sym": False},
    {"bits": 2, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_there_and_back_keeps_every_weight(
    make_gptq_folder: Callable[..., Path], tmp_path: Path, case: dict[str, Any]
) -> None:
    folder = make_gptq_folder(**case)
    export_compressed_tensors(folder, tmp_path / "ct")
    import_compressed_tensors(tmp_path / "ct", tmp_path / "back")
    before, after = (QuantizedCheckpoint.of(CheckpointReader.open(f)) for f in (folder, tmp_path / "back"))
    assert before.modules == after.modules
    for module in before.modules:
        assert torch.equal(before.weight(module).dequantize(), after.weight(module).dequantize()), module
    for name in before.plain_names():
        assert torch.equal(before.reader.tensor(name), after.reader.tensor(name))
    assert (tmp_path / "ct" / "tokenizer.json").is_file()


def test_mixed_schemes_keep_theirs(make_gptq_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_gptq_folder(bits=4, group_size=32)
    other = make_gptq_folder("other", bits=8, group_size=32)
    # Block 1 comes from the 8-bit checkpoint, under a rule.
    one, two = (CheckpointReader.open(f) for f in (folder, other))
    tensors = {n: (two if ".layers.1." in n else one).tensor(n) for n in one.names()}
    from_rule = json.loads((folder / "config.json").read_text())
    from_rule["quantization_config"]["dynamic"] = {r"model\.layers\.1\.": {"bits": 8}}
    (folder / "config.json").write_text(json.dumps(from_rule))
    save_file(tensors, folder / "model.safetensors")
    export_compressed_tensors(folder, tmp_path / "ct")
    raw = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert sorted(group["weights"]["num_bits"] for group in raw["config_groups"].values()) == [4, 8]
    import_compressed_tensors(tmp_path / "ct", tmp_path / "back")
    back = QuantizedCheckpoint.of(CheckpointReader.open(tmp_path / "back"))
    assert {back.scheme(module).bits for module in back.modules if ".layers.1." in module} == {8}
    assert {back.scheme(module).bits for module in back.modules if ".layers.0." in module} == {4}


def test_the_written_config_is_what_readers_look_for(
    make_gptq_folder: Callable[..., Path], tmp_path: Path
) -> None:
    export_compressed_tensors(make_gptq_folder(bits=4, group_size=32), tmp_path / "ct")
    raw = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert raw["quant_method"] == "compressed-tensors"
    assert raw["format"] == "pack-quantized"
    assert raw["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert "lm_head" in raw["ignore"]


def test_permuted_groups_are_refused(make_gptq_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_gptq_folder(bits=4, group_size=32, permuted=True, act_order=True, static_groups=False)
    with pytest.raises(CheckpointError, match="has permuted groups"):
        export_compressed_tensors(folder, tmp_path / "ct")
    assert not (tmp_path / "ct").exists()


def test_a_gptq_checkpoint_is_no_compressed_one(
    make_gptq_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="only 'pack-quantized' can be read"):
        import_compressed_tensors(make_gptq_folder(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
