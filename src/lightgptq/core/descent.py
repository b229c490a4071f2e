"""Coordinate descent over the codes of a block of columns, towards real values that it should stand for.

Rounding column after column, as the sweep does, is greedy: a code is never looked at again. Here each takes, in turn
and a few times over, the value that is best given all others of its block. With ``D = T - Q`` and the block's curvature
G the loss of a row is ``d G d``; alone ``q_j`` would best be ``q_j + (d G)_j / G_jj``, and the grid point nearest to
that is taken, so no step increases the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightgptq.core.grid import Grid

try:
    from lightgptq.core.descent_triton import descend_triton
except ImportError:  # Triton comes with PyTorch's GPU builds for Linux, and is of no use without a GPU
    descend_triton = None  # type: ignore[assignment]


def descend(
    T: Tensor, G: Tensor, codes: Tensor, grid: Grid, g_idx: Tensor, max_code: int, cycles: int
) -> Tensor:
    """Better codes for a block of columns in the order given, row by row: on a GPU by a Triton kernel.

    T         float32 (out, n): the real values
    G         float32 (n, n), symmetric; a column whose diagonal is not above 0 keeps its codes
    codes     uint8 (out, n), to start from, not modified
    grid      scales and zeros (groups, out)
    g_idx     int (n,), group of each column
    max_code  2^bits - 1
    cycles    how often every column is visited

    Every argument may have a batch dimension in front, the same for all. Returns codes uint8 (out, n).
    """
    if T.is_cuda and descend_triton is not None:
        return descend_triton(T, G, codes, grid, g_idx, max_code, cycles)
    if T.dim() == 3:
        blocks = zip(T, G, codes, grid.each(), g_idx, strict=True)
        return torch.stack([descend_torch(*one, max_code, cycles) for one in blocks])
    return descend_torch(T, G, codes, grid, g_idx, max_code, cycles)


def descend_torch(
    T: Tensor, G: Tensor, codes: Tensor, grid: Grid, g_idx: Tensor, max_code: int, cycles: int
) -> Tensor:
    """The same in plain PyTorch on any device and in any precision: a loop over columns, the reference for kernels."""
    group = g_idx.long()
    scales, zeros = grid.scales.to(T.dtype)[group], grid.zeros.to(T.dtype)[group]  # (n, out)
    Qt = (codes.t().to(T.dtype) - zeros) * scales
    Dt, inverse = T.t() - Qt, torch.where(G.diagonal() > 0, G.diagonal().reciprocal(), 0.0)
    for _ in range(cycles):
        for j in range(T.shape[1]):
            wanted = Qt[j] + (G[j] @ Dt) * inverse[j]
            code = (torch.round(wanted / scales[j]) + zeros[j]).clamp_(0, max_code)
            Qt[j] = (code - zeros[j]) * scales[j]
            Dt[j] = T[:, j] - Qt[j]
    return (torch.round(Qt / scales) + zeros).clamp_(0, max_code).t().to(torch.uint8).contiguous()
