"""GPTQ for one linear layer: grid, column order, sweep (Frantar et al., arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightgptq.core.compensation import Compensation
from lightgptq.core.grid import Grid, check_weight, dequantize_codes, fit_grid, trivial_g_idx
from lightgptq.core.hessian import HessianFactor
from lightgptq.core.refine import refine
from lightgptq.core.rtn import quadratic_loss
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.search import sweep_windows
from lightgptq.core.types import QuantizedWeight
from lightgptq.errors import QuantizationError


def gptq(
    W: Tensor,
    factor: HessianFactor,
    scheme: QuantScheme,
    *,
    H: Tensor | None = None,
    grid: Grid | None = None,
    block_size: int = 128,
) -> QuantizedWeight:
    """Quantizes ``W`` so that ``sum over rows (w - q) H (w - q)^T`` stays small (paper, Algorithm 1).

    W           float (out, in), not modified
    factor      of H, built with the same scheme
    H           float32 (in, in), needed by scheme.refine; without refinement it makes the reported loss exact, where
                otherwise the damping's part is taken off the solver's own sum, which is the same up to rounding
    grid        scales and zeros to use instead of ``fit_grid``'s; static groups only
    block_size  columns updated eagerly, a matter of speed only

    Raises QuantizationError when W is not finite, shapes contradict each other, a scale is beyond
    float16 or H is missing.
    """
    return gptq_stacked([W], factor, scheme, H=H, grid=grid, block_size=block_size)[0]


def gptq_stacked(
    weights: Sequence[Tensor],
    factor: HessianFactor,
    scheme: QuantScheme,
    *,
    H: Tensor | None = None,
    grid: Grid | None = None,
    block_size: int = 128,
) -> list[QuantizedWeight]:
    """Quantizes linears that share an input and a scheme (q, k and v; gate and up) as the rows of one weight.

    Rows do not see each other, so the codes are those of `gptq` for each, up to rounding in the products; a GPU solves
    many rows in the time of few.

    weights  float (out_i, in) each, not modified
    grid     of all rows together; the other arguments and errors are those of `gptq`
    """
    for W in weights:
        check_weight(W)
        if factor.in_features != W.shape[1]:
            raise QuantizationError(f"H is for {factor.in_features} inputs, the weight has {W.shape[1]}")
    W = weights[0].float() if len(weights) == 1 else torch.cat([part.float() for part in weights])
    if scheme.static_groups:
        if grid is None:
            grid = fit_grid(W, scheme, factor.importance())
        g_idx = trivial_g_idx(W.shape[1], scheme, W.device)
        ordered = W[:, factor.perm] if scheme.act_order else W
        codes_perm, row_loss = sweep_windows(
            *(ordered, factor.U, grid, g_idx[factor.perm], scheme.max_code, scheme.descent, block_size)
        )
        del ordered
    elif grid is not None:
        raise QuantizationError("a grid was given, but with static_groups=False the sweep finds its own")
    else:
        trivial = trivial_g_idx(W.shape[1], scheme, W.device)
        groups = trivial[factor.perm] if scheme.by_groups else trivial
        codes_perm, row_loss, grid = _sweep_dynamic(W[:, factor.perm], factor, scheme, groups, block_size)
        g_idx = torch.empty_like(trivial)
        g_idx[factor.perm] = groups
    return _finished(W, codes_perm, row_loss, grid, g_idx, factor, scheme, H, [len(part) for part in weights])


def gptq_batch(
    W: Tensor,
    factors: Sequence[HessianFactor],
    scheme: QuantScheme,
    *,
    parts: Sequence[int],
    hessians: Sequence[Tensor] | None = None,
    grid: Grid | None = None,
    block_size: int = 128,
) -> list[list[QuantizedWeight]]:
    """Quantizes a batch of weights of one shape, each with a factor of its own: experts. Static groups only.

    What `gptq_stacked` gives for each, up to rounding in the products. Scale search and sweep are those of the whole
    batch; refinement goes through it one by one.

    W         float32 (batch, out, in), not modified
    factors   of each H, built with the same scheme
    parts     rows of each linear that W's rows are made of, summing to out
    hessians  float32 (in, in) each, see `gptq`
    grid      from `fit_grid_batch`

    Returns the linears of each weight. Raises QuantizationError as `gptq` does.
    """
    if not scheme.static_groups:
        raise QuantizationError("a batch is solved on grids that are fixed before; set static_groups=True")
    if W.dim() != 3 or len(factors) != len(W) or sum(parts) != W.shape[1]:
        raise QuantizationError(
            f"W is {tuple(W.shape)} for {len(factors)} factors and parts of {list(parts)} rows; it must be "
            f"(batch, out, in) = ({len(factors)}, {sum(parts)}, in)"
        )
    check_weight(W.flatten(0, 1))
    grid = fit_grid_batch(W, factors, scheme) if grid is None else grid
    g_idx = trivial_g_idx(W.shape[2], scheme, W.device)
    perm = torch.stack([factor.perm for factor in factors])
    ordered = W.gather(2, perm.unsqueeze(1).expand_as(W))
    U = torch.stack([factor.U for factor in factors])
    codes, loss = sweep_windows(ordered, U, grid, g_idx[perm], scheme.max_code, scheme.descent, block_size)
    del ordered, U
    results = []
    for i, factor in enumerate(factors):
        own, H = Grid(grid.scales[i], grid.zeros[i]), None if hessians is None else hessians[i]
        results.append(_finished(W[i], codes[i], loss[i], own, g_idx, factor, scheme, H, parts))
    return results


def fit_grid_batch(W: Tensor, factors: Sequence[HessianFactor], scheme: QuantScheme) -> Grid:
    """`fit_grid` for a batch of weights (batch, out, in): scales and zeros (batch, groups, out)."""
    batch, out_features, _ = W.shape
    grid = fit_grid(W.flatten(0, 1), scheme, torch.stack([factor.importance() for factor in factors]))
    fields = (f.view(-1, batch, out_features).transpose(0, 1).contiguous() for f in (grid.scales, grid.zeros))
    return Grid(*fields)


def _finished(
    W: Tensor,
    codes_perm: Tensor,
    row_loss: Tensor,
    grid: Grid,
    g_idx: Tensor,
    factor: HessianFactor,
    scheme: QuantScheme,
    H: Tensor | None,
    parts: Sequence[int],
) -> list[QuantizedWeight]:
    """The linears that the rows of W are made of, from codes in solving order: refined, with their losses."""
    codes = codes_perm
    if scheme.act_order:
        codes = torch.empty_like(codes_perm)
        codes[:, factor.perm] = codes_perm
    if scheme.refine > 0:
        if H is None:
            raise QuantizationError(f"refine={scheme.refine} needs H: pass it, or set refine=0")
        before = _stand_in_loss(W, codes, grid, g_idx, factor)
        codes, grid, gained = refine(
            W, H, codes, grid, g_idx, scheme, passes=scheme.refine, ridge=factor.ridge
        )
        row_loss = row_loss - gained + (_stand_in_loss(W, codes, grid, g_idx, factor) - before)
    results, start = [], 0
    for part in parts:
        rows = slice(start, start + part)
        start = rows.stop
        own = Grid(grid.scales[:, rows].contiguous(), grid.zeros[:, rows].contiguous())
        D = W[rows] - dequantize_codes(codes[rows], own, g_idx)
        exact = None if scheme.refine > 0 else H
        loss = _undamped_loss(D, row_loss[rows], factor) if exact is None else quadratic_loss(D, exact)
        results.append(QuantizedWeight(codes[rows], own.scales.half(), own.zeros, g_idx, scheme.bits, loss))
    return results


def _stand_in_loss(W: Tensor, codes: Tensor, grid: Grid, g_idx: Tensor, factor: HessianFactor) -> Tensor:
    """What dead inputs' stand-in diagonal puts into the loss of each row, float32 (out,)."""
    dead = torch.nonzero(factor.dead).flatten()
    D = W[:, dead] - dequantize_codes(codes[:, dead], grid, g_idx[dead])
    return factor.mean * D.square().sum(dim=1)


def _undamped_loss(D: Tensor, row_loss: Tensor, factor: HessianFactor) -> float:
    """``sum |e|^2`` less what damping and the dead inputs' stand-in diagonal put into it."""
    energy, of_dead = (
        torch.linalg.vector_norm(part, dim=1).double().square().sum() for part in (D, D[:, factor.dead])
    )
    extra = factor.ridge * energy + factor.mean * of_dead
    return max(0.0, float(row_loss.sum(dtype=torch.float64) - extra))


def _sweep_dynamic(
    W: Tensor, factor: HessianFactor, scheme: QuantScheme, groups: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Grid]:
    """The sweep with each group's grid fitted to its compensated weights when the sweep reaches it.

    W       (out, in) float32 in solving order
    groups  int (in,) in solving order: each group's number, its columns one after the other

    After a group of columns F is solved, ``W_F - Q_F = E_F U_FF`` gives the errors that the columns after it take.
    """
    U = factor.U
    out_features, in_features = W.shape
    codes = torch.empty(out_features, in_features, dtype=torch.uint8, device=W.device)
    row_loss = torch.zeros(out_features, dtype=torch.float32, device=W.device)
    found = Grid(
        torch.empty(scheme.num_groups(in_features), out_features, device=W.device),
        torch.empty(scheme.num_groups(in_features), out_features, dtype=torch.int32, device=W.device),
    )
    importance = factor.importance()[factor.perm]
    alone = scheme.with_overrides({"group_size": -1})
    numbers, counts = torch.unique_consecutive(groups, return_counts=True)
    left, start = Compensation(W, U, int(counts.max())), 0
    for group, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        end = start + count
        part, U_FF = left.columns(start, end), U[start:end, start:end].contiguous()
        grid = fit_grid(part, alone, importance[start:end])
        one_group = torch.zeros(count, dtype=torch.int32, device=W.device)
        codes[:, start:end], loss = sweep_windows(
            *(part, U_FF, grid, one_group, scheme.max_code, scheme.descent, block_size)
        )
        row_loss += loss
        found.scales[group], found.zeros[group] = grid.scales[0], grid.zeros[0]
        D = part - dequantize_codes(codes[:, start:end], grid, one_group)
        left.push(start, end, torch.linalg.solve_triangular(U_FF, D, upper=True, left=False))
        start = end
    return codes, row_loss, found
