"""Text that the original model writes itself: windows for training on, without any document.

A model's own samples are what it was trained on as it sees it, so a quantized model that follows it there does so on
texts of every kind it knows, not only on the calibration text's (LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from lightgptq.skeleton import ModelSkeleton

# Of keys and values at a time; not a share of what is free, since a draw depends on its neighbours.
CACHE_BYTES = 1 << 30
WINDOWS_AT_ONCE = 512


@torch.no_grad()
def sample_windows(skeleton: ModelSkeleton, prompts: Tensor, seq_len: int, seed: int = 0) -> Tensor:
    """One window of ``seq_len`` tokens for each row of ``prompts`` (windows, tokens), drawn at temperature 1.

    The whole model is in memory meanwhile and released afterwards. The end of a text is never drawn.
    """
    model = skeleton.model
    skeleton.materialise(model, "")
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=seq_len - prompts.shape[1],
        min_new_tokens=seq_len - prompts.shape[1],
        eos_token_id=model.generation_config.eos_token_id if model.generation_config else None,
        pad_token_id=0,
        use_cache=True,
    )
    drawn: list[Tensor] = []
    generate = cast(Callable[..., Tensor], model.generate)
    devices = [skeleton.device] if skeleton.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for batch in prompts.split(windows_at_once(model.config, seq_len, skeleton.dtype.itemsize)):
            batch = batch.to(skeleton.device)
            mask = torch.ones_like(batch)
            drawn.append(generate(batch, attention_mask=mask, generation_config=config).cpu())
    skeleton.release(model)
    return torch.cat(drawn)


def windows_at_once(config: PretrainedConfig, seq_len: int, itemsize: int) -> int:
    """How many windows of ``seq_len`` tokens are drawn together: a model reads its weights once for all of them.

    itemsize  bytes of a key's or value's element

    Only the model and the length decide, so that the same seed draws the same windows on every machine.
    """
    text = config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 1))
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    width *= int(getattr(text, "num_key_value_heads", None) or heads)
    window = 2 * int(text.num_hidden_layers) * width * seq_len * itemsize
    return max(1, min(WINDOWS_AT_ONCE, CACHE_BYTES // window))


def first_tokens(skeleton: ModelSkeleton, windows: Tensor, count: int) -> Tensor:
    """What ``count`` texts begin with, (count, 1): the start token, or what calibration windows begin with."""
    start = getattr(skeleton.model.config.get_text_config(), "bos_token_id", None)
    if start is not None:
        return torch.full((count, 1), int(start))
    return windows[torch.arange(count) % len(windows), :1]
