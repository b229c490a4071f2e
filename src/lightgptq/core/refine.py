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
BLOCKS_AT_ONCE = 4  # blocks after which all columns hear of the changes, in one product
SCALE_FACTORS = (1.0, 0.92, 1.08)  # tried for every group; three more (and the other sign) gain under 1 %
BLOCK_DAMP = 1e-4  # of the mean diagonal of H_BB, so that a block with repeated inputs can be factored
Columns = Tensor | slice


@dataclass
class _State:
    """Rows that are being refined; changed in place.

    Q, R   float32 (out, in): the quantized weight and ``(W - Q) H``
    codes  uint8 (out, in)
    """

    Q: Tensor
    R: Tensor
    codes: Tensor
    grid: Grid
    g_idx: Tensor


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
    shuffled blocks of columns, and tries other scales for every group.

    W       float32 (out, in), what the codes stand for
    H       float32 (in, in)
    codes   uint8 (out, in), not modified
    grid    not modified
    g_idx   int32 (in,)
    rounds  a single one costs about as much as three sweeps, each of several about ten
    ridge   added to the diagonal of H, in H's unit: what the sweep was damped with

    Returns codes uint8 (out, in) and a grid with float16 scales.
    """
    H = H.clone()
    H.diagonal().add_(ridge)
    generator = torch.Generator().manual_seed(0)
    groups = [torch.nonzero(g_idx == group).flatten() for group in range(grid.scales.shape[0])]
    factors = SCALE_FACTORS if rounds > 1 else SCALE_FACTORS[:1]
    for _ in range(rounds):
        if rounds > 1:
            grid = refit_scales(W, H, codes, grid, g_idx)
        Q = dequantize_codes(codes, grid, g_idx)
        state = _State(Q, (W - Q) @ H, codes.clone(), Grid(grid.scales.clone(), grid.zeros.clone()), g_idx)
        if rounds > 1 and W.shape[1] > BLOCK_COLUMNS:
            shuffled = torch.randperm(W.shape[1], generator=generator).to(W.device)
            _solve(state, H, [block.sort().values for block in shuffled.split(BLOCK_COLUMNS)], scheme, ())
        _solve(state, H, groups, scheme, factors)
        codes, grid = state.codes, state.grid
    return codes, grid


def _solve(
    state: _State, H: Tensor, blocks: Sequence[Tensor], scheme: QuantScheme, factors: tuple[float, ...]
) -> None:
    """Re-solve blocks of columns int64 (n,) in turn; with ``factors`` each is a group, whose scale is changed, too."""
    for start in range(0, len(blocks), BLOCKS_AT_ONCE):
        present = [_as_slice(block) for block in blocks[start : start + BLOCKS_AT_ONCE]]
        residuals = [state.R[:, block].clone() for block in present]
        moves: list[Tensor] = []
        for at, block in enumerate(present):
            group = start + at if factors else None
            moves.append(_solve_block(state, H, block, residuals[at], scheme, group, factors))
            for later in range(at + 1, len(present)):
                residuals[later].addmm_(moves[at], _part(H, block, present[later]), alpha=-1)
        together = _as_slice(torch.cat(list(blocks[start : start + BLOCKS_AT_ONCE])))
        state.R.addmm_(torch.cat(moves, dim=1), H[together], alpha=-1)


def _as_slice(columns: Tensor) -> Columns:
    """A run of neighbours as a slice, which is a view where an index would be a copy."""
    first, last = int(columns[0]), int(columns[-1])
    run = last - first == len(columns) - 1 and bool((columns.diff() == 1).all())
    return slice(first, last + 1) if run else columns


def _part(H: Tensor, rows: Columns, columns: Columns) -> Tensor:
    if isinstance(rows, slice) or isinstance(columns, slice):
        return H[rows][:, columns]
    return H[rows.unsqueeze(1), columns]


def _solve_block(
    state: _State,
    H: Tensor,
    block: Columns,
    R: Tensor,
    scheme: QuantScheme,
    group: int | None,
    factors: tuple[float, ...],
) -> Tensor:
    """Re-solves one block of every row given its others; rows that gain take the result. Returns what Q gained.

    R  float32 (out, n), the residual in the block's columns
    """
    H_BB = _part(H, block, block)
    Q = state.Q[:, block]
    best_move = torch.zeros_like(Q)
    if not bool((H_BB.diagonal() > 0).any()):
        return best_move
    factor = HessianFactor.build(H_BB, scheme.with_overrides({"act_order": True, "damp": BLOCK_DAMP}))
    Uo = torch.empty_like(factor.U)
    Uo[:, factor.perm] = factor.U  # H_BB^-1 = Uo^T Uo in the block's own order
    target = torch.addmm(Q, R @ Uo.t(), Uo)
    ordered = target[:, factor.perm].contiguous()
    best_gain = torch.zeros(len(Q), device=Q.device)
    best_codes = state.codes[:, block]
    if group is None:
        proposals = _rounded(state, block, factor, ordered, scheme)
    else:
        proposals = _rescaled(state, H_BB, group, factor, ordered, target, scheme, factors)
    for codes, grid, g_idx in proposals:
        move = dequantize_codes(codes, grid, g_idx).sub_(Q)
        gain = ((move @ H_BB).sub_(R, alpha=2).mul_(move)).sum(dim=1)
        wins = gain < best_gain
        best_gain = torch.where(wins, gain, best_gain)
        best_move = torch.where(wins.unsqueeze(1), move, best_move)
        best_codes = torch.where(wins.unsqueeze(1), codes, best_codes)
        if group is not None:
            state.grid.scales[group] = torch.where(wins, grid.scales[0], state.grid.scales[group])
            state.grid.zeros[group] = torch.where(wins, grid.zeros[0], state.grid.zeros[group])
    state.codes[:, block] = best_codes
    state.Q[:, block] = Q + best_move
    return best_move


def _rounded(
    state: _State, block: Columns, factor: HessianFactor, ordered: Tensor, scheme: QuantScheme
) -> Iterator[tuple[Tensor, Grid, Tensor]]:
    """Codes (out, n) for the real-valued target in solving order, with the grid as it is, and their group index."""
    g_idx = state.g_idx[block]
    codes, _ = sweep(ordered, factor.U, state.grid, g_idx[factor.perm], scheme.max_code)
    yield codes[:, torch.argsort(factor.perm)], state.grid, g_idx


def _rescaled(
    state: _State,
    H_BB: Tensor,
    group: int,
    factor: HessianFactor,
    ordered: Tensor,
    target: Tensor,
    scheme: QuantScheme,
    factors: tuple[float, ...],
) -> Iterator[tuple[Tensor, Grid, Tensor]]:
    """Codes (out, n) for a group's real-valued target with several scales, and each with the scale that suits them."""
    inverse = torch.argsort(factor.perm)
    one_group = torch.zeros(len(inverse), dtype=torch.int32, device=target.device)
    scales, zeros = state.grid.scales[group].clone(), state.grid.zeros[group].clone()
    shifts = (0,) if scheme.sym else (0, -1, 1)
    pulled = target @ H_BB
    for factor_of_scale in factors:
        for shift in shifts if factor_of_scale == 1.0 else (0,):
            zero = (zeros + shift).clamp(1, scheme.max_code) if shift else zeros
            grid = Grid(round_scales(scales * factor_of_scale)[None], zero[None])
            codes, _ = sweep(ordered, factor.U, grid, one_group, scheme.max_code)
            codes = codes[:, inverse]
            yield codes, grid, one_group
            steps = codes.float() - zero.unsqueeze(1)
            norm = (steps @ H_BB).mul_(steps).sum(dim=1)
            best = torch.where(norm > 0, steps.mul_(pulled).sum(dim=1) / norm, grid.scales[0])
            best = torch.where(best == 0, grid.scales[0], best)
            yield codes, Grid(round_scales(best)[None], zero[None]), one_group
