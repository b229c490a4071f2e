"""Grids: the scale and zero of every group and output, and rounding onto them.

``q(w) = scale * (clamp(round(w / scale) + zero, 0, 2^bits - 1) - zero)``  (GPTQ, arXiv 2210.17323, section 4)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import QuantizationError

SMALLEST_SCALE = 2.0**-24  # the smallest float16 above zero: a scale that underflows becomes this
LARGEST_SCALE = 65504.0  # the largest finite float16


@dataclass
class Grid:
    """Scales and zeros of one linear layer.

    scales  float32 (groups, out), finite and not 0, holding values that float16 can hold exactly
    zeros   int32 (groups, out), each in [0, 2^bits - 1]
    """

    scales: Tensor
    zeros: Tensor


def trivial_g_idx(in_features: int, scheme: QuantScheme, device: torch.device | str = "cpu") -> Tensor:
    """Group of each input when groups are runs of neighbours: ``i // group_size``, int32 (in,)."""
    index = torch.arange(in_features, dtype=torch.int32, device=device)
    return index // scheme.group_width(in_features)


def check_weight(W: Tensor) -> None:
    """Raises QuantizationError unless ``W`` (out, in) is a floating matrix of finite values."""
    if W.dim() != 2 or not W.is_floating_point() or W.numel() == 0:
        raise QuantizationError(
            f"a weight must be a floating matrix (out, in), got {W.dtype} {tuple(W.shape)}"
        )
    bad = int((~torch.isfinite(W)).sum())
    if bad:
        raise QuantizationError(
            f"the weight {tuple(W.shape)} holds {bad} values that are NaN or infinite; repair the source"
        )


def round_scales(scales: Tensor) -> Tensor:
    """Scales rounded to float16, sign kept, never 0: float32 of the same shape.

    Rounding comes before quantizing, so that the codes are chosen for the scale that is stored.

    Raises QuantizationError when one is NaN or beyond float16.
    """
    magnitude = scales.abs().clamp_min(SMALLEST_SCALE)
    if not bool((magnitude <= LARGEST_SCALE).all()):
        raise QuantizationError(
            f"a group needs a scale of {float(magnitude.max()):g}, float16 ends at {LARGEST_SCALE:g}; "
            "rescale the weight or skip this layer with a rule"
        )
    return torch.copysign(magnitude.half().float(), scales)


def split_groups(W: Tensor, scheme: QuantScheme) -> Tensor:
    """``W`` (out, in) as (out, groups, width), the ragged last group filled up with its own first value.

    Repeating a value of the group leaves its minimum and maximum as they are.
    """
    out_features, in_features = W.shape
    width, groups = scheme.group_width(in_features), scheme.num_groups(in_features)
    missing = groups * width - in_features
    if missing:
        filler = W[:, (groups - 1) * width].unsqueeze(1).expand(out_features, missing)
        W = torch.cat([W, filler], dim=1)
    return W.reshape(out_features, groups, width)


def minmax_grid(lo: Tensor, hi: Tensor, scheme: QuantScheme, zero_min: int = 1) -> tuple[Tensor, Tensor]:
    """Unrounded scales and zeros that cover ``[lo, hi]`` and 0.

    Symmetric: ``scale = 2 max(-lo, hi) / (2^bits - 1)``, ``zero = 2^(bits-1)``.
    Asymmetric: ``scale = (hi - lo) / (2^bits - 1)``, ``zero = round(-lo / scale)`` in [zero_min, 2^bits - 1].

    lo, hi: float32, any shape. Returns scales float32 and zeros int32 of that shape; 0 range: scale 1.
    """
    lo, hi = lo.clamp_max(0), hi.clamp_min(0)
    if scheme.sym:
        scales = torch.maximum(-lo, hi) * (2.0 / scheme.max_code)
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        return scales, torch.full_like(scales, scheme.mid_code, dtype=torch.int32)
    scales = (hi - lo) / scheme.max_code
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    wanted = torch.round(-lo / scales)
    zeros = wanted.clamp(zero_min, scheme.max_code)
    # A zero raised to zero_min takes levels from the positive side: widen the steps so that
    # hi is still covered.
    widened = hi / (scheme.max_code - zeros).clamp_min(1)
    scales = torch.where((zeros > wanted) & (zeros < scheme.max_code), torch.maximum(scales, widened), scales)
    return scales, zeros.to(torch.int32)


def fit_grid(W: Tensor, scheme: QuantScheme, importance: Tensor | None = None, *, zero_min: int = 1) -> Grid:
    """Scales and zeros for runs of ``group_size`` neighbouring inputs, the last run possibly shorter.

    W           float (out, in)
    importance  float32 (in,), the diagonal of H
    zero_min    smallest zero of an asymmetric grid; 1 because format v1 stores zero - 1 and readers disagree
                on -1

    Raises QuantizationError when W is not finite or needs a scale beyond float16.
    """
    check_weight(W)
    grouped = split_groups(W.float(), scheme)
    scales, zeros = minmax_grid(grouped.amin(dim=2), grouped.amax(dim=2), scheme, zero_min)
    return Grid(round_scales(scales).t().contiguous(), zeros.t().contiguous())


def quantize_to_grid(W: Tensor, grid: Grid, g_idx: Tensor, scheme: QuantScheme) -> Tensor:
    """Nearest codes on a grid: ``clamp(round(w / scale) + zero, 0, 2^bits - 1)``.

    W (out, in) float32, g_idx int (in,). Returns uint8 (out, in).
    """
    group = g_idx.long()
    scales, zeros = grid.scales[group].t(), grid.zeros[group].t()
    codes = (torch.round(W.float() / scales) + zeros).clamp_(0, scheme.max_code)
    return codes.to(torch.uint8)


def dequantize_codes(codes: Tensor, grid: Grid, g_idx: Tensor) -> Tensor:
    """``scales[g_idx] * (codes - zeros[g_idx])``: float32 (out, in) from uint8 (out, in)."""
    group = g_idx.long()
    return (codes.float() - grid.zeros[group].t()) * grid.scales[group].t()
