"""Windows of columns in which codes are searched for: where they lie, and what a difference costs there."""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of a window, and how many of them are kept: LGQ_WINDOW and LGQ_KEPT of the native library.
WINDOW, KEPT = 128, 64


def windows(in_features: int) -> list[tuple[int, int, int]]:
    """Of each window its first column, its end, and the end of what is kept: all of the last one."""
    count = 1 + max(0, -(-(in_features - WINDOW) // KEPT))
    ends = ((start, min(start + WINDOW, in_features)) for start in range(0, count * KEPT, KEPT))
    return [(start, end, end if end == in_features else start + KEPT) for start, end in ends]


def curvature(U_BB: Tensor) -> tuple[Tensor, Tensor]:
    """``U_BB^-1`` and ``G = (U_BB^T U_BB)^-1``, both (n, n), of a window B; a batch dimension in front is allowed.

    ``d G d`` is what a difference d in B costs once all columns after B have been compensated.
    """
    identity = torch.eye(U_BB.shape[-1], dtype=U_BB.dtype, device=U_BB.device).expand_as(U_BB)
    inverse = torch.linalg.solve_triangular(U_BB, identity, upper=True)
    return inverse, inverse @ inverse.mT
