"""After the sweep: better scales for the codes, better codes for the scales, never a larger loss.

All of it lowers GPTQ's own objective ``sum over rows (w - q) H (w - q)^T`` with the damped H. Codes are revisited a
block of columns at a time: given all other columns, the best real values of block B are ``t = q_B + r_B H_BB^-1`` with
``r = (w - q) H``, and a GPTQ sweep over the block alone rounds them. Where the block is a group, its scale is refitted
as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightgptq.core.grid import Grid, dequantize_codes, round_scales
from lightgptq.core.hessian import HessianFactor
from lightgptq.core.refit import refit_scales
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.sweep import sweep

BLOCK_COLUMNS = 128  # columns of a shuffled block; 64 and 256 end within 1 % of the same loss
BLOCKS_AT_ONCE = 4  # blocks whose columns of (W - Q) H are computed in one product
# Rows that go through a few blocks before the next ones do. On a CPU what a block takes of so many stays in cache; on a
# GPU every step costs a launch, however few the rows, and all go at once.
STRIP_ROWS = 512
BLOCK_DAMP = 1e-4  # of the mean diagonal of H_BB, so that a block with repeated inputs can be factored
Columns = Tensor | slice


@dataclass(frozen=True)
class _Block:
    """Columns that are solved together, and what all rows need of H there.

    indices  int64 (n,), in order
    columns  the same, or the slice that they are
    H        float32 (n, n)
    U        float32 (n, n), ``H^-1 = U^T U``; `factor` holds it in solving order
    inverse  int64 (n,), place of each column in that order
    group    which group they are; None for a block of any columns
    """

    indices: Tensor
    columns: Columns
    H: Tensor
    U: Tensor
    factor: HessianFactor
    inverse: Tensor
    group: int | None

    @classmethod
    def of(cls, H: Tensor, indices: Tensor, scheme: QuantScheme, group: int | None) -> _Block | None:
        """None where every input of the block was always 0."""
        columns = _as_slice(indices)
        H_BB = _part(H, columns, columns).contiguous()
        if not bool((H_BB.diagonal() > 0).any()):
            return None
        order = {"act_order": True, "group_aware": False, "damp": BLOCK_DAMP}
        factor = HessianFactor.build(H_BB, scheme.with_overrides(order))
        U = torch.empty_like(factor.U)
        U[:, factor.perm] = factor.U
        return cls(indices, columns, H_BB, U, factor, torch.argsort(factor.perm), group)


@dataclass
class _Rows:
    """Rows that are being refined; D, codes, scales and zeros are changed in place.

    W      float32 (rows, in): what the codes stand for
    D      float32 (rows, in): W less the quantized weight
    codes  uint8 (rows, in)
    grid   scales and zeros (groups, rows)
    """

    W: Tensor
    D: Tensor
    codes: Tensor
    grid: Grid
    g_idx: Tensor

    def strips(self) -> Iterator[_Rows]:
        """Views of the rows, a few at a time."""
        many = len(self.W) if self.W.is_cuda else STRIP_ROWS
        for start in range(0, len(self.W), many):
            rows = slice(start, start + many)
            grid = Grid(self.grid.scales[:, rows], self.grid.zeros[:, rows])
            yield _Rows(self.W[rows], self.D[rows], self.codes[rows], grid, self.g_idx)


def refine(
    W: Tensor,
    H: Tensor,
    codes: Tensor,
    grid: Grid,
    g_idx: Tensor,
    scheme: QuantScheme,
    *,
    rounds: int = 1,
    ridge: float = 0.0,
) -> tuple[Tensor, Grid]:
    """Codes and grid whose loss is at or below the one given, row by row.

    One round re-solves every group with its scale. Of more than one, each first refits all scales jointly and re-solves
    shuffled blocks of columns.

    W       float32 (out, in), what the codes stand for
    H       float32 (in, in)
    codes   uint8 (out, in), not modified
    grid    not modified
    g_idx   int32 (in,)
    rounds  a single one costs about as much as four sweeps, each of several about fifteen
    ridge   added to the diagonal of H, in H's unit: what the sweep was damped with

    Returns codes uint8 (out, in) and a grid with float16 scales.
    """
    H = H.clone()
    H.diagonal().add_(ridge)
    generator = torch.Generator().manual_seed(0)
    members = (torch.nonzero(g_idx == group).flatten() for group in range(grid.scales.shape[0]))
    groups = _blocks(_Block.of(H, indices, scheme, group) for group, indices in enumerate(members))
    codes = codes.clone()
    for _ in range(rounds):
        grid = refit_scales(W, H, codes, grid, g_idx) if rounds > 1 else grid
        grid = Grid(grid.scales.clone(), grid.zeros.clone())
        shuffled: list[_Block] = []
        if rounds > 1 and W.shape[1] > BLOCK_COLUMNS:
            order = torch.randperm(W.shape[1], generator=generator).to(W.device)
            pieces = (piece.sort().values for piece in order.split(BLOCK_COLUMNS))
            shuffled = _blocks(_Block.of(H, indices, scheme, None) for indices in pieces)
        rows = _Rows(W, W - dequantize_codes(codes, grid, g_idx), codes, grid, g_idx)
        _solve(rows, H, shuffled, scheme)
        _solve(rows, H, groups, scheme)
    return codes, grid


def _blocks(built: Iterator[_Block | None]) -> list[_Block]:
    return [block for block in built if block is not None]


def _as_slice(columns: Tensor) -> Columns:
    """A run of neighbours as a slice, which is a view where an index would be a copy."""
    first, last = int(columns[0]), int(columns[-1])
    run = last - first == len(columns) - 1 and bool((columns.diff() == 1).all())
    return slice(first, last + 1) if run else columns


def _part(H: Tensor, rows: Columns, columns: Columns) -> Tensor:
    if isinstance(rows, slice) or isinstance(columns, slice):
        return H[rows][:, columns]
    return H[rows.unsqueeze(1), columns]


def _solve(rows: _Rows, H: Tensor, blocks: Sequence[_Block], scheme: QuantScheme) -> None:
    """Re-solve blocks in turn. What one needs of ``D H`` is computed when its turn comes: one product with H in all."""
    for start in range(0, len(blocks), BLOCKS_AT_ONCE):
        present = blocks[start : start + BLOCKS_AT_ONCE]
        H_together = H[:, _as_slice(torch.cat([block.indices for block in present]))]
        widths = [len(block.indices) for block in present]
        for strip in rows.strips():
            pulls = (strip.D @ H_together).split(widths, dim=1)
            for at, block in enumerate(present):
                move = _solve_block(strip, block, pulls[at], scheme)
                for later in range(at + 1, len(present)):
                    pulls[later].addmm_(move, _part(H, block.columns, present[later].columns), alpha=-1)


def _solve_block(rows: _Rows, block: _Block, R: Tensor, scheme: QuantScheme) -> Tensor:
    """Re-solves one block of every row given its others; rows that gain take the result. Returns what Q gained.

    R  float32 (rows, n), ``D H`` in the block's columns
    """
    old = rows.D[:, block.columns]
    missing = (R @ block.U.t()) @ block.U  # from Q to the best real values
    best_loss = (missing * R).sum(dim=1)
    target = (rows.W[:, block.columns] - old).add_(missing)
    ordered = target[:, block.factor.perm].contiguous()
    best_codes = rows.codes[:, block.columns]
    group, g_idx = block.group, rows.g_idx[block.columns]
    grid = rows.grid
    if group is None:
        proposals = _rounded(rows, block, ordered, target, scheme)
    else:
        grid = Grid(grid.scales[group : group + 1], grid.zeros[group : group + 1])
        g_idx = torch.zeros_like(g_idx)
        proposals = _rescaled(grid, block, ordered, target, scheme)
    won = torch.zeros(len(R), dtype=torch.bool, device=R.device)
    for codes, proposed, loss in proposals:
        wins = loss < best_loss
        won |= wins
        best_loss = torch.where(wins, loss, best_loss)
        best_codes = torch.where(wins.unsqueeze(1), codes, best_codes)
        if group is not None:
            grid = Grid(
                torch.where(wins, proposed.scales, grid.scales),
                torch.where(wins, proposed.zeros, grid.zeros),
            )
    new = rows.W[:, block.columns] - dequantize_codes(best_codes, grid, g_idx)
    new = torch.where(won.unsqueeze(1), new, old)
    move = old - new
    rows.D[:, block.columns] = new
    rows.codes[:, block.columns] = best_codes
    if group is not None:
        rows.grid.scales[group], rows.grid.zeros[group] = grid.scales[0], grid.zeros[0]
    return move


def _rounded(
    rows: _Rows, block: _Block, ordered: Tensor, target: Tensor, scheme: QuantScheme
) -> Iterator[tuple[Tensor, Grid, Tensor]]:
    """Codes (rows, n) for the real-valued target with the grid as it is, that grid, and the loss (rows,) left."""
    g_idx = rows.g_idx[block.columns]
    codes, _ = sweep(ordered, block.factor.U, rows.grid, g_idx[block.factor.perm], scheme.max_code)
    codes = codes[:, block.inverse]
    error = target - dequantize_codes(codes, rows.grid, g_idx)
    yield codes, rows.grid, (error @ block.H).mul_(error).sum(dim=1)


def _rescaled(
    grid: Grid,
    block: _Block,
    ordered: Tensor,
    target: Tensor,
    scheme: QuantScheme,
) -> Iterator[tuple[Tensor, Grid, Tensor]]:
    """The same for a group, with its scale as it is and with the one that suits the codes found.

    With e the error and z the steps (code - zero), the loss ``e H e`` changes by ``-2 d (z H e) + d^2 (z H z)`` where
    the scale changes by d.
    """
    one_group = torch.zeros(len(block.inverse), dtype=torch.int32, device=target.device)
    for shift in (0,) if scheme.sym else (0, -1, 1):
        zeros = (grid.zeros + shift).clamp(1, scheme.max_code) if shift else grid.zeros
        tried = Grid(grid.scales, zeros)
        codes, _ = sweep(ordered, block.factor.U, tried, one_group, scheme.max_code)
        codes = codes[:, block.inverse]
        steps = codes.float().sub_(zeros.t())
        error = torch.addcmul(target, steps, grid.scales.t(), value=-1)
        pulled = error @ block.H
        loss = error.mul_(pulled).sum(dim=1)
        yield codes, tried, loss
        pull = pulled.mul_(steps).sum(dim=1)
        norm = (steps @ block.H).mul_(steps).sum(dim=1)
        best = torch.where(norm > 0, grid.scales[0] + pull / norm, grid.scales[0])
        best = round_scales(torch.where(best == 0, grid.scales[0], best))
        change = best - grid.scales[0]
        yield codes, Grid(best[None], zeros), loss - change * (2 * pull - change * norm)
