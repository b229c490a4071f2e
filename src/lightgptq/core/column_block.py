"""A block of columns that refinement solves together, and the factor of H that it takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from lightgptq.core.hessian import HessianFactor
from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import QuantizationError

BLOCK_DAMP = 1e-4  # of the mean diagonal of H_BB, so that a block with repeated inputs can be factored
Columns = Tensor | slice


@dataclass(frozen=True)
class ColumnBlock:
    """Columns that are solved together, and what all rows need of H there.

    indices  int64 (n,), in order
    H        float32 (n, n)
    factor   of H, ``H^-1 = U^T U``, in solving order: important columns first
    group    which group they are; None for a block of any columns
    """

    indices: Tensor
    H: Tensor
    factor: HessianFactor
    group: int | None

    @property
    def solving_order(self) -> Tensor:
        """int64 (n,), the columns in the order of `factor`."""
        return self.indices[self.factor.perm]

    @cached_property
    def columns(self) -> Columns:
        """`indices`, or the slice that they are."""
        return as_slice(self.indices)

    @cached_property
    def ordered_H(self) -> Tensor:
        """`H` with rows and columns in solving order."""
        return self.H[self.factor.perm][:, self.factor.perm].contiguous()

    @property
    def U(self) -> Tensor:
        """Float32 (n, n), ``H^-1 = U^T U`` with the columns in the order of `indices`."""
        U = torch.empty_like(self.factor.U)
        U[:, self.factor.perm] = self.factor.U
        return U

    @property
    def inverse(self) -> Tensor:
        """int64 (n,), place of each column in solving order."""
        return torch.argsort(self.factor.perm)


def column_blocks(
    H: Tensor, pieces: Iterable[Tensor], scheme: QuantScheme, *, groups: bool
) -> list[ColumnBlock]:
    """A block for each of some columns, int64 (n,) in order, but those whose every input was always 0.

    groups  the pieces are the groups, in order; otherwise they are any columns

    Raises QuantizationError where H of a block cannot be factored.
    """
    order = scheme.with_overrides({"act_order": True, "group_aware": False, "damp": BLOCK_DAMP})
    live = [
        (at, piece, H_BB) for at, piece in enumerate(pieces) if (H_BB := _live_part(H, piece)) is not None
    ]
    result = []
    for _, alike in groupby(live, key=lambda one: len(one[1])):
        found = list(alike)
        factors = HessianFactor.build_batch([H_BB for _, _, H_BB in found], order)
        for (at, piece, H_BB), factor in zip(found, factors, strict=True):
            if isinstance(factor, QuantizationError):
                raise factor
            result.append(ColumnBlock(piece, H_BB, factor, at if groups else None))
    return result


def _live_part(H: Tensor, piece: Tensor) -> Tensor | None:
    columns = as_slice(piece)
    H_BB = part_of(H, columns, columns).contiguous()
    return H_BB if bool((H_BB.diagonal() > 0).any()) else None


def as_slice(columns: Tensor) -> Columns:
    """A run of neighbours as a slice, which is a view where an index would be a copy."""
    first, last = int(columns[0]), int(columns[-1])
    run = last - first == len(columns) - 1 and bool((columns.diff() == 1).all())
    return slice(first, last + 1) if run else columns


def part_of(H: Tensor, rows: Columns, columns: Columns) -> Tensor:
    """The rows and columns named, of a matrix."""
    if isinstance(rows, slice) or isinstance(columns, slice):
        return H[rows][:, columns]
    return H[rows.unsqueeze(1), columns]
