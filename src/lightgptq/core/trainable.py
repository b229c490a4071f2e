"""A quantized weight whose scales, and if wanted its codes, can be trained by gradient descent."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lightgptq.core.grid import are_neighbours, round_scales
from lightgptq.core.types import QuantizedWeight

EDGE = 0.45  # furthest that a position starts from its code: half a step away it would flip at once


class TrainableWeight(nn.Module):
    """One linear's trainable state: a factor (groups, out) on its scales, and a position (out, in) on the code axis.

    The weight is ``scale * factor * (clamp(round(position), 0, 2^bits - 1) - zero)``, with the straight-through
    estimator for ``round`` (arXiv 1308.3432).

    q         where it starts
    original  float (out, in): where between two codes each weight starts, at most `EDGE` from the code
    rounding  whether positions are trained; without them only scales are
    """

    group: Tensor
    zeros: Tensor
    start: Tensor

    def __init__(self, q: QuantizedWeight, original: Tensor | None = None, *, rounding: bool = True) -> None:
        super().__init__()
        self.max_code = (1 << q.bits) - 1
        self.neighbours = are_neighbours(q.g_idx, len(q.scales))
        for name, value in {
            "group": q.g_idx.long(),
            "zeros": q.zeros.float(),
            "start": q.scales.float(),
        }.items():
            self.register_buffer(name, value, persistent=False)  # so that they move with the parameters
        position = q.codes.float()
        if rounding and original is not None:
            step = self.start[self.group].t()
            position = position + ((original.float() - q.dequantize()) / step).clamp_(-EDGE, EDGE)
        self.position = nn.Parameter(position, requires_grad=rounding)
        self.ratio = nn.Parameter(torch.ones_like(self.start))

    def forward(self) -> Tensor:
        """The dequantized weight (out, in); gradients pass the rounding unchanged."""
        codes: Tensor = self.position
        if codes.requires_grad:
            rounded = codes.detach().round().clamp_(0, self.max_code)
            codes = codes + (rounded - codes.detach())
        scales = self.start * self.ratio
        if not self.neighbours:
            return (codes - self.zeros[self.group].t()) * scales[self.group].t()
        grouped = codes.unflatten(1, (len(scales), -1))  # a gather's way back adds up one number at a time
        return ((grouped - self.zeros.t().unsqueeze(2)) * scales.t().unsqueeze(2)).flatten(1)

    @torch.no_grad()
    def project(self) -> None:
        """Keeps positions where rounding can still change them, and scales on their side of zero."""
        if self.position.requires_grad:
            self.position.clamp_(-0.49, self.max_code + 0.49)
        self.ratio.clamp_(0.1, 10.0)

    @torch.no_grad()
    def result(self, q: QuantizedWeight) -> QuantizedWeight:
        """The integers and float16 scales reached; the layer's own loss is no longer known."""
        codes = self.position.round().clamp_(0, self.max_code).to(torch.uint8)
        scales = round_scales(self.start * self.ratio).half()
        return replace(q, codes=codes, scales=scales, loss=float("nan"))
