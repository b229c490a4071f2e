"""Reading ahead gives the same tensors, each once, and its errors where the tensor is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.errors import CheckpointError
from lightgptq.quantization.blocks import DecoderBlock, find_blocks
from lightgptq.quantization.prefetch import Prefetch
from lightgptq.skeleton import ModelSkeleton


@pytest.fixture
def skeleton(model_folder: Callable[[str], Path]) -> ModelSkeleton:
    return ModelSkeleton.open(CheckpointReader.open(model_folder("llama")), dtype=torch.float32)


def weights(skeleton: ModelSkeleton, block: DecoderBlock) -> dict[str, torch.Tensor]:
    skeleton.materialise(block.module, block.name)
    values = {name: p.detach().clone() for name, p in block.module.named_parameters()}
    skeleton.release(block.module)
    return values


@pytest.mark.parametrize("copy", [False, True])
def test_blocks_read_ahead_are_the_blocks(skeleton: ModelSkeleton, copy: bool) -> None:
    blocks = find_blocks(skeleton.model)
    plain = skeleton.reader
    expected = [weights(skeleton, block) for block in blocks]
    with Prefetch(skeleton, copy=copy) as prefetch:
        for block, want in zip(blocks, expected, strict=True):
            prefetch.begin(block)
            found = weights(skeleton, block)
            assert found.keys() == want.keys()
            assert all(torch.equal(found[name], want[name]) for name in want)
            again = weights(skeleton, block)  # and what was handed out is not handed out twice
            assert all(again[name].data_ptr() != found[name].data_ptr() for name in want)
    assert skeleton.reader is plain


def test_a_reading_error_is_raised_where_the_tensor_is_used(
    skeleton: ModelSkeleton, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: CheckpointReader, name: str) -> torch.Tensor:
        raise CheckpointError(f"{name} was cut")

    block = find_blocks(skeleton.model)[0]
    with Prefetch(skeleton, copy=True) as prefetch:
        monkeypatch.setattr(CheckpointReader, "tensor", broken)
        prefetch.begin(block)
        with pytest.raises(CheckpointError, match="was cut"):
            skeleton.materialise(block.module, block.name)


def test_will_need_asks_for_every_file_format(model_folder: Callable[[str], Path]) -> None:
    reader = CheckpointReader.open(model_folder("llama"))
    for name in reader.names():
        reader.will_need(name)
