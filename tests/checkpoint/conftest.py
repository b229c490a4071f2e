"""Small checkpoints on disk, written by the reference libraries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """One tensor of each kind that matters: widths, an empty one, a scalar, an odd length, a bool."""
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn((64, 8), generator=generator).bfloat16(),
        "model.layers.0.a.weight": torch.randn((5, 7), generator=generator),
        "model.layers.0.b.qweight": torch.randint(-(2**31), 2**31 - 1, (3, 4), generator=generator).int(),
        "model.layers.0.c.scales": torch.randn((1, 3), generator=generator).half(),
        "model.layers.1.d.empty": torch.empty((0, 4)),
        "model.layers.1.e.scalar": torch.tensor(7, dtype=torch.int64),
        "model.layers.1.f.mask": torch.tensor([True, False, True]),
        "model.norm.weight": torch.randn((8,), generator=generator).to(torch.float8_e4m3fn),
    }


@pytest.fixture
def single_folder(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    """config.json + model.safetensors."""
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def sharded_folder(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    """config.json + two shards + index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:4], names[4:]), 1):
        file_name = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file_name))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
