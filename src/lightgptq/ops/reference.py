"""The quantized product in plain torch: always there, on every device, never holding the whole weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightgptq.checkpoint.packing import unpack_rows

# Elements of the weight that exist dequantized at one time: 2^22 float32 are 16 MiB.
CHUNK_ELEMENTS = 1 << 22


def matmul(
    x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, layout: str, bits: int, out_features: int
) -> Tensor:
    """``y = x @ W^T + bias`` in float32, rounded once to x's dtype, over chunks of output features.

    x       (..., in) floating
    weight  qweight, qzeros, scales, g_idx; see ``PackedWeight``
    bias    (out,) or None
    Returns (..., out) of x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    y = torch.empty((rows.shape[0], out_features), dtype=x.dtype, device=x.device)
    for chunk in _chunks(out_features, x.shape[-1]):
        product = rows @ dequantize_rows(weight, layout, bits, chunk).t()
        if bias is not None:
            product += bias[chunk].float()
        y[:, chunk] = product
    return y.reshape(*x.shape[:-1], out_features)


def dequantize(
    weight: Sequence[Tensor], layout: str, bits: int, in_features: int, out_features: int, dtype: torch.dtype
) -> Tensor:
    """The weight (out, in), computed in float32 and rounded once to ``dtype``."""
    W = torch.empty((out_features, in_features), dtype=dtype, device=weight[0].device)
    for chunk in _chunks(out_features, in_features):
        W[chunk] = dequantize_rows(weight, layout, bits, chunk)
    return W


def dequantize_rows(weight: Sequence[Tensor], layout: str, bits: int, rows: slice) -> Tensor:
    """``W[o, i] = scales[g_idx[i], o] * (code[i, o] - zero[g_idx[i], o])`` for some outputs, float32."""
    qweight, qzeros, scales, g_idx = weight
    codes = unpack_rows(qweight[:, rows].t().contiguous(), bits, g_idx.numel())
    zeros = unpack_rows(qzeros, bits, scales.shape[1])[:, rows]
    if layout == "gptq":
        zeros = (zeros + 1) & ((1 << bits) - 1)
    group = g_idx.long()
    W = codes.float()
    W -= zeros.t().float()[:, group]
    W *= scales[:, rows].t().float()[:, group]
    return W


def _chunks(out_features: int, in_features: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, in_features))
    return [slice(start, min(start + step, out_features)) for start in range(0, out_features, step)]
