"""Where a checkpoint was damaged: the error each module adds, and how it grows from block to block."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightgptq.quantization.blocks import DecoderBlock, find_blocks
from lightgptq.quantization.report import ModuleRecord

# Enough for an error averaged over tokens and features; the text's first windows are taken.
PROBE_TOKENS = 2048


@dataclass(frozen=True)
class BlockError:
    """What one decoder block puts out, beside the original's.

    name   in the model
    error  sum of squared differences over the sum of squares, over all tokens and features: with everything before
           the block quantized as well
    """

    name: str
    error: float


@torch.no_grad()
def block_errors(model: PreTrainedModel, original: PreTrainedModel, windows: Tensor) -> list[BlockError]:
    """The relative error of every block's output on the first tokens of ``windows`` (n, seq_len) int64.

    The first token of each window is left out: many models put values there that dwarf all others.
    """
    blocks = find_blocks(original)
    ids = windows[: max(1, PROBE_TOKENS // windows.shape[1])]
    expected = _outputs(original, blocks, ids)
    found = _outputs(model, blocks, ids)
    errors = []
    for block in blocks:
        want, have = expected[block.name][:, 1:].double(), found[block.name][:, 1:].double()
        errors.append(BlockError(block.name, float((have - want).square().sum() / want.square().sum())))
    return errors


def worst_modules(modules: list[ModuleRecord], count: int) -> list[ModuleRecord]:
    """The modules that lose most of what they put out, worst first."""
    measured = [m for m in modules if m.relative_loss is not None]
    return sorted(measured, key=lambda m: -(m.relative_loss or 0.0))[:count]


def _outputs(model: PreTrainedModel, blocks: list[DecoderBlock], ids: Tensor) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, (tuple, list)) else output
            outputs[name] = hidden.detach().float().cpu()

        return hook

    with ExitStack() as stack:
        for block in blocks:
            handle = model.get_submodule(block.name).register_forward_hook(keep(block.name))
            stack.callback(handle.remove)
        model(input_ids=ids.to(model.device), use_cache=False)
    return outputs
