"""What the solvers return: integer codes with their grid, before any packing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightgptq.core.grid import Grid, dequantize_codes


@dataclass
class QuantizedWeight:
    """One linear layer's codes and their grid.

    ``W[o, i] = scales[g_idx[i], o] * (codes[o, i] - zeros[g_idx[i], o])``

    codes   uint8 (out, in), each in [0, 2^bits - 1]
    scales  float16 (groups, out)
    zeros   int32 (groups, out), each in [0, 2^bits - 1]
    g_idx   int32 (in,), group of each input
    bits    2, 3, 4 or 8
    loss    sum over rows of (w - q) H (w - q)^T with the undamped H, NaN where no H was given
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    bits: int
    loss: float = float("nan")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out, in) that inference sees, computed in float32 and rounded once to ``dtype``."""
        return dequantize_codes(self.codes, Grid(self.scales, self.zeros), self.g_idx, dtype)
