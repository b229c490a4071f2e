"""What the solvers return: integer codes with their grid, before any packing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PANEL_VALUES = 1 << 22  # dequantized at a time: three temporaries of 16 MiB


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
        group, (out_features, in_features) = self.g_idx.long(), self.codes.shape
        weight = torch.empty(out_features, in_features, dtype=dtype, device=self.codes.device)
        step = max(1, PANEL_VALUES // in_features)
        for rows in (slice(start, start + step) for start in range(0, out_features, step)):
            zeros = self.zeros[:, rows].float().index_select(0, group)  # (in, rows)
            panel = self.codes[rows].t().float().sub_(zeros)
            weight[rows] = panel.mul_(self.scales[:, rows].float().index_select(0, group)).t()
        return weight
