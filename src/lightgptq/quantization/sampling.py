"""Text that the original model writes itself: windows for training on, without any document.

A model's own samples are what it was trained on as it sees it, so a quantized model that follows it there does so on
texts of every kind it knows, not only on the calibration text's (LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from lightgptq.skeleton import ModelSkeleton

WINDOWS_AT_ONCE = 64


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
        for batch in prompts.split(WINDOWS_AT_ONCE):
            batch = batch.to(skeleton.device)
            mask = torch.ones_like(batch)
            drawn.append(generate(batch, attention_mask=mask, generation_config=config).cpu())
    skeleton.release(model)
    return torch.cat(drawn)


def first_tokens(skeleton: ModelSkeleton, windows: Tensor, count: int) -> Tensor:
    """What ``count`` texts begin with, (count, 1): the start token, or what calibration windows begin with."""
    start = getattr(skeleton.model.config.get_text_config(), "bos_token_id", None)
    if start is not None:
        return torch.full((count, 1), int(start))
    return windows[torch.arange(count) % len(windows), :1]
