"""After the sweep: better codes and scales, never a larger loss.

All of it lowers GPTQ's own objective ``sum over rows (w - q) H (w - q)^T`` with the damped H. Codes are revisited a
block of columns at a time: given all other columns, the best real values of block B are ``t = q_B + r_B H_BB^-1`` with
``r = (w - q) H``, and a GPTQ sweep over the block alone rounds them. Where the block is a group, its scale is refitted
in closed form as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightgptq import native
from lightgptq.core.column_block import ColumnBlock, column_blocks
from lightgptq.core.grid import Grid
from lightgptq.core.refine_cpu import WIDEST_BLOCK, refine_cpu
from lightgptq.core.refine_torch import refine_torch
from lightgptq.core.refit import refit_scales
from lightgptq.core.scheme import QuantScheme

BLOCK_COLUMNS = 128  # columns of a shuffled block; 64 and 256 end within 1 % of the same loss


def refine(
    W: Tensor,
    H: Tensor,
    codes: Tensor,
    grid: Grid,
    g_idx: Tensor,
    scheme: QuantScheme,
    *,
    passes: int,
    ridge: float = 0.0,
) -> tuple[Tensor, Grid, Tensor]:
    """Codes and grid whose loss is at or below the one given, row by row.

    Passes over groups, each with its scale, take turns with passes over shuffled blocks of columns, in which columns
    meet that no group brings together; the last is over groups. Each takes about a product ``W H``. Before more than
    two all scales are refitted jointly, for two more: where inputs have much in common a group's own scale cannot tell
    what its neighbours will do, which shows at two bits only.

    W       float32 (out, in), what the codes stand for
    H       float32 (in, in)
    codes   uint8 (out, in), not modified
    grid    not modified
    g_idx   int32 (in,)
    passes  how many
    ridge   added to the diagonal of H, in H's unit: what the sweep was damped with

    Returns codes uint8 (out, in), a grid with float16 scales, and by how much each row's loss (with the ridge) fell,
    float64 (out,).
    """
    H = H.clone()
    H.diagonal().add_(ridge)
    generator = torch.Generator().manual_seed(0)
    members = (torch.nonzero(g_idx == group).flatten() for group in range(len(grid.scales)))
    groups = column_blocks(H, members, scheme, groups=True)
    W, codes, grid = W.contiguous(), codes.clone(), Grid(grid.scales.clone(), grid.zeros.clone())
    gained = torch.zeros(len(W), dtype=torch.float64, device=W.device)
    if passes > 2:
        grid, gained = refit_scales(W, H, codes, grid, g_idx)
    for left in range(passes, 0, -1):
        if left % 2 == 1:
            gained += _solve(W, H, codes, grid, g_idx, groups, scheme)
        elif W.shape[1] > BLOCK_COLUMNS:
            order = torch.randperm(W.shape[1], generator=generator).to(W.device)
            pieces = (piece.sort().values for piece in order.split(BLOCK_COLUMNS))
            shuffled = column_blocks(H, pieces, scheme, groups=False)
            gained += _solve(W, H, codes, grid, g_idx, shuffled, scheme)
    return codes, grid, gained


def _solve(
    W: Tensor,
    H: Tensor,
    codes: Tensor,
    grid: Grid,
    g_idx: Tensor,
    blocks: Sequence[ColumnBlock],
    scheme: QuantScheme,
) -> Tensor:
    """Re-solves blocks in turn, codes and grid in place: in the native library on a CPU, unless a block is too wide.

    Returns by how much each row's loss fell, float64 (out,).
    """
    library = native.load() if W.device.type == "cpu" and W.dtype == torch.float32 else None
    narrow = all(len(block.indices) <= WIDEST_BLOCK for block in blocks)
    if library is None or not narrow:
        return refine_torch(
            *(W, H, codes, grid, g_idx, blocks, scheme.max_code, scheme.descent), zeros_move=not scheme.sym
        )
    scales_move = any(block.group is not None for block in blocks)
    ordered = [(block.solving_order, block.factor.U) for block in blocks]
    return refine_cpu(
        *(library, W, H, codes, grid, g_idx, ordered, scheme.max_code, scheme.descent),
        scales_move=scales_move,
        zeros_move=not scheme.sym,
    )
