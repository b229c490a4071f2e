"""QuantScheme: what the integers of one linear layer mean and how they are found. Saved with the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from lightgptq.errors import UsageError

BITS = (2, 3, 4, 8)
METHODS = ("gptq", "rtn", "obq")
SCALE_SEARCHES = ("minmax", "hessian")


@dataclass(frozen=True)
class QuantScheme:
    """How one linear layer is quantized.

    bits          2, 3, 4 or 8: width of one code.
    group_size    inputs that share one scale and zero, or -1 for all of them; need not divide in_features.
    sym           True: the zero is fixed at 2^(bits-1); False: one integer zero per group and output.
    method        "gptq" (arXiv 2210.17323), "obq" (arXiv 2208.11580) or "rtn" (round to nearest).
    act_order     columns are solved by descending diagonal of H instead of left to right.
    static_groups True: groups are runs of neighbouring inputs and their scales are fixed before the sweep,
                  so g_idx stays ``i // group_size``; False: scales are found as the sweep reaches each group
                  (with act_order the groups then follow the permuted order and g_idx is not trivial).
    group_aware   with act_order and without static_groups: whole groups of neighbours are solved one after the other,
                  those with the largest diagonal first, each by descending diagonal, so g_idx is trivial again.
    scale_search  how scales and zeros are found: "minmax" covers every weight as in the paper, "hessian" minimises
                  the rounding error weighted by what each input is worth, over clipping, sign and zero.
    damp          fraction of the mean diagonal of H added to the diagonal (paper, section 3.3, step 3).
    mismatch      share (0 to 1) of the difference between the original's and the quantized model's inputs that the
                  weights are corrected for before the sweep; takes a second forward of the calibration set.
    mismatch_every  that difference is measured on every n-th calibration batch, which divides its price by n.
    descent       cycles of coordinate descent over every window of columns in the sweep, and over every block that
                  refinement solves; see core/search.py. 0: columns are rounded one after the other, as in the paper.
    refine        passes of block descent over codes and scales after the sweep, none of which increases the loss; see
                  `refine` in core/refine.py.
    tune          gradient steps that train codes and scales of the whole decoder block on its output after that
                  (a block takes as many as the most of its linears ask for); takes a second forward, too.

    Raises UsageError when a value is not allowed.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    method: str = "gptq"
    act_order: bool = True
    static_groups: bool = True
    group_aware: bool = False
    damp: float = 0.01
    scale_search: str = "hessian"
    mismatch: float = 0.0
    mismatch_every: int = 1
    descent: int = 0
    refine: int = 0
    tune: int = 0

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(
                f"bits={self.bits!r} is not supported; choose one of {', '.join(map(str, BITS))}"
            )
        if self.group_size != -1 and not (isinstance(self.group_size, int) and self.group_size >= 1):
            raise UsageError(
                f"group_size={self.group_size!r} is not supported; give -1 (one group) or a positive number"
            )
        if self.method not in METHODS:
            raise UsageError(f"method={self.method!r} is not supported; choose one of {', '.join(METHODS)}")
        if not 0.0 <= self.mismatch <= 1.0:
            raise UsageError(f"mismatch={self.mismatch!r} is not supported; give a share from 0 to 1")
        if not 1 <= self.mismatch_every <= 1000:
            raise UsageError(
                f"mismatch_every={self.mismatch_every!r} is not supported; give a number of batches from 1 to 1000"
            )
        if not 0 <= self.descent <= 100:
            raise UsageError(
                f"descent={self.descent!r} is not supported; give a number of cycles from 0 to 100"
            )
        if not 0 <= self.refine <= 100:
            raise UsageError(
                f"refine={self.refine!r} is not supported; give a number of passes from 0 to 100"
            )
        if not 0 <= self.tune <= 100_000:
            raise UsageError(f"tune={self.tune!r} is not supported; give a number of steps from 0 to 100000")
        if self.scale_search not in SCALE_SEARCHES:
            raise UsageError(
                f"scale_search={self.scale_search!r} is not supported; choose one of {', '.join(SCALE_SEARCHES)}"
            )
        if not 0.0 <= self.damp < 1.0:
            raise UsageError(
                f"damp={self.damp!r} is not supported; give a fraction from 0 up to, not including, 1"
            )

    @property
    def levels(self) -> int:
        """Number of codes, 2^bits."""
        return 1 << self.bits

    @property
    def max_code(self) -> int:
        """Largest code, 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def mid_code(self) -> int:
        """The zero of a symmetric grid, 2^(bits-1)."""
        return 1 << (self.bits - 1)

    @property
    def by_groups(self) -> bool:
        """Whether columns are solved group by group in an order that the Hessian gives."""
        return self.act_order and self.group_aware and not self.static_groups

    @property
    def permuted_groups(self) -> bool:
        """Whether g_idx follows the solving order and is not ``i // group_size``."""
        scattered = self.act_order and not self.static_groups and not self.group_aware
        return self.method == "gptq" and scattered and self.group_size != -1

    def group_width(self, in_features: int) -> int:
        """Inputs in one full group: group_size, or in_features when it is -1 or larger."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def num_groups(self, in_features: int) -> int:
        """Number of groups G = ceil(in_features / group_size)."""
        return -(-in_features // self.group_width(in_features))

    def with_overrides(self, overrides: dict[str, Any]) -> QuantScheme:
        """A copy with some fields replaced; raises UsageError for a field that does not exist."""
        unknown = sorted(set(overrides) - set(asdict(self)))
        if unknown:
            raise UsageError(f"unknown scheme field {unknown[0]!r}; fields are {', '.join(asdict(self))}")
        return replace(self, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)
