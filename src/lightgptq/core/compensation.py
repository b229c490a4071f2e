"""Weights that take the errors of the columns solved before them."""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 512  # columns whose errors reach the weights far after them by one product


class Compensation:
    """``W_k -= E_B U_Bk`` for all columns k after a block B that was solved (GPTQ, arXiv 2210.17323, Algorithm 1).

    Columns that may be read next take the errors at once, those further away for a panel of columns together.

    W      float32 (out, in), columns in solving order, not modified
    U      float32 (in, in), upper, in the same order; both may have a batch dimension in front
    reach  columns that are read at once, at most
    """

    def __init__(self, W: Tensor, U: Tensor, reach: int) -> None:
        self.W, self.U, self.reach = W.clone(), U, reach
        self.first, self.near = (
            0,
            PANEL + reach,
        )  # where the panel begins, up to where columns are kept up to date
        self.errors = torch.empty(*W.shape[:-1], PANEL + reach, dtype=W.dtype, device=W.device)

    def columns(self, start: int, end: int) -> Tensor:
        """The weights as they are to be solved, contiguous; everything before ``start`` must have been pushed."""
        return self.W[..., start:end].contiguous()

    def push(self, start: int, end: int, E: Tensor) -> None:
        """Take the errors E (out, end - start) of the columns that follow those pushed before."""
        self.errors[..., start - self.first : end - self.first] = E
        self._subtract(E, start, end, slice(end, self.near))
        if end - self.first >= PANEL:
            self._subtract(self.errors[..., : end - self.first], self.first, end, slice(self.near, None))
            self.first, self.near = end, end + PANEL + self.reach

    def _subtract(self, E: Tensor, start: int, end: int, later: slice) -> None:
        left, right = self.W[..., later], self.U[..., start:end, later]
        if left.dim() == 2:
            left.addmm_(E, right, alpha=-1)
        else:
            left.baddbmm_(E, right, alpha=-1)
