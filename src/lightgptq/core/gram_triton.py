"""``H += X^T X`` on a GPU: the upper triangle's tiles only, 16-bit activations, float32 sums.

Products of two bfloat16 or float16 values are exact in float32, so the matrix unit loses nothing by taking the
activations as they are; only the sums round. A full product would compute every element off the diagonal twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightgptq.errors import UsageError

GRAM_DTYPES = (torch.bfloat16, torch.float16)
TILE = 128  # of H, both ways: 64 KiB of sums in the registers of 8 warps
TOKENS = 64  # rows of X per step


@triton.jit(do_not_specialize=["tokens"])
def gram_tile(
    H: tl.tensor,  # float32 (in, in)
    X: tl.tensor,  # bfloat16 or float16 (tokens, in)
    tokens: tl.tensor,
    in_features: tl.tensor,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Adds one tile of ``X^T X`` to H; tiles below the diagonal are left alone."""
    across, down = tl.program_id(0), tl.program_id(1)
    if across < down:
        return
    rows = down * TILE + tl.arange(0, TILE)
    cols = across * TILE + tl.arange(0, TILE)
    steps = tl.arange(0, TOKENS)
    stride = in_features.to(tl.int64)
    left = X + steps[:, None] * stride + rows[None, :]
    right = X + steps[:, None] * stride + cols[None, :]
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for first in range(0, tokens, TOKENS):
        there = (first + steps < tokens)[:, None]
        a = tl.load(left, mask=there & (rows < in_features)[None, :], other=0.0)
        b = tl.load(right, mask=there & (cols < in_features)[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total)
        left += TOKENS * stride
        right += TOKENS * stride
    place = H + rows[:, None] * stride + cols[None, :]
    inside = (rows < in_features)[:, None] & (cols < in_features)[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


def add_gram_triton(H: Tensor, X: Tensor) -> None:
    """``H += X^T X`` in place on and above the diagonal; what is below becomes unspecified.

    Sums of all tokens of X run in float32 before they are added to H: with t tokens an element is off by at most
    ``(t + 1) 2^-23 sum |x_i x_j|`` (matrix units round their sums toward zero), in practice by the root of that count.

    H  float32 (in, in), contiguous
    X  bfloat16 or float16 (tokens, in) on H's device

    Raises UsageError for other shapes, dtypes or devices.
    """
    in_features = H.shape[0]
    if (
        H.dtype != torch.float32
        or not H.is_contiguous()
        or X.dtype not in GRAM_DTYPES
        or X.device != H.device
    ):
        raise UsageError(
            f"H is {H.dtype} on {H.device} and X {X.dtype} on {X.device}; the product takes contiguous float32 and "
            "bfloat16 or float16 on one device"
        )
    if H.shape != (in_features, in_features) or X.dim() != 2 or X.shape[1] != in_features:
        raise UsageError(
            f"H is {tuple(H.shape)} and X {tuple(X.shape)}; they must be (in, in) and (tokens, in)"
        )
    tiles = triton.cdiv(in_features, TILE)
    with torch.cuda.device_of(H):
        gram_tile[(tiles, tiles)](
            *(H, X.contiguous(), X.shape[0], in_features),
            TILE=TILE,
            TOKENS=TOKENS,
            num_warps=8,
            num_stages=3,
            enable_fp_fusion=True,
        )
