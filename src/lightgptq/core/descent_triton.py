"""Coordinate descent over a block's codes on a GPU, in one kernel.

A thread owns a row: a program of 32 rows goes through the block's columns in parts of PART, whose share of ``D G`` it
keeps in registers. A part first collects it, a loop over all columns with d from the cache, then its columns take their
values one by one, each correcting it for those after it. As in the sweep's kernel weights lie transposed, (n, out), and
a column is taken out of the part's tile by a masked sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightgptq.core.grid import Grid
from lightgptq.core.sweep_triton import AHEAD, OPTIONS, PART, ROUNDER, ROWS, operands


@triton.jit(
    do_not_specialize=["n", "out_features", "groups", "max_code", "cycles"],
    do_not_specialize_on_alignment=["T", "G", "Inverse", "Scales", "Zeros", "Groups", "Q", "D"],
)
def descend_block(
    T: tl.tensor,  # float32 (batch, n, out)
    G: tl.tensor,  # float32 (batch, n, n)
    Inverse: tl.tensor,  # float32 (batch, n): 1 / G_jj, 0 where that is not above 0
    Scales: tl.tensor,  # float32 (batch, groups, out)
    Zeros: tl.tensor,  # float32 (batch, groups, out)
    Groups: tl.tensor,  # int32 (batch, n)
    Q: tl.tensor,  # float32 (batch, n, out): what the codes stand for, made better
    D: tl.tensor,  # float32 (batch, n, out): T - Q
    n: tl.tensor,
    out_features: tl.tensor,
    groups: tl.tensor,
    max_code: tl.tensor,
    cycles: tl.tensor,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    AHEAD: tl.constexpr,
    ROUNDER: tl.constexpr,
) -> None:
    """Visits all columns of 32 rows, ``cycles`` times."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < out_features
    batch = tl.program_id(1).to(tl.int64)
    stride = n.to(tl.int64)  # offsets pass 2^31: a batch of weights may hold more values
    out_stride = out_features.to(tl.int64)
    T += batch * stride * out_stride + rows
    Q += batch * stride * out_stride + rows
    D += batch * stride * out_stride + rows
    G += batch * stride * stride
    Inverse += batch * stride
    Groups += batch * stride
    Scales += batch * groups * out_stride + rows
    Zeros += batch * groups * out_stride + rows
    for _ in range(cycles):
        for part in range(0, n, PART):
            cols = part + tl.arange(0, PART)
            left = cols < n
            pull = tl.zeros((PART, ROWS), tl.float32)
            for before in range(0, n, AHEAD):
                for k in tl.static_range(AHEAD):
                    at = before + k
                    d = tl.load(D + at * out_stride, mask=inside & (at + 0 * rows < n), other=0.0)
                    g = tl.load(G + at * stride + cols, mask=left & (at + 0 * cols < n), other=0.0)
                    pull += g[:, None] * d[None, :]
            last = tl.minimum(part + PART, n) - 1
            group = tl.load(Groups + tl.minimum(part + 1, last))
            scale, zero, inverse, g = operands(
                G, Inverse, Scales, Zeros, part, tl.load(Groups + part), cols, n, stride, out_stride, inside
            )
            old = tl.load(Q + part * out_stride, mask=inside, other=0.0)
            for column in range(part, last + 1):
                following = tl.minimum(column + 1, last)
                next_scale, next_zero, next_inverse, next_g = operands(
                    G, Inverse, Scales, Zeros, following, group, cols, n, stride, out_stride, inside
                )
                next_old = tl.load(Q + following * out_stride, mask=inside, other=0.0)
                target = tl.load(T + column * out_stride, mask=inside, other=0.0)
                group = tl.load(Groups + tl.minimum(column + 2, last))
                wanted = old + tl.sum(tl.where((cols == column)[:, None], pull, 0.0), axis=0) * inverse
                step = tl.clamp(tl.div_rn(wanted, scale), -zero, max_code - zero)
                now = ((step + ROUNDER) - ROUNDER) * scale
                pull -= g[:, None] * (now - old)[None, :]
                tl.store(Q + column * out_stride, now, mask=inside)
                tl.store(D + column * out_stride, target - now, mask=inside)
                scale, zero, inverse, g, old = next_scale, next_zero, next_inverse, next_g, next_old
            tl.debug_barrier()  # the next part reads these differences


def descend_triton(
    T: Tensor, G: Tensor, codes: Tensor, grid: Grid, g_idx: Tensor, max_code: int, cycles: int
) -> Tensor:
    """`descend`, which says what the arguments are, on a GPU; a batch dimension in front is allowed.

    Returns codes uint8 (out, n).
    """
    if T.dim() == 2:
        batched = Grid(grid.scales[None], grid.zeros[None])
        return descend_triton(T[None], G[None], codes[None], batched, g_idx[None], max_code, cycles)[0]
    batch, out_features, n = T.shape
    Tt = T.transpose(1, 2).contiguous()
    group_of = g_idx.to(torch.int32).contiguous()
    of_column = g_idx.long().unsqueeze(2).expand(batch, n, out_features)
    scales, zeros = grid.scales.float().contiguous(), grid.zeros.float().contiguous()
    scale, zero = scales.gather(1, of_column), zeros.gather(1, of_column)
    Q = (codes.transpose(1, 2).contiguous() - zero).mul_(scale)
    D = Tt - Q
    diagonal = G.diagonal(dim1=1, dim2=2)
    inverse = torch.where(diagonal > 0, diagonal.reciprocal(), 0.0).contiguous()
    with torch.cuda.device_of(T):
        descend_block[(triton.cdiv(out_features, ROWS), batch)](
            *(Tt, G.contiguous(), inverse, scales, zeros, group_of, Q, D),
            *(n, out_features, scales.shape[1], max_code, cycles),
            ROWS=ROWS,
            PART=PART,
            AHEAD=AHEAD,
            ROUNDER=ROUNDER,
            num_warps=1,
            **OPTIONS,
            enable_fp_fusion=True,
        )
    return Q.div_(scale).add_(zero).round_().to(torch.uint8).transpose(1, 2).contiguous()
