"""Grids: the scale and zero of every group and output, and rounding onto them.

``q(w) = scale * (clamp(round(w / scale) + zero, 0, 2^bits - 1) - zero)``  (GPTQ, arXiv 2210.17323, section 4)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightgptq import native
from lightgptq.core.grid_cpu import search_grid_cpu
from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import QuantizationError
from lightgptq.native import NativeLibrary

SMALLEST_SCALE = 2.0**-24  # the smallest float16 above zero: a scale that underflows becomes this
LARGEST_SCALE = 65504.0  # the largest finite float16
# What the search tries, as fractions of the scale that covers the largest weight. More ratios (29, 60) lower the
# layer loss of real weights by less than 0.3 % at 2, 3 and 4 bits.
CLIP_RATIOS = (1.05, 0.95, 0.85, 0.75, 0.65, 0.55)
OTHER_SIDE_RATIOS = (1.1, 0.8)
SCALE_REFITS = 3
SEARCH_VALUES = 1 << 18  # weights searched at a time: the temporaries stay in a core's cache
# On a GPU every step costs a launch, however few the weights: half a dozen temporaries of 32 MiB.
GPU_SEARCH_VALUES = 1 << 23
NATIVE_SEARCH_VALUES = 1 << 22  # bounds the candidates held: 24 of 8 bytes for every group
PANEL_VALUES = 1 << 22  # dequantized at a time: a temporary of 16 MiB


@dataclass
class Grid:
    """Scales and zeros of one linear layer.

    scales  float32 (groups, out), finite and not 0, holding values that float16 can hold exactly
    zeros   int32 (groups, out), each in [0, 2^bits - 1]
    """

    scales: Tensor
    zeros: Tensor

    def each(self) -> list[Grid]:
        """The grids of a batch, where scales and zeros are (batch, groups, out)."""
        return [Grid(*own) for own in zip(self.scales, self.zeros, strict=True)]


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
    # A sum of finite values may overflow as well, so only the count decides.
    summed = bool(torch.isfinite(W.sum(dtype=torch.float32)))
    bad = 0 if summed else int((~torch.isfinite(W)).sum())
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

    With ``scale_search="hessian"`` and an importance h they minimise ``sum over i of h_i (w_i - q(w_i))^2`` over
    clipping, the sign of a symmetric scale and the zero of an asymmetric one, per group and output; otherwise
    they cover minimum and maximum.

    W           float (out, in)
    importance  float32 (in,), not negative, see ``HessianFactor.importance``; or (parts, in), one for each of as many
                equal parts of the rows
    zero_min    smallest zero of an asymmetric grid; 1 because format v1 stores zero - 1 and readers disagree
                on -1

    Raises QuantizationError when W is not finite or needs a scale beyond float16.
    """
    check_weight(W)
    if importance is None or scheme.scale_search == "minmax":
        grouped = split_groups(W.float(), scheme)
        scales, zeros = minmax_grid(grouped.amin(dim=2), grouped.amax(dim=2), scheme, zero_min)
        scales = round_scales(scales)
    else:
        library = native.load() if W.device.type == "cpu" else None
        if library is not None:
            each = importance.view(-1, W.shape[1])
            parts = zip(W.float().chunk(len(each)), each, strict=True)
            found = [_search_native(library, *part, scheme, zero_min) for part in parts]
            scales, zeros = (torch.cat(part) for part in zip(*found, strict=True))
        else:
            scales, zeros = _search_torch(W, importance, scheme, zero_min)
    return Grid(scales.t().contiguous(), zeros.t().contiguous())


def _search_torch(W: Tensor, importance: Tensor, scheme: QuantScheme, zero_min: int) -> tuple[Tensor, Tensor]:
    """Rounded scales and zeros (out, groups) of least weighted error, on any device; importance (in,), (parts, in)."""
    weights = split_groups(importance.float().view(-1, W.shape[1]), scheme).clone()
    weights.view(len(weights), -1)[:, W.shape[1] :] = 0  # the ragged group's filler
    values = GPU_SEARCH_VALUES if W.is_cuda else SEARCH_VALUES
    part_of = torch.arange(W.shape[0], device=W.device) // (W.shape[0] // len(weights))
    found, step = [], max(1, values // W.shape[1])
    for start in range(0, W.shape[0], step):
        rows = split_groups(W[start : start + step].float(), scheme)
        own = weights if len(weights) == 1 else weights[part_of[start : start + step]]
        found.append(_search_rows(rows, own, scheme, zero_min))
    scales, zeros = (torch.cat(part) for part in zip(*found, strict=True))
    return scales, zeros


def _search_native(
    library: NativeLibrary, W: Tensor, importance: Tensor, scheme: QuantScheme, zero_min: int
) -> tuple[Tensor, Tensor]:
    """The same with the library trying the candidates; W float32 on the CPU."""
    width = scheme.group_width(W.shape[1])
    parts = []
    for rows in W.split(max(1, NATIVE_SEARCH_VALUES // W.shape[1])):
        tried = list(_candidates(split_groups(rows, scheme), scheme, zero_min))
        scales = torch.stack([round_scales(scale) for scale, _ in tried])
        zeros = torch.stack([zero for _, zero in tried])
        parts.append(
            search_grid_cpu(library, rows, importance, width, scales, zeros, scheme.max_code, SCALE_REFITS)
        )
    best_scales, best_zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    return best_scales, best_zeros


def _search_rows(W: Tensor, weights: Tensor, scheme: QuantScheme, zero_min: int) -> tuple[Tensor, Tensor]:
    """Rounded scales and zeros (rows, groups) of least weighted error; W (rows, groups, width), weights
    (1 or rows, groups, width)."""
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for scales, zeros in _candidates(W, scheme, zero_min):
        best = _better(best, W, weights, round_scales(scales), zeros, scheme.max_code)
    assert best is not None
    # For given codes the best scale is a ratio of two sums; its codes may differ, so this is repeated.
    for _ in range(SCALE_REFITS):
        _, scales, zeros = best
        steps = (W / scales.unsqueeze(2)).round_().add_(zeros.unsqueeze(2)).clamp_(0, scheme.max_code)
        steps.sub_(zeros.unsqueeze(2))
        weighted = steps * weights
        norm = weighted.mul(steps).sum(dim=2)
        fitted = torch.where(norm > 0, weighted.mul_(W).sum(dim=2) / norm, scales)
        best = _better(best, W, weights, round_scales(fitted), zeros, scheme.max_code)
    return best[1], best[2]


def _candidates(W: Tensor, scheme: QuantScheme, zero_min: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Unrounded scales and zeros int32 (rows, groups) to try for W (rows, groups, width).

    Symmetric codes reach one step further down than up, so a scale's sign decides which side of zero gets the
    extra level: mostly the side of the largest weight, now and then the other.
    """
    below, above = W.amin(dim=2).clamp_max_(0).neg_(), W.amax(dim=2).clamp_min_(0)
    if scheme.sym:
        largest = torch.maximum(below, above) / scheme.mid_code
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        signed = torch.where(above > below, -largest, largest)
        zeros = torch.full_like(signed, scheme.mid_code, dtype=torch.int32)
        for ratio in CLIP_RATIOS:
            yield signed * ratio, zeros
        for ratio in OTHER_SIDE_RATIOS:
            yield signed * -ratio, zeros
        return
    scales, middle = minmax_grid(-below, above, scheme, zero_min)
    for shift in (0, -1, 1):
        zeros = (middle + shift).clamp_(zero_min, scheme.max_code)
        if shift:
            reach = torch.maximum(below / zeros, above / (scheme.max_code - zeros).clamp_min(1))
            scales = torch.where(reach > 0, reach, torch.ones_like(reach))
        for ratio in CLIP_RATIOS:
            yield scales * ratio, zeros


def _better(
    best: tuple[Tensor, Tensor, Tensor] | None,
    W: Tensor,
    weights: Tensor,
    scales: Tensor,
    zeros: Tensor,
    max_code: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, scales and zeros, each group's from whichever of ``best`` and the candidate has the lower loss."""
    scale, zero = scales.unsqueeze(2), zeros.unsqueeze(2)
    error = (W / scale).round_().add_(zero).clamp_(0, max_code).sub_(zero).mul_(scale).sub_(W)
    loss = error.square_().mul_(weights).sum(dim=2)
    if best is None:
        return loss, scales, zeros
    wins = loss < best[0]
    return (
        torch.where(wins, loss, best[0]),
        torch.where(wins, scales, best[1]),
        torch.where(wins, zeros, best[2]),
    )


def quantize_to_grid(W: Tensor, grid: Grid, g_idx: Tensor, scheme: QuantScheme) -> Tensor:
    """Nearest codes on a grid: ``clamp(round(w / scale) + zero, 0, 2^bits - 1)``.

    W (out, in) float32, g_idx int (in,). Returns uint8 (out, in).
    """
    group = g_idx.long()
    scales, zeros = grid.scales[group].t(), grid.zeros[group].t()
    codes = (torch.round(W.float() / scales) + zeros).clamp_(0, scheme.max_code)
    return codes.to(torch.uint8)


def dequantize_codes(codes: Tensor, grid: Grid, g_idx: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``scales[g_idx] * (codes - zeros[g_idx])``, in float32 and rounded once: (out, in) from uint8 (out, in)."""
    (out_features, in_features), groups = codes.shape, len(grid.scales)
    weight = torch.empty(out_features, in_features, dtype=dtype, device=codes.device)
    # Not asked on a GPU, which would have to wait for the answer.
    even, group = not g_idx.is_cuda and are_neighbours(g_idx, groups), g_idx.long()
    step = max(1, PANEL_VALUES // max(1, in_features))
    for rows in (slice(start, start + step) for start in range(0, out_features, step)):
        scales, zeros = (field[:, rows].t().float() for field in (grid.scales, grid.zeros))
        panel = codes[rows].float()
        if even:  # every group's numbers stand for its columns as they are
            panel.view(len(panel), groups, -1).sub_(zeros.unsqueeze(2)).mul_(scales.unsqueeze(2))
        else:
            panel.sub_(zeros[:, group]).mul_(scales[:, group])
        weight[rows] = panel
    return weight


def are_neighbours(g_idx: Tensor, groups: int) -> bool:
    """Whether the groups of g_idx (in,) are runs of neighbours, all of one width."""
    width, rest = divmod(len(g_idx), groups)
    return not rest and torch.equal(
        g_idx.cpu().int(), torch.arange(groups, dtype=torch.int32).repeat_interleave(width)
    )
