"""The sweep with a look ahead: codes are searched for in windows of columns of which the first half is kept.

A window's columns are rounded one after the other by the sweep and then improved together by coordinate descent. What
decides inside a window B is ``d (U_BB^T U_BB)^-1 d`` with ``d = t - q``, the loss that is left once all columns after
the window have been compensated. The first half of the window is fixed, its errors ``E = D U^-1`` are pushed onto all
later columns as in the sweep, and the next window begins with the second half: so every column is chosen in sight of
those that follow it. The loss is the sweep's own, ``|e|^2`` row by row (GPTQ, arXiv 2210.17323, Algorithm 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightgptq import native
from lightgptq.core.compensation import Compensation
from lightgptq.core.descent import descend
from lightgptq.core.grid import Grid
from lightgptq.core.sweep import sweep
from lightgptq.core.sweep_cpu import sweep_cpu
from lightgptq.core.windows import WINDOW, curvature, windows


def sweep_windows(
    W: Tensor, U: Tensor, grid: Grid, g_idx: Tensor, max_code: int, cycles: int, block_size: int = 128
) -> tuple[Tensor, Tensor]:
    """`sweep` with ``cycles`` of coordinate descent in every window; without any it is `sweep` itself.

    Arguments, a batch dimension in front of them included, and what is returned are those of `sweep`: codes uint8
    (out, in) and the loss per row float32 (out,), both in solving order.
    """
    if not cycles:
        return sweep(W, U, grid, g_idx, max_code, block_size)
    library = native.load() if W.device.type == "cpu" and W.dtype == torch.float32 else None
    if library is None:
        return sweep_windows_torch(W, U, grid, g_idx, max_code, cycles, block_size)
    if W.dim() == 3:
        solved = [sweep_windows(*one, max_code, cycles) for one in zip(W, U, grid.each(), g_idx, strict=True)]
        codes, loss = (torch.stack(part) for part in zip(*solved, strict=True))
        return codes, loss
    curvatures = [curvature(U[start:end, start:end])[1] for start, end, _ in windows(W.shape[1])]
    return sweep_cpu(
        *(library, W.contiguous(), U.contiguous(), grid, g_idx, max_code),
        cycles=cycles,
        curvatures=curvatures,
    )


def sweep_windows_torch(
    W: Tensor, U: Tensor, grid: Grid, g_idx: Tensor, max_code: int, cycles: int, block_size: int = 128
) -> tuple[Tensor, Tensor]:
    """The same, window by window on any device: what a GPU runs, and the reference for the native library."""
    left = Compensation(W, U, WINDOW)
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    loss = torch.zeros(W.shape[:-1], dtype=torch.float32, device=W.device)
    for start, end, fixed in windows(W.shape[-1]):
        T, U_BB = left.columns(start, end), U[..., start:end, start:end].contiguous()
        groups = g_idx[..., start:end].contiguous()
        inverse, G = curvature(U_BB)
        found, _ = sweep(T, U_BB, grid, groups, max_code, block_size)
        found = descend(T, G, found, grid, groups, max_code, cycles)
        kept = slice(0, fixed - start)
        E = (T - _values(found, grid, groups))[..., kept] @ inverse[..., kept, kept]
        codes[..., start:fixed] = found[..., kept]
        loss += E.square().sum(dim=-1)
        left.push(start, fixed, E)
    return codes, loss


def _values(codes: Tensor, grid: Grid, g_idx: Tensor) -> Tensor:
    """What codes (out, n) stand for, float32; a batch dimension in front is allowed."""
    group = g_idx.long().unsqueeze(-2).expand(codes.shape)
    scales, zeros = (field.mT.gather(-1, group) for field in (grid.scales, grid.zeros))
    return (codes - zeros) * scales
