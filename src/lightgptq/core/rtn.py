"""RTN: round every weight to the nearest code of its group's grid, looking at no data."""

from __future__ import annotations

import torch
from torch import Tensor

from lightgptq.core.grid import Grid, dequantize_codes, fit_grid, quantize_to_grid, trivial_g_idx
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.types import QuantizedWeight


def rtn(W: Tensor, scheme: QuantScheme, H: Tensor | None = None, grid: Grid | None = None) -> QuantizedWeight:
    """Rounds to nearest: ``code = clamp(round(w / scale) + zero, 0, 2^bits - 1)``.

    W     float (out, in), not modified
    H     float32 (in, in), only to report the loss
    grid  scales and zeros to use instead of ``fit_grid``'s

    Raises QuantizationError when W is not finite or needs a scale beyond float16.
    """
    W = W.float()
    if grid is None:
        grid = fit_grid(W, scheme)
    g_idx = trivial_g_idx(W.shape[1], scheme, W.device)
    codes = quantize_to_grid(W, grid, g_idx, scheme)
    loss = float("nan") if H is None else quadratic_loss(W - dequantize_codes(codes, grid, g_idx), H)
    return QuantizedWeight(codes, grid.scales.half(), grid.zeros, g_idx, scheme.bits, loss)


def quadratic_loss(D: Tensor, H: Tensor) -> float:
    """``sum over rows d H d^T`` for a displacement ``D`` (out, in) float32 and ``H`` (in, in) float32."""
    return float((D @ H).mul_(D).sum(dtype=torch.float64))
