"""GPTQ for one linear layer: grid, column order, sweep (Frantar et al., arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightgptq.core.grid import Grid, check_weight, dequantize_codes, fit_grid, trivial_g_idx
from lightgptq.core.hessian import HessianFactor
from lightgptq.core.refine import refine
from lightgptq.core.rtn import quadratic_loss
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.sweep import sweep
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
    H           float32 (in, in), optional: makes the reported loss exact; without it the damping's part is
                taken off the sweep's own sum, which is the same up to rounding; needed by scheme.refine
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
        codes_perm, row_loss = sweep(
            W[:, factor.perm], factor.U, grid, g_idx[factor.perm], scheme.max_code, block_size
        )
    elif grid is not None:
        raise QuantizationError("a grid was given, but with static_groups=False the sweep finds its own")
    else:
        codes_perm, row_loss, grid = _sweep_dynamic(W[:, factor.perm], factor, scheme, block_size)
        g_idx = torch.empty(W.shape[1], dtype=torch.int32, device=W.device)
        g_idx[factor.perm] = trivial_g_idx(W.shape[1], scheme, W.device)
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
    codes, loss = sweep(ordered, U, grid, g_idx[perm], scheme.max_code, block_size)
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
    codes = torch.empty_like(codes_perm)
    codes[:, factor.perm] = codes_perm
    if scheme.refine > 0:
        if H is None:
            raise QuantizationError(f"refine={scheme.refine} needs H: pass it, or set refine=0")
        codes, grid = refine(W, H, codes, grid, g_idx, scheme, rounds=scheme.refine, ridge=factor.ridge)
    results, start = [], 0
    for part in parts:
        rows = slice(start, start + part)
        start = rows.stop
        own = Grid(grid.scales[:, rows].contiguous(), grid.zeros[:, rows].contiguous())
        D = W[rows] - dequantize_codes(codes[rows], own, g_idx)
        loss = _undamped_loss(D, row_loss[rows], factor) if H is None else quadratic_loss(D, H)
        results.append(QuantizedWeight(codes[rows], own.scales.half(), own.zeros, g_idx, scheme.bits, loss))
    return results


def _undamped_loss(D: Tensor, row_loss: Tensor, factor: HessianFactor) -> float:
    """``sum |e|^2`` less what damping and the dead inputs' stand-in diagonal put into it."""
    energy = D.square().sum(dim=0, dtype=torch.float64)
    extra = factor.ridge * energy.sum() + factor.mean * energy[factor.dead].sum()
    return max(0.0, float(row_loss.sum(dtype=torch.float64) - extra))


def _sweep_dynamic(
    W: Tensor, factor: HessianFactor, scheme: QuantScheme, block_size: int
) -> tuple[Tensor, Tensor, Grid]:
    """The sweep with each group's grid fitted to its compensated weights when the sweep reaches it.

    W (out, in) float32 in solving order. After a group of columns F is solved, ``W_F - Q_F = E_F U_FF``
    gives the errors that the columns after it need: ``W_R -= E_F U_FR``.
    """
    W, U = W.clone(), factor.U
    out_features, in_features = W.shape
    width = scheme.group_width(in_features)
    codes = torch.empty(out_features, in_features, dtype=torch.uint8, device=W.device)
    row_loss = torch.zeros(out_features, dtype=torch.float32, device=W.device)
    importance = factor.importance()[factor.perm]
    scales, zeros = [], []
    for start in range(0, in_features, width):
        end = min(start + width, in_features)
        part, U_FF = W[:, start:end], U[start:end, start:end].contiguous()
        one_group = torch.zeros(end - start, dtype=torch.int32, device=W.device)
        grid = fit_grid(part, scheme.with_overrides({"group_size": -1}), importance[start:end])
        group_codes, group_loss = sweep(part.contiguous(), U_FF, grid, one_group, scheme.max_code, block_size)
        codes[:, start:end] = group_codes
        row_loss += group_loss
        scales.append(grid.scales)
        zeros.append(grid.zeros)
        if end < in_features:
            D = part - dequantize_codes(group_codes, grid, one_group)
            E = torch.linalg.solve_triangular(U_FF, D, upper=True, left=False)
            W[:, end:].addmm_(E, U[start:end, end:], alpha=-1)
    return codes, row_loss, Grid(torch.cat(scales), torch.cat(zeros))
