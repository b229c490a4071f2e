"""The quantized product on a GPU: launches the Triton kernels with the tiles that the table names.

Up to ``dense_rows`` rows of x a tile of the weight is dequantized in registers (`triton_product`), beyond that, and for
float32 activations, the weight is dequantized in runs of outputs that torch multiplies.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightgptq.errors import UsageError
from lightgptq.ops.triton_layout import DENSE_ELEMENTS, Tiling
from lightgptq.ops.triton_product import dequantize_kernel, product_kernel, reduce_kernel
from lightgptq.ops.triton_table import Architecture, Tile, architecture, split

# Up to this many rows the kernel looks inputs up through the index, beyond it x is permuted once.
GATHER_ROWS = 16
REDUCE_BLOCK = 1024
DEQUANTIZE_OUTPUTS = 64


def matmul(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None,
    layout: str,
    bits: int,
    in_features: int,
    out_features: int,
) -> Tensor:
    """``y = x @ W^T + bias``, accumulated in float32.

    x       (..., in) float32, bfloat16 or float16
    weight  words, scales, zeros, index: see ``triton_layout.to_triton``
    Returns (..., out) of x's dtype. No synchronisation, no memory but the result and a workspace: it can be
    captured in a CUDA graph after one call outside. Raises UsageError when x is on another device.
    """
    if x.device != weight[0].device:
        raise UsageError(f"x is on {x.device}, the weight on {weight[0].device}; move one to the other")
    rows = x.reshape(-1, in_features)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    count = rows.shape[0]
    if count == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    chip, processors = architecture(x.device)
    tiling = _tiling(tuple(weight[0].shape), layout, bits)
    with _on(x.device):
        if x.dtype == torch.float32 or count >= chip.dense_rows:
            y = _dense_product(rows, weight, bias, tiling, out_features)
        else:
            tile = chip.tile(count, bits)
            y = launch_product(rows, weight, bias, tiling, chip, tile, processors)
    return y.view(*x.shape[:-1], out_features)


def launch_product(
    rows: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None,
    tiling: Tiling,
    chip: Architecture,
    tile: Tile,
    processors: int,
) -> Tensor:
    """The tiled product of x (M, in) with one tile size; returns (M, out) of x's dtype."""
    words, scales, zeros, index = weight
    if index.numel() and rows.shape[0] > GATHER_ROWS:
        rows = rows.index_select(1, index.clamp_min(0))
        index = index[:0]
    count, in_features = rows.shape
    out_features = words.shape[2]
    splits, per_split = split(tile, processors, count, out_features, tiling.blocks)
    y = torch.empty((count, out_features), dtype=rows.dtype, device=rows.device)
    partial = y
    if splits > 1:
        partial = torch.empty((splits, count, out_features), dtype=torch.float32, device=rows.device)
    grid = (-(-count // tile.block_m), -(-out_features // tile.block_n), splits)
    product_kernel[grid](
        rows,
        words,
        scales,
        zeros,
        index,
        bias,
        partial,
        scales.shape[0],
        count,
        out_features,
        in_features,
        rows.stride(0),
        tiling.blocks,
        per_split,
        BITS=tiling.bits,
        PAIRS=tiling.pairs,
        GROUP_SLICES=tiling.group_slices,
        RUN=math.gcd(tiling.slices, tiling.group_slices),
        HAS_ZEROS=zeros.numel() > 0,
        HAS_INDEX=index.numel() > 0,
        HAS_BIAS=bias is not None,
        EVEN_K=in_features == tiling.inputs,
        IN_FLOAT32=rows.dtype == torch.bfloat16 and (tiling.bits == 8 or not chip.bfloat16_arithmetic),
        PARTIAL=splits > 1,
        BLOCK_N=tile.block_n,
        BLOCK_M=tile.block_m,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    if splits > 1:
        size = y.numel()
        reduce_kernel[(-(-size // REDUCE_BLOCK),)](
            *(partial, bias, y, size, out_features, splits),
            HAS_BIAS=bias is not None,
            BLOCK=REDUCE_BLOCK,
            enable_fp_fusion=True,
        )
    return y


def dequantize(
    weight: Sequence[Tensor], layout: str, bits: int, in_features: int, out_features: int, dtype: torch.dtype
) -> Tensor:
    """The weight (out, in), computed in float32 and rounded once to ``dtype``."""
    W = torch.empty((out_features, in_features), dtype=dtype, device=weight[0].device)
    with _on(W.device):
        _dequantize_rows(weight, _tiling(tuple(weight[0].shape), layout, bits), slice(0, out_features), W)
    return W


def _dense_product(
    rows: Tensor, weight: Sequence[Tensor], bias: Tensor | None, tiling: Tiling, out_features: int
) -> Tensor:
    """Dequantize a run of outputs, multiply with torch, reuse the memory for the next run."""
    count, in_features = rows.shape
    step = min(out_features, max(1, DENSE_ELEMENTS // in_features))
    workspace = torch.empty((step, in_features), dtype=rows.dtype, device=rows.device)
    if bias is not None:
        bias = bias.to(rows.dtype)
    y = torch.empty((count, out_features), dtype=rows.dtype, device=rows.device)
    for start in range(0, out_features, step):
        run = slice(start, min(start + step, out_features))
        W = workspace[: run.stop - run.start]
        _dequantize_rows(weight, tiling, run, W)
        if bias is None:
            torch.mm(rows, W.t(), out=y[:, run])
        else:
            torch.addmm(bias[run], rows, W.t(), out=y[:, run])
    return y


def _dequantize_rows(weight: Sequence[Tensor], tiling: Tiling, run: slice, W: Tensor) -> None:
    words, scales, zeros, index = weight
    grid = (-(-(run.stop - run.start) // DEQUANTIZE_OUTPUTS), tiling.blocks)
    dequantize_kernel[grid](
        words,
        scales,
        zeros,
        index,
        W,
        run.start,
        run.stop,
        scales.shape[0],
        words.shape[2],
        W.shape[1],
        BITS=tiling.bits,
        PAIRS=tiling.pairs,
        GROUP_SLICES=tiling.group_slices,
        HAS_ZEROS=zeros.numel() > 0,
        HAS_INDEX=index.numel() > 0,
        BLOCK_N=DEQUANTIZE_OUTPUTS,
        enable_fp_fusion=True,
    )


@functools.lru_cache(maxsize=1024)
def _tiling(words: tuple[int, ...], layout: str, bits: int) -> Tiling:
    return Tiling.read(words, layout, bits)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
