"""Solving groups of one shape as one batch: a GPU does many experts in the time of few.

Scale search, factorisation and sweep are those of the whole batch (`core.solver.gptq_batch`); what concerns one expert
(its damping, its target, its loss) stays its own. A batch never decides what is recorded of an expert: what is special
about one is left to be solved by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightgptq.core.hessian import HessianFactor
from lightgptq.core.mismatch import Correction
from lightgptq.core.scheme import QuantScheme
from lightgptq.core.solver import fit_grid_batch, gptq_batch
from lightgptq.core.types import QuantizedWeight
from lightgptq.errors import QuantizationError
from lightgptq.quantization.timing import stage


@dataclass
class Stacked:
    """The linears of one group as the rows of one weight, and what is known of their input.

    W         float32 (out, in)
    parts     rows of each linear
    H         float32 (in, in)
    M         the input mismatch, float32 (in, in), None where it is not corrected
    scheme    of all of them
    followed  H of the tokens in M where these are not all, see `Correction`
    """

    W: Tensor
    parts: tuple[int, ...]
    H: Tensor
    M: Tensor | None
    scheme: QuantScheme
    followed: Tensor | None = None

    @property
    def alike(self) -> tuple[object, ...]:
        """Equal for groups that can be solved together."""
        return self.scheme, tuple(self.W.shape), self.parts


Solved = tuple[HessianFactor, list[QuantizedWeight]]


def solve_together(groups: list[Stacked]) -> list[Solved | None]:
    """The factor and the quantized linears of each group; None for one that has to be solved by itself.

    groups  all of one `alike`; their W are given up

    None where no factor can be made, and for all where one weight or scale is beyond what can be stored: solved by
    itself each of them gives, or raises, what belongs to it.
    """
    scheme, parts = groups[0].scheme, groups[0].parts
    with stage("factor"):
        built = HessianFactor.build_batch([group.H for group in groups], scheme)
    result: list[Solved | None] = [None] * len(groups)
    factors = {at: factor for at, factor in enumerate(built) if isinstance(factor, HessianFactor)}
    if not factors:
        return result
    for at, factor in factors.items():
        group = groups[at]
        if group.M is not None:
            correction = Correction(group.M, factor, len(group.W), group.followed)
            group.W = correction.target(group.W, scheme.mismatch)
    try:
        W = torch.stack([groups[at].W for at in factors])
        for group in groups:
            del group.W
        with stage("grid"):
            grid = fit_grid_batch(W, list(factors.values()), scheme)
        hessians = [groups[at].H for at in factors] if scheme.refine else None
        with stage("sweep"):
            solved = gptq_batch(W, list(factors.values()), scheme, parts=parts, hessians=hessians, grid=grid)
    except QuantizationError:
        return result
    for (at, factor), linears in zip(factors.items(), solved, strict=True):
        result[at] = (factor, linears)
    return result
