"""A block of columns that refinement solves together, and the factor of H that it takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightgptq.core.hessian import HessianFactor
from lightgptq.core.scheme import QuantScheme

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

    @classmethod
    def of(cls, H: Tensor, indices: Tensor, scheme: QuantScheme, group: int | None) -> ColumnBlock | None:
        """None where every input of the block was always 0."""
        columns = as_slice(indices)
        H_BB = part_of(H, columns, columns).contiguous()
        if not bool((H_BB.diagonal() > 0).any()):
            return None
        order = {"act_order": True, "group_aware": False, "damp": BLOCK_DAMP}
        return cls(indices, H_BB, HessianFactor.build(H_BB, scheme.with_overrides(order)), group)

    @property
    def solving_order(self) -> Tensor:
        """int64 (n,), the columns in the order of `factor`."""
        return self.indices[self.factor.perm]

    @cached_property
    def columns(self) -> Columns:
        """`indices`, or the slice that they are."""
        return as_slice(self.indices)

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
    """
    built = (ColumnBlock.of(H, piece, scheme, at if groups else None) for at, piece in enumerate(pieces))
    return [block for block in built if block is not None]


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
