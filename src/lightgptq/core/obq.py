"""OBQ: quantize one weight at a time, the cheapest first, row by row (Frantar & Alistarh, arXiv
2208.11580)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightgptq import native
from lightgptq.core.grid import Grid, check_weight, dequantize_codes, fit_grid, trivial_g_idx
from lightgptq.core.hessian import HessianFactor
from lightgptq.core.obq_cpu import obq_cpu
from lightgptq.core.rtn import quadratic_loss
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.types import QuantizedWeight
from lightgptq.errors import QuantizationError

ROWS_BYTES = 256 << 20  # inverses held at a time: every row downdates its own


def obq(
    W: Tensor,
    H: Tensor,
    scheme: QuantScheme,
    *,
    grid: Grid | None = None,
    factor: HessianFactor | None = None,
) -> QuantizedWeight:
    """Quantizes each row of ``W`` greedily (section 5, eq. 7 and Algorithm 3 of the paper).

    ``p = argmin (quant(w_p) - w_p)^2 / [H^-1]_pp`` over the weights still free, then
    ``w -= (w_p - quant(w_p)) / [H^-1]_pp * H^-1[p]`` and p is taken out of ``H^-1``. A weight that was
    pushed off its grid by more than half a step is quantized at once, largest error first (section 5,
    "outliers").

    W       float (out, in), not modified
    H       float32 (in, in)
    grid    scales and zeros to use instead of ``fit_grid``'s
    factor  of H with the same scheme, when it is at hand

    Groups are runs of neighbouring inputs. Cost O(out in^3) time; memory is bounded by solving rows in
    chunks. Raises QuantizationError as ``HessianFactor.build`` and ``fit_grid`` do.
    """
    check_weight(W)
    W = W.float()
    if H.shape != (W.shape[1], W.shape[1]):
        raise QuantizationError(f"H is {tuple(H.shape)}, the weight has {W.shape[1]} inputs")
    factor = factor if factor is not None else HessianFactor.build(H, scheme)
    if grid is None:
        grid = fit_grid(W, scheme, factor.importance())
    g_idx = trivial_g_idx(W.shape[1], scheme, W.device)
    U = torch.empty_like(factor.U)
    U[:, factor.perm] = factor.U  # columns back in original order: H^-1 = U^T U
    Hinv = (U.double().t() @ U.double()).contiguous()
    library = native.load() if W.device.type == "cpu" else None
    if library is not None:
        codes, _ = obq_cpu(library, W, Hinv, grid, g_idx, scheme.max_code)
    else:
        codes = obq_torch(W, Hinv, grid, g_idx, scheme.max_code)
    loss = quadratic_loss(W - dequantize_codes(codes, grid, g_idx), H)
    return QuantizedWeight(codes, grid.scales.half(), grid.zeros, g_idx, scheme.bits, loss)


def obq_torch(W: Tensor, Hinv: Tensor, grid: Grid, g_idx: Tensor, max_code: int) -> Tensor:
    """Codes uint8 (out, in) in plain PyTorch on any device, float64, a chunk of rows at a time: the reference
    for native ones."""
    group = g_idx.long()
    scales, zeros = grid.scales[group].t().contiguous(), grid.zeros[group].t().contiguous()
    step = max(1, ROWS_BYTES // (8 * Hinv.numel()))
    chunks = [
        _solve_rows(W[i : i + step], Hinv, scales[i : i + step], zeros[i : i + step], max_code)
        for i in range(0, W.shape[0], step)
    ]
    return torch.cat(chunks)


def _solve_rows(W: Tensor, Hinv: Tensor, scales: Tensor, zeros: Tensor, max_code: int) -> Tensor:
    """Codes uint8 (rows, in) of some rows; all tensors (rows, in) but ``Hinv`` (in, in) float64."""
    rows, in_features = W.shape
    w = W.double()
    scales, zeros = scales.double(), zeros.double()
    inverse = Hinv.expand(rows, in_features, in_features).clone()
    codes = torch.zeros(rows, in_features, dtype=torch.uint8, device=W.device)
    free = torch.ones(rows, in_features, dtype=torch.bool, device=W.device)
    each = torch.arange(rows, device=W.device)
    for _ in range(in_features):
        code = (torch.round(w / scales) + zeros).clamp_(0, max_code)
        error = w - (code - zeros) * scales
        pivots = inverse.diagonal(dim1=1, dim2=2)
        score = torch.where(free, error.square() / pivots, torch.inf)
        excess = torch.where(free, error.abs() / scales.abs(), -torch.inf)
        largest, outlier = excess.max(dim=1)
        # 1e-6: a value exactly between two codes is half a step away and no outlier.
        p = torch.where(largest > 0.5 + 1e-6, outlier, score.argmin(dim=1))
        codes[each, p] = code[each, p].to(torch.uint8)
        row = inverse[each, p]  # (rows, in)
        pivot = row[each, p].unsqueeze(1)
        w -= row * (error[each, p].unsqueeze(1) / pivot)
        inverse -= (row / pivot).unsqueeze(2) * row.unsqueeze(1)
        free[each, p] = False
        # Exact zeros and a unit pivot: rounding must not leak back from a solved weight.
        inverse[each, p] = 0
        inverse[each, :, p] = 0
        inverse[each, p, p] = 1
    return codes
