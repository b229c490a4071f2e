"""``M += (X_orig - X_quant)^T X_quant`` on a GPU, from 16-bit activations as they are, with float32 sums.

The difference of two such values that lie apart fits no 16 bits, but two parts of 16 bits hold it to 2^-16 of itself:
with ``D = A + B``, both parts go through the matrix unit. Subtracting X_quant^T X_quant from X_orig^T X_quant would
take as many operations, and leave in a small M the rounding of two large sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightgptq.core.gram_triton import GRAM_DTYPES
from lightgptq.errors import UsageError

TILE = 128  # of M, both ways: 64 KiB of sums in the registers of 8 warps
TOKENS = 32  # rows of X per step: three tiles of inputs wait in shared memory, and two parts are made of two


@triton.jit(do_not_specialize=["tokens"])
def mismatch_tile(
    M: tl.tensor,  # float32 (in, in)
    Original: tl.tensor,  # bfloat16 or float16 (tokens, in)
    Quantized: tl.tensor,  # the same
    tokens: tl.tensor,
    in_features: tl.tensor,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Adds one tile of ``(X_orig - X_quant)^T X_quant`` to M."""
    rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
    cols = tl.program_id(0) * TILE + tl.arange(0, TILE)
    steps = tl.arange(0, TOKENS)
    stride = in_features.to(tl.int64)
    original = Original + steps[:, None] * stride + rows[None, :]
    left = Quantized + steps[:, None] * stride + rows[None, :]
    right = Quantized + steps[:, None] * stride + cols[None, :]
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for first in range(0, tokens, TOKENS):
        there = (first + steps < tokens)[:, None]
        o = tl.load(original, mask=there & (rows < in_features)[None, :], other=0.0).to(tl.float32)
        q = tl.load(left, mask=there & (rows < in_features)[None, :], other=0.0).to(tl.float32)
        b = tl.load(right, mask=there & (cols < in_features)[None, :], other=0.0)
        half = (o - q) * 0.5  # of two float16 the whole difference may be beyond float16
        large = half.to(b.dtype)
        small = (half - large.to(tl.float32)).to(b.dtype)
        total = tl.dot(tl.trans(large), b, total)
        total = tl.dot(tl.trans(small), b, total)
        original += TOKENS * stride
        left += TOKENS * stride
        right += TOKENS * stride
    place = M + rows[:, None] * stride + cols[None, :]
    inside = (rows < in_features)[:, None] & (cols < in_features)[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) + 2.0 * total, mask=inside)


def add_mismatch_triton(M: Tensor, X_orig: Tensor, X_quant: Tensor) -> None:
    """``M += (X_orig - X_quant)^T X_quant`` in place.

    With t tokens and ``d = x_orig - x_quant`` an element is off by at most ``((2 t + 2) 2^-23 + 2^-16) sum |d_i x_j|``:
    t sums of two products each, rounded toward zero by matrix units, and what the two parts of d leave out; of float16
    that are tiny it is ``2^-24 sum |x_j|`` more.

    M                float32 (in, in), contiguous
    X_orig, X_quant  bfloat16 or float16, both (tokens, in) on M's device

    Raises UsageError for other shapes, dtypes or devices.
    """
    in_features = M.shape[0]
    given = (M, X_orig, X_quant)
    fits = M.shape == (in_features, in_features) and X_orig.shape == X_quant.shape == (
        len(X_quant),
        in_features,
    )
    short = X_orig.dtype == X_quant.dtype and X_quant.dtype in GRAM_DTYPES and M.dtype == torch.float32
    if not fits or not short or not M.is_contiguous() or len({t.device for t in given}) > 1:
        raise UsageError(
            f"M, X_orig and X_quant are {', '.join(f'{t.dtype} {tuple(t.shape)} on {t.device}' for t in given)}; they "
            "must be contiguous float32 (in, in) and bfloat16 or float16 (tokens, in), on one device"
        )
    tiles = triton.cdiv(in_features, TILE)
    with torch.cuda.device_of(M):
        mismatch_tile[(tiles, tiles)](
            *(M, X_orig.contiguous(), X_quant.contiguous(), X_quant.shape[0], in_features),
            TILE=TILE,
            TOKENS=TOKENS,
            num_warps=8,
            num_stages=3,
            enable_fp_fusion=True,
        )
