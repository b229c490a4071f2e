"""After the sweep: better scales for the codes, better codes for the scales, never a larger loss.

All of it lowers GPTQ's own objective ``sum over rows (w - q) H (w - q)^T`` with the damped H. Scales are refitted in
closed form ("Two-Stage Grid", arXiv 2602.02126, stage 2). Codes are revisited a block of columns at a time: given all
other columns, the best real values of block B are ``t = q_B + r_B H_BB^-1`` with ``r = (w - q) H``, and a GPTQ sweep
over the block alone rounds them. Where the block is a group, a few scales are tried as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightgptq.core.grid import Grid, dequantize_codes, round_scales
from lightgptq.core.hessian import HessianFactor
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.sweep import sweep

BLOCK_COLUMNS = 128  # columns of a shuffled block; 64 and 256 end within 1 % of the same loss
SCALE_FACTORS = (1.0, 0.92, 1.08)  # tried for every group; three more (and the other sign) gain under 1 %
BLOCK_DAMP = 1e-4  # of the mean diagonal of H_BB, so that a block with repeated inputs can be factored
REFIT_RIDGE = 1e-5  # pulls scales that the data leave open to their present values
REFIT_VALUES = 1 << 24  # entries of the normal equations held at a time: 64 MiB


@dataclass
class _State:
    """Rows that are being refined; changed in place.

    W, Q, R  float32 (out, in): target, its quantized value, ``(W - Q) H``
    codes    uint8 (out, in)
    """

    W: Tensor
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

    A round refits all scales, then re-solves shuffled blocks of columns, then every group with its scale.

    W       float32 (out, in), what the codes stand for
    H       float32 (in, in)
    codes   uint8 (out, in), not modified
    grid    not modified
    g_idx   int32 (in,)
    rounds  each costs about as much as a few sweeps
    ridge   added to the diagonal of H, in H's unit: what the sweep was damped with

    Returns codes uint8 (out, in) and a grid with float16 scales.
    """
    H = H.clone()
    H.diagonal().add_(ridge)
    generator = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        grid = refit_scales(W, H, codes, grid, g_idx)
        Q = dequantize_codes(codes, grid, g_idx)
        state = _State(W, Q, (W - Q) @ H, codes.clone(), Grid(grid.scales.clone(), grid.zeros.clone()), g_idx)
        shuffled = torch.randperm(W.shape[1], generator=generator).to(W.device)
        if W.shape[1] > BLOCK_COLUMNS:
            for block in shuffled.split(BLOCK_COLUMNS):
                _solve_block(state, H, block.sort().values, scheme, with_scale=False)
        for group in range(grid.scales.shape[0]):
            block = torch.nonzero(g_idx == group).flatten()
            _solve_block(state, H, block, scheme, with_scale=True)
        codes, grid = state.codes, state.grid
    return codes, grid


def refit_scales(W: Tensor, H: Tensor, codes: Tensor, grid: Grid, g_idx: Tensor) -> Grid:
    """The scales that minimise ``(w - q) H (w - q)^T`` for the codes as they are, rounded to float16.

    With ``z_g`` a row's steps (code - zero) in group g and 0 elsewhere: ``A s = b``, ``A_gh = z_g H z_h^T``,
    ``b_g = z_g H w^T``, one small system per row. Rows that rounding to float16 would make worse keep theirs.

    W float32 (out, in), H float32 (in, in), codes uint8 (out, in), g_idx int32 (in,).
    """
    group = g_idx.long()
    groups = grid.scales.shape[0]
    columns = [torch.nonzero(group == g).flatten() for g in range(groups)]
    scales = grid.scales.clone()
    # Sums over groups: every input has a place in its group's rows. (index_add_ adds in no fixed order on a GPU.)
    width = max(len(inside) for inside in columns)
    slots = torch.empty_like(group)
    for g, inside in enumerate(columns):
        slots[inside] = torch.arange(g * width, g * width + len(inside), device=W.device)
    for rows in torch.arange(W.shape[0], device=W.device).split(max(1, REFIT_VALUES // (groups * groups))):
        steps = codes[rows].t().float() - grid.zeros[:, rows][group]  # (in, rows)
        A = torch.zeros(groups, groups, len(rows), device=W.device)
        b = torch.zeros(groups, len(rows), device=W.device)
        padded = torch.empty(groups * width, len(rows), device=W.device)
        Wt = W[rows].t()
        for g, inside in enumerate(columns):
            product = H[:, inside] @ steps[inside]  # (in, rows)
            b[g] = (product * Wt).sum(dim=0)
            padded.zero_().index_copy_(0, slots, product.mul_(steps))
            torch.sum(padded.view(groups, width, -1), dim=1, out=A[g])
        A, b, old = A.permute(2, 0, 1), b.t(), grid.scales[:, rows].t()  # rows first
        pull = REFIT_RIDGE * A.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True).clamp_min(1e-30)
        system = A + torch.diag_embed(pull.expand(-1, groups))
        fitted = torch.linalg.solve(system, b + pull * old)
        fitted = torch.where(torch.isfinite(fitted) & (fitted != 0), fitted, old)
        fitted = round_scales(fitted)
        worse = _system_loss(A, b, fitted) > _system_loss(A, b, old)
        scales[:, rows] = torch.where(worse.unsqueeze(1), old, fitted).t()
    return Grid(scales, grid.zeros)


def _system_loss(A: Tensor, b: Tensor, s: Tensor) -> Tensor:
    """``s A s^T - 2 b s^T`` per row: the loss less a constant; A (rows, g, g), b and s (rows, g)."""
    return (torch.bmm(A, s.unsqueeze(2)).squeeze(2) * s).sum(dim=1) - 2 * (b * s).sum(dim=1)


def _solve_block(state: _State, H: Tensor, block: Tensor, scheme: QuantScheme, *, with_scale: bool) -> None:
    """Re-solves the columns ``block`` int64 (n,) of every row given its others; rows that gain take the result."""
    H_BB = H[block][:, block]
    if not bool((H_BB.diagonal() > 0).any()):
        return
    factor = HessianFactor.build(H_BB, scheme.with_overrides({"act_order": True, "damp": BLOCK_DAMP}))
    Uo = torch.empty_like(factor.U)
    Uo[:, factor.perm] = factor.U  # H_BB^-1 = Uo^T Uo in the block's own order
    Q, R = state.Q[:, block], state.R[:, block]
    target = Q + (R @ Uo.t()) @ Uo
    ordered = target[:, factor.perm].contiguous()
    best_gain = torch.zeros(len(Q), device=Q.device)
    best_move = torch.zeros_like(Q)
    for codes, grid, g_idx in _proposals(state, H_BB, block, factor, ordered, target, scheme, with_scale):
        move = dequantize_codes(codes, grid, g_idx) - Q
        gain = ((move @ H_BB - 2 * R) * move).sum(dim=1)
        wins = gain < best_gain
        best_gain = torch.where(wins, gain, best_gain)
        best_move[wins] = move[wins]
        state.codes[:, block] = torch.where(wins.unsqueeze(1), codes, state.codes[:, block])
        if with_scale:
            group = state.g_idx[block[0]].long()
            state.grid.scales[group] = torch.where(wins, grid.scales[0], state.grid.scales[group])
            state.grid.zeros[group] = torch.where(wins, grid.zeros[0], state.grid.zeros[group])
    state.Q[:, block] = Q + best_move
    state.R.addmm_(best_move, H[block], alpha=-1)


def _proposals(
    state: _State,
    H_BB: Tensor,
    block: Tensor,
    factor: HessianFactor,
    ordered: Tensor,
    target: Tensor,
    scheme: QuantScheme,
    with_scale: bool,
) -> Iterator[tuple[Tensor, Grid, Tensor]]:
    """Codes (out, n) with the grid and group index they are meant for, for the block's real-valued ``target``."""
    inverse = torch.argsort(factor.perm)
    if not with_scale:
        g_idx = state.g_idx[block]
        grid = Grid(state.grid.scales.clone(), state.grid.zeros)
        codes, _ = sweep(ordered, factor.U, grid, g_idx[factor.perm], scheme.max_code)
        yield codes[:, inverse], grid, g_idx
        return
    group = int(state.g_idx[block[0]])
    one_group = torch.zeros(len(block), dtype=torch.int32, device=block.device)
    scales, zeros = state.grid.scales[group].clone(), state.grid.zeros[group].clone()
    shifts = (0,) if scheme.sym else (0, -1, 1)
    pulled = target @ H_BB
    for factor_of_scale in SCALE_FACTORS:
        for shift in shifts if factor_of_scale == 1.0 else (0,):
            zero = (zeros + shift).clamp(1, scheme.max_code) if shift else zeros
            grid = Grid(round_scales(scales * factor_of_scale)[None], zero[None])
            codes, _ = sweep(ordered, factor.U, grid, one_group, scheme.max_code)
            codes = codes[:, inverse]
            yield codes, grid, one_group
            steps = codes.float() - zero.unsqueeze(1)
            norm = ((steps @ H_BB) * steps).sum(dim=1)
            best = torch.where(norm > 0, (steps * pulled).sum(dim=1) / norm, grid.scales[0])
            best = torch.where(best == 0, grid.scales[0], best)
            yield codes, Grid(round_scales(best)[None], zero[None]), one_group
