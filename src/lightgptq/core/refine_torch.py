"""One pass of refinement in plain PyTorch on any device: the reference for the native one.

Given all other columns, the best real values of block B are ``t = q_B + r_B H_BB^-1`` with ``r = (w - q) H``; a GPTQ
sweep over the block alone rounds them, coordinate descent improves them, and a row takes what lowers its loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightgptq.core.column_block import ColumnBlock, as_slice, part_of
from lightgptq.core.descent import descend
from lightgptq.core.grid import Grid, dequantize_codes, round_scales
from lightgptq.core.refine_cpu import WIDEST_BLOCK
from lightgptq.core.search import sweep_windows

BLOCKS_AT_ONCE = 4  # blocks whose columns of (W - Q) H are computed in one product
# Rows that go through a few blocks before the next ones do. On a CPU what a block takes of so many stays in cache; on a
# GPU every step costs a launch, however few the rows, and all go at once.
STRIP_ROWS = 512


def refine_torch(
    W: Tensor,
    H: Tensor,
    codes: Tensor,
    grid: Grid,
    g_idx: Tensor,
    blocks: Sequence[ColumnBlock],
    max_code: int,
    cycles: int = 0,
    *,
    zeros_move: bool = False,
) -> Tensor:
    """Finds codes anew for a block of columns at a time, all others given; rows take them where their loss falls.

    W, H    float32 (out, in) and (in, in), H symmetric; not modified
    codes   uint8 (out, in), changed in place, as the grid's scales and zeros (groups, out) are
    g_idx   int (in,)
    cycles  of coordinate descent after a block's sweep, or in the windows of a block of more than `WIDEST_BLOCK`
    blocks  those that are a group have its scale refitted; with zeros_move its zero is moved as well

    What a block needs of ``(W - Q) H`` is computed when its turn comes: one product with H in all. Returns by how much
    each row's loss fell, float64 (out,).
    """
    gained = torch.zeros(len(W), dtype=torch.float64, device=W.device)
    rows = _Rows(W, W - dequantize_codes(codes, grid, g_idx), codes, grid, g_idx, gained)
    for start in range(0, len(blocks), BLOCKS_AT_ONCE):
        present = blocks[start : start + BLOCKS_AT_ONCE]
        H_together = H[:, as_slice(torch.cat([block.indices for block in present]))]
        widths = [len(block.indices) for block in present]
        for strip in rows.strips():
            pulls = (strip.D @ H_together).split(widths, dim=1)
            for at, block in enumerate(present):
                move = _solve_block(strip, block, pulls[at], max_code, cycles, zeros_move)
                for later in range(at + 1, len(present)):
                    pulls[later].addmm_(move, part_of(H, block.columns, present[later].columns), alpha=-1)
    return gained


@dataclass
class _Rows:
    """Rows that are being refined; D, codes, scales and zeros are changed in place.

    W      float32 (rows, in): what the codes stand for
    D      float32 (rows, in): W less the quantized weight
    codes  uint8 (rows, in)
    grid   scales and zeros (groups, rows)
    gained float64 (rows,): what the loss lost is added
    """

    W: Tensor
    D: Tensor
    codes: Tensor
    grid: Grid
    g_idx: Tensor
    gained: Tensor

    def strips(self) -> Iterator[_Rows]:
        """Views of the rows, a few at a time."""
        many = len(self.W) if self.W.is_cuda else STRIP_ROWS
        for start in range(0, len(self.W), many):
            rows = slice(start, start + many)
            grid = Grid(self.grid.scales[:, rows], self.grid.zeros[:, rows])
            yield _Rows(self.W[rows], self.D[rows], self.codes[rows], grid, self.g_idx, self.gained[rows])


def _solve_block(
    rows: _Rows, block: ColumnBlock, R: Tensor, max_code: int, cycles: int, zeros_move: bool
) -> Tensor:
    """Re-solves one block of every row given its others; rows that gain take the result. Returns what Q gained.

    R  float32 (rows, n), ``D H`` in the block's columns
    """
    W, old = rows.W[:, block.columns], rows.D[:, block.columns]
    U = block.U
    missing = (R @ U.t()) @ U  # from Q to the best real values
    ordered = (W - old).add_(missing)[:, block.factor.perm].contiguous()
    best_codes = rows.codes[:, block.columns]
    group, g_idx, grid = block.group, rows.g_idx[block.columns], rows.grid
    if group is not None:
        grid = Grid(grid.scales[group : group + 1], grid.zeros[group : group + 1])
        g_idx = torch.zeros_like(g_idx)
    best_change = torch.zeros(len(R), device=R.device)
    settings = (max_code, cycles, zeros_move)
    for codes, proposed, change in _proposals(grid, g_idx, block, ordered, W - old, R, *settings):
        wins = change < best_change
        best_change = torch.where(wins, change, best_change)
        best_codes = torch.where(wins.unsqueeze(1), codes, best_codes)
        if group is not None:
            grid = Grid(
                torch.where(wins, proposed.scales, grid.scales),
                torch.where(wins, proposed.zeros, grid.zeros),
            )
    won = best_change < 0
    new = torch.where(won.unsqueeze(1), W - dequantize_codes(best_codes, grid, g_idx), old)
    move = old - new
    rows.D[:, block.columns] = new
    rows.codes[:, block.columns] = best_codes
    rows.gained.sub_(best_change)
    if group is not None:
        rows.grid.scales[group], rows.grid.zeros[group] = grid.scales[0], grid.zeros[0]
    return move


def _proposals(
    grid: Grid,
    g_idx: Tensor,
    block: ColumnBlock,
    ordered: Tensor,
    Q: Tensor,
    R: Tensor,
    max_code: int,
    cycles: int,
    zeros_move: bool,
) -> Iterator[tuple[Tensor, Grid, Tensor]]:
    """Codes (rows, n) for real values in solving order, their grid, and by how much (rows,) they change the loss.

    A move m of Q changes the loss by ``m H m - 2 m R``. A group's codes are proposed with its scale as it is and with
    the one that suits them: with z their steps (code - zero), a scale larger by d changes it further by
    ``d^2 z H z - 2 d z (R - H m)``.
    """
    alone, perm = block.group is not None, block.factor.perm
    for shift in (0, -1, 1) if alone and zeros_move else (0,):
        tried = Grid(grid.scales, (grid.zeros + shift).clamp(1, max_code) if shift else grid.zeros)
        wide = cycles if len(perm) > WIDEST_BLOCK else 0
        codes, _ = sweep_windows(ordered, block.factor.U, tried, g_idx[perm], max_code, wide)
        if cycles > wide:
            codes = descend(ordered, block.ordered_H, codes, tried, g_idx[perm], max_code, cycles)
        codes = codes[:, block.inverse]
        move = dequantize_codes(codes, tried, g_idx) - Q
        left = torch.addmm(R, move, block.H, alpha=-1)
        change = -((R + left).mul_(move).sum(dim=1))
        yield codes, tried, change
        if alone:
            steps = codes.float().sub_(tried.zeros.t())
            slope = left.mul_(steps).sum(dim=1)
            norm = (steps @ block.H).mul_(steps).sum(dim=1)
            best = torch.where(norm > 0, grid.scales[0] + slope / norm, grid.scales[0])
            best = round_scales(torch.where(best == 0, grid.scales[0], best))
            by = best - grid.scales[0]
            yield codes, Grid(best[None], tried.zeros), change + by * (by * norm - 2 * slope)
