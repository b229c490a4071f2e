"""The scales that suit codes best, in closed form ("Two-Stage Grid", arXiv 2602.02126, stage 2).

With ``z_g`` a row's steps (code - zero) in group g and 0 elsewhere, GPTQ's loss ``(w - q) H (w - q)^T`` is quadratic in
the change c of the row's scales: ``A c = b``, ``A_gh = z_g H z_h^T``, ``b_g = z_g H (w - q)^T``, one small system per
row, and the loss falls by ``c (2 b - A c)``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightgptq.core.grid import Grid, round_scales

REFIT_RIDGE = 1e-5  # pulls scales that the data leave open to their present values
SYSTEM_VALUES = 1 << 24  # entries of the normal equations held at a time: 64 MiB
STEP_VALUES = 1 << 21  # steps of the rows taken at a time: 8 MiB, so that they stay in the cache
PRODUCT_COLUMNS = 2048  # of ``z_g H`` taken at a time on a CPU, for the second-level cache


def refit_scales(W: Tensor, H: Tensor, codes: Tensor, grid: Grid, g_idx: Tensor) -> tuple[Grid, Tensor]:
    """The scales that minimise the loss for the codes as they are, rounded to float16.

    Rows that rounding to float16 would make worse keep theirs.

    W float32 (out, in), H float32 (in, in), codes uint8 (out, in), g_idx int32 (in,).
    Returns the grid and by how much each row's loss fell, float64 (out,).
    """
    groups, width, place = _places(g_idx, grid.scales.shape[0])
    if place is not None:  # columns in the order of their groups, each as wide as the widest
        H = _spread(_spread(H, place, groups * width).t(), place, groups * width)
    scales, gained = grid.scales.clone(), torch.zeros(len(W), dtype=torch.float64, device=W.device)
    rows_at_once = max(1, min(SYSTEM_VALUES // groups**2, max(16, STEP_VALUES // (groups * width))))
    for rows in torch.arange(W.shape[0], device=W.device).split(rows_at_once):
        steps = codes[rows].float() - grid.zeros[:, rows].t().float()[:, g_idx.long()]
        D = torch.addcmul(W[rows], steps, grid.scales[:, rows].t()[:, g_idx.long()], value=-1)
        if place is not None:
            steps, D = (_spread(values, place, groups * width) for values in (steps, D))
        A, b = _normal_equations(D, H, steps.view(len(rows), groups, width))
        old = grid.scales[:, rows].t()
        pull = REFIT_RIDGE * A.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True).clamp_min(1e-30)
        fitted = old + torch.linalg.solve(A + torch.diag_embed(pull.expand(-1, groups)), b)
        fitted = round_scales(torch.where(torch.isfinite(fitted) & (fitted != 0), fitted, old))
        change = fitted - old
        gain = (change * (2 * b - torch.bmm(A, change.unsqueeze(2)).squeeze(2))).sum(dim=1)
        scales[:, rows] = torch.where(gain.unsqueeze(1) > 0, fitted, old).t()
        gained[rows] = gain.clamp_min(0).double()
    return Grid(scales, grid.zeros), gained


def _places(g_idx: Tensor, groups: int) -> tuple[int, int, Tensor | None]:
    """Number of groups, inputs of the widest, each input's place among ``groups * width`` (None: it is its own)."""
    counts = torch.bincount(g_idx.long(), minlength=groups)
    width = int(counts.max())
    sorted_inputs = torch.argsort(g_idx, stable=True)
    first = torch.cumsum(counts, 0) - counts
    group = g_idx[sorted_inputs].long()
    place = torch.empty_like(group)
    place[sorted_inputs] = group * width + torch.arange(len(group), device=group.device) - first[group]
    if bool((place == torch.arange(len(place), device=place.device)).all()) and len(place) == groups * width:
        return groups, width, None
    return groups, width, place


def _spread(values: Tensor, place: Tensor, width: int) -> Tensor:
    """Columns of ``values`` (rows, in) at their places, zeros elsewhere: (rows, width)."""
    return pad(torch.empty_like(values), (0, width - values.shape[1])).zero_().index_copy_(1, place, values)


def _normal_equations(D: Tensor, H: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """A (rows, g, g) and b (rows, g) from D (rows, in), H (in, in) and steps (rows, g, in / g)."""
    rows, groups, width = steps.shape
    A = torch.zeros(rows, groups, groups, device=D.device)
    at_once = groups if D.is_cuda else max(1, PRODUCT_COLUMNS // width)
    for start in range(0, groups, at_once):
        end = min(start + at_once, groups)
        for g in range(end):  # on and above the diagonal
            others = slice(max(g, start), end)
            product = steps[:, g] @ H[g * width : (g + 1) * width, others.start * width : end * width]
            product = product.view(rows, -1, width).mul_(steps[:, others])
            torch.sum(product, dim=2, out=A[:, g, others])
    A += A.triu(1).mT
    return A, ((D @ H).view(rows, groups, width) * steps).sum(dim=2)
