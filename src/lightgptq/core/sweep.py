"""The GPTQ column sweep: round a column, push its error onto the columns that are still free.

For each column j in order (GPTQ, arXiv 2210.17323, Algorithm 1), with ``(H + ridge I)^-1 = U^T U``:
``q_j = quant(w_j)``, ``e_j = (w_j - q_j) / U_jj``, ``w_k -= e_j U_jk`` for k > j.
At the end ``W - Q = E U``, so ``(w - q)(H + ridge I)(w - q)^T = |e|^2`` row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightgptq import native
from lightgptq.core.grid import Grid
from lightgptq.core.sweep_cpu import sweep_cpu

try:
    from lightgptq.core.sweep_triton import sweep_triton
except ImportError:  # Triton comes with PyTorch's GPU builds for Linux, and is of no use without a GPU
    sweep_triton = None  # type: ignore[assignment]


def sweep(
    W: Tensor, U: Tensor, grid: Grid, g_idx: Tensor, max_code: int, block_size: int = 128
) -> tuple[Tensor, Tensor]:
    """Solves all columns on a fixed grid, in the order in which they are given.

    On a CPU the native library does it, in blocks of its own, on a GPU Triton's kernels; elsewhere a loop over columns.

    W           float32 (out, in), columns in solving order, not modified
    U           float32 (in, in), upper, rows and columns in solving order
    grid        scales and zeros (groups, out)
    g_idx       int (in,), group of each column in solving order
    max_code    2^bits - 1
    block_size  columns updated eagerly; the rest gets one product per block (paper, section 3.3, step 2)

    Every argument may have a batch dimension in front, the same for all: weights with factors of their own. On a GPU
    one launch per block solves them all, elsewhere they are solved one after the other.

    Returns codes uint8 (out, in) and the loss per row ``|e|^2`` float32 (out,), both in solving order.
    """
    if W.is_cuda and sweep_triton is not None:
        return sweep_triton(W, U, grid, g_idx, max_code, block_size)
    if W.dim() == 3:
        solved = [sweep(*one, max_code, block_size) for one in zip(W, U, grid.each(), g_idx, strict=True)]
        codes, loss = (torch.stack(part) for part in zip(*solved, strict=True))
        return codes, loss
    library = native.load() if W.device.type == "cpu" and W.dtype == torch.float32 else None
    if library is not None:
        return sweep_cpu(library, W.contiguous(), U.contiguous(), grid, g_idx, max_code)
    return sweep_torch(W, U, grid, g_idx, max_code, block_size)


def sweep_torch(
    W: Tensor, U: Tensor, grid: Grid, g_idx: Tensor, max_code: int, block_size: int = 128
) -> tuple[Tensor, Tensor]:
    """The same as ``sweep`` in plain PyTorch on any device: a loop over columns, the reference for native
    sweeps."""
    out_features, in_features = W.shape
    Wt = W.t().contiguous()  # (in, out): a column of W is contiguous
    codes = torch.empty(in_features, out_features, dtype=torch.uint8, device=W.device)
    row_loss = torch.zeros(out_features, dtype=torch.float32, device=W.device)
    zeros = grid.zeros.float()
    groups = g_idx.tolist()
    for start in range(0, in_features, block_size):
        end = min(start + block_size, in_features)
        errors = torch.empty(end - start, out_features, dtype=torch.float32, device=W.device)
        for j in range(start, end):
            w, scale, zero = Wt[j], grid.scales[groups[j]], zeros[groups[j]]
            code = (torch.round(w / scale) + zero).clamp_(0, max_code)
            codes[j] = code.to(torch.uint8)
            error = (w - (code - zero) * scale) / U[j, j]
            errors[j - start] = error
            Wt[j + 1 : end].addr_(U[j, j + 1 : end], error, alpha=-1)
        row_loss += errors.square().sum(dim=0)
        Wt[end:].addmm_(U[start:end, end:].t(), errors, alpha=-1)
    return codes.t().contiguous(), row_loss
