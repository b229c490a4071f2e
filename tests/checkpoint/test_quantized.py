"""QuantizedCheckpoint reads any GPTQ checkpoint as integer codes, whatever its label says."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightgptq.checkpoint.quantized import QuantizedCheckpoint
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.errors import CheckpointError

MODULE = "model.layers.1.mlp.down_proj"


def opened(folder: Path) -> QuantizedCheckpoint:
    return QuantizedCheckpoint.of(CheckpointReader.open(folder))


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(fields)
    (folder / "config.json").write_text(json.dumps(config))


def test_modules_and_plain_tensors_are_told_apart(make_gptq_folder: Callable[..., Path]) -> None:
    checkpoint = opened(make_gptq_folder())
    assert len(checkpoint.modules) == 14
    assert sorted(checkpoint.plain_names())[0] == "model.embed_tokens.weight"
    assert len(list(checkpoint.plain_names())) == 6
    assert checkpoint.weight(MODULE).codes.shape == (64, 96)


@pytest.mark.parametrize("written", ["gptq", "gptq_v2"])
def test_a_mislabelled_format_changes_no_weight_and_is_said(
    make_gptq_folder: Callable[..., Path], written: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_gptq_folder(checkpoint_format=written, bits=4, group_size=32)
    right = opened(folder).weight(MODULE).dequantize()
    edit_config(folder, checkpoint_format="gptq_v2" if written == "gptq" else "gptq")
    with caplog.at_level(logging.WARNING):
        wrong = opened(folder).weight(MODULE).dequantize()
    assert torch.equal(right, wrong)
    assert f"reading it as '{written}'" in caplog.text


def test_a_missing_g_idx_is_the_trivial_one(make_gptq_folder: Callable[..., Path]) -> None:
    folder = make_gptq_folder(bits=3, group_size=32)
    expected = opened(folder).weight(MODULE)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}
    save_file(kept, folder / "model.safetensors")
    found = opened(folder).weight(MODULE)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.g_idx, expected.g_idx)


def test_a_config_that_contradicts_the_tensors_names_the_module(
    make_gptq_folder: Callable[..., Path],
) -> None:
    folder = make_gptq_folder(bits=4, group_size=32)
    edit_config(folder, bits=8)
    with pytest.raises(CheckpointError, match=r"self_attn\.k_proj"):
        opened(folder).weight("model.layers.0.self_attn.k_proj")
    edit_config(folder, bits=4, dynamic={"-:.*down_proj": {}})
    with pytest.raises(CheckpointError, match="the config says that it is not quantized"):
        opened(folder).weight(MODULE)


def test_an_unquantized_model_is_no_gptq_checkpoint(single_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no quantization_config"):
        opened(single_folder)
