"""Windows that the original model writes: how many at a time, and what is in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, GPT2Config, LlamaConfig, PretrainedConfig

from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.quantization import sampling
from lightgptq.quantization.sampling import first_tokens, sample_windows, windows_at_once
from lightgptq.skeleton import ModelSkeleton

LLAMA = LlamaConfig(
    num_hidden_layers=16, hidden_size=2048, num_attention_heads=32, num_key_value_heads=8, head_dim=64
)


@pytest.mark.parametrize(
    ("config", "seq_len", "itemsize", "expected"),
    [
        (LLAMA, 2048, 2, 16),  # 2 x 16 x 512 x 2048 x 2 bytes: 64 MiB a window
        (LLAMA, 2048, 4, 8),
        (LLAMA, 16, 2, 512),
        (GPT2Config(n_layer=4, n_embd=1024, n_head=16), 1024, 4, 32),
        (BloomConfig(n_layer=4, hidden_size=1024, n_head=16), 1024, 4, 32),
        (LLAMA, 1 << 20, 4, 1),
    ],
)
def test_so_many_windows_as_their_keys_and_values_have_room(
    config: PretrainedConfig, seq_len: int, itemsize: int, expected: int
) -> None:
    assert windows_at_once(config, seq_len, itemsize) == expected


def test_windows_begin_with_the_prompt_and_never_end(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "WINDOWS_AT_ONCE", 3)
    skeleton = ModelSkeleton.open(CheckpointReader.open(model_folder("llama")), dtype=torch.float32)
    prompts = first_tokens(skeleton, torch.zeros(1, 1, dtype=torch.long), 7)
    drawn = sample_windows(skeleton, prompts, 12, seed=4)
    assert drawn.shape == (7, 12)
    assert torch.equal(drawn[:, :1], prompts)
    assert not bool((drawn[:, 1:] == skeleton.model.generation_config.eos_token_id).any())
    assert torch.equal(drawn, sample_windows(skeleton, prompts, 12, seed=4))
    assert not torch.equal(drawn, sample_windows(skeleton, prompts, 12, seed=5))
