"""Allotting bits: which linears get how many, so that the checkpoint keeps to a size and errs least.

Minimise ``sum of error_g(bits_g)`` subject to ``sum of cost_g(bits_g) <= budget`` over groups g of linears that share
one choice. On the lower convex hull of each group's (cost, error) points the greedy rule, always taking the upgrade
that saves most error per bit of storage, is optimal up to the last group (Fox, Discrete optimization via marginal
analysis, Management Science 13, 1966).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightgptq.errors import UsageError


@dataclass(frozen=True)
class Choice:
    """One width for a group of linears: bits of a code, bits of storage in all, and the error that it costs."""

    bits: int
    cost: int
    error: float


def allot(options: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """One choice for each group.

    options  of each group, any order, at least one
    budget   bits of storage for all groups together

    Raises UsageError when even the smallest choices are over the budget.
    """
    hulls = [_hull(group) for group in options]
    at = [0] * len(hulls)
    spent = sum(hull[0].cost for hull in hulls)
    if spent > budget:
        raise UsageError(f"the smallest widths take {spent} bits, more than the {budget} that were given")
    closed: set[int] = set()
    while True:
        best, gain = -1, 0.0
        for g, hull in enumerate(hulls):
            if g in closed or at[g] + 1 >= len(hull):
                continue
            now, following = hull[at[g]], hull[at[g] + 1]
            slope = (now.error - following.error) / (following.cost - now.cost)
            if slope > gain:
                best, gain = g, slope
        if best < 0:
            return [hull[i] for hull, i in zip(hulls, at, strict=True)]
        more = hulls[best][at[best] + 1].cost - hulls[best][at[best]].cost
        if spent + more > budget:
            closed.add(best)  # too big a step; a smaller one of another group may still fit
        else:
            at[best] += 1
            spent += more


def _hull(group: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull of a group's points, by cost: error falls along it, and ever more slowly."""
    hull: list[Choice] = []
    for choice in sorted(group, key=lambda c: (c.cost, c.error)):
        if hull and choice.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    return (b.error - a.error) / (b.cost - a.cost)
