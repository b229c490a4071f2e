"""Whatever architecture `quantize` writes, ``from_pretrained`` loads as `load` does, and saves as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.architectures.zoo import BUILDERS, STACKS, TOWERS, randomise

import lightgptq
from lightgptq import QuantScheme

SOME = ("gpt2", "phi3", "qwen3-moe", "bert-embedding", "t5")
ALL = list(dict.fromkeys([*BUILDERS, *STACKS, *TOWERS]))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SOME else pytest.mark.slow) for n in ALL])
def test_both_ways_of_loading_fill_every_tensor_alike(name: str, tmp_path: Path) -> None:
    """Conv1D, fused linears, experts, a body without a head, two stacks: bit for bit, also after saving."""
    builder = {**BUILDERS, **STACKS, **TOWERS}[name]
    randomise(builder()).save_pretrained(tmp_path / "original")
    scheme = QuantScheme(group_size=32, method="rtn")
    lightgptq.quantize(tmp_path / "original", tmp_path / "out", scheme)
    ours = lightgptq.load(tmp_path / "out", dtype="float32")
    want = ours.state_dict()
    theirs = type(ours).from_pretrained(tmp_path / "out", dtype="float32")
    theirs.save_pretrained(tmp_path / "again")
    again = type(ours).from_pretrained(tmp_path / "again", dtype="float32")
    for model in (theirs, again):
        have = model.state_dict()
        assert have.keys() == want.keys()
        for tensor in want:
            assert torch.equal(have[tensor], want[tensor]), tensor
        assert not any(buffer.is_meta for buffer in model.buffers())
    nonpersistent = dict(ours.named_buffers())
    for buffer, value in theirs.named_buffers():
        assert torch.equal(value, nonpersistent[buffer]), buffer
