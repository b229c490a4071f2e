"""GPTQ codes as llama.cpp's blocks of 32: where a block type can hold code - zero, the weight survives exactly.

A block holds one float16 scale d and 32 integers x, and stands for ``d * x``:

    Q4_0   x in [-8, 7]       18 bytes   4-bit symmetric; 2- and 3-bit with any zero
    Q5_0   x in [-16, 15]     22 bytes   4-bit asymmetric
    Q8_0   x in [-128, 127]   34 bytes   8-bit symmetric

With ``x = code - zero`` and d the group's own scale this is GPTQ's ``scale * (code - zero)`` to the bit,
as long as the 32 inputs of each block share a group. Everything else is rounded once more, to Q8_0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightgptq.core.types import QuantizedWeight

BLOCK = 32
# name -> (lowest x, highest x, bytes of a block)
BLOCK_TYPES: dict[str, tuple[int, int, int]] = {
    "Q4_0": (-8, 7, 18),
    "Q5_0": (-16, 15, 22),
    "Q8_0": (-128, 127, 34),
}


@dataclass(frozen=True)
class BlockChoice:
    """The block type for one weight; ``exact`` is False when its values have to be rounded again."""

    type_name: str
    exact: bool
    reason: str


def choose_block_type(q: QuantizedWeight) -> BlockChoice:
    """The smallest block type that holds a weight exactly, else Q8_0 with the reason why none does.

    In F16 stand weights whose in_features is no multiple of 32, since no block type can hold them.
    """
    in_features = q.g_idx.numel()
    if in_features % BLOCK:
        return BlockChoice("F16", False, f"in_features {in_features} is no multiple of {BLOCK}")
    blocks = q.g_idx.view(-1, BLOCK)
    if bool((blocks != blocks[:, :1]).any()):
        return BlockChoice("Q8_0", False, f"some runs of {BLOCK} inputs belong to several groups")
    if q.scales.dtype != torch.float16 and not torch.equal(q.scales.half().to(q.scales.dtype), q.scales):
        return BlockChoice("Q8_0", False, f"scales are {q.scales.dtype} beyond float16")
    low, high = _code_range(q)
    for name, (lowest, highest, _) in BLOCK_TYPES.items():
        if lowest <= low and high <= highest:
            return BlockChoice(name, True, f"code - zero lies in [{low}, {high}]")
    return BlockChoice("Q8_0", False, f"code - zero runs from {low} to {high}, beyond 8 signed bits")


def encode(q: QuantizedWeight, choice: BlockChoice) -> NDArray[np.uint8]:
    """A weight in the chosen type, uint8 (out, bytes of a row)."""
    if choice.type_name == "F16":
        return q.dequantize().half().contiguous().view(torch.uint8).numpy()
    if not choice.exact:
        scales, x = _round_to_q8(q.dequantize())
        return pack_blocks("Q8_0", scales, x)
    first = q.g_idx.view(-1, BLOCK)[:, 0].long()  # (blocks,) group of each block
    zeros = q.zeros.index_select(0, first).t().to(torch.int16)  # (out, blocks)
    codes = q.codes.view(q.codes.shape[0], -1, BLOCK).to(torch.int16)
    scales = q.scales.half().index_select(0, first).t()
    return pack_blocks(choice.type_name, scales, codes - zeros.unsqueeze(-1))


def pack_blocks(type_name: str, scales: Tensor, x: Tensor) -> NDArray[np.uint8]:
    """Lay out blocks: the scale, then (Q5_0) the high bits, then the low bits with element j beside j + 16.

    scales  float16 (out, blocks)
    x       int16 (out, blocks, 32), within the type's range
    Returns uint8 (out, blocks * bytes of a block).
    """
    rows, blocks, _ = x.shape
    d = scales.contiguous().view(torch.uint8).view(rows, blocks, 2)
    if type_name == "Q8_0":
        parts = [d, x.to(torch.int8).view(torch.uint8)]
    else:
        unsigned = (x - BLOCK_TYPES[type_name][0]).to(torch.uint8)
        low = unsigned & 15
        nibbles = low[..., :16] | (low[..., 16:] << 4)
        parts = [d, nibbles]
        if type_name == "Q5_0":
            weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
            high = ((unsigned >> 4).view(rows, blocks, 4, 8) * weights).sum(-1).to(torch.uint8)
            parts = [d, high, nibbles]
    return torch.cat(parts, dim=-1).view(rows, -1).numpy()


def _code_range(q: QuantizedWeight) -> tuple[int, int]:
    """Smallest and largest code - zero; bounds from the zeros alone where these already decide."""
    top = (1 << q.bits) - 1
    low, high = -int(q.zeros.max()), top - int(q.zeros.min())
    if low >= -8 and high <= 7:
        return low, high
    group = q.g_idx.view(-1, BLOCK)[:, 0].long()
    zeros = q.zeros.index_select(0, group).t().to(torch.int16)
    codes = q.codes.view(q.codes.shape[0], -1, BLOCK).to(torch.int16)
    smallest, largest = torch.aminmax(codes, dim=-1)
    return int((smallest - zeros).min()), int((largest - zeros).max())


def _round_to_q8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight (out, in) to blocks of 8-bit integers with d = max |w| / 127."""
    blocks = weight.view(weight.shape[0], -1, BLOCK)
    scales = (blocks.abs().amax(-1) / 127).half()
    divisor = scales.float().clamp_min(torch.finfo(torch.float16).tiny)
    x = (blocks / divisor.unsqueeze(-1)).round().clamp(-127, 127)
    return scales, x.to(torch.int16)
