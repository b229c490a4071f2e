"""Block tuning: rounding and scales of a whole decoder block, trained against the original block's output.

The sweep minimises each layer's own error; what counts is the block's. Starting from the solved codes, every weight's
position between its neighbouring codes and every scale are trained by gradient descent on

``|block_q(x_q) - block(x)|^2``,  ``W_q = scale * (clamp(round(position), 0, 2^bits - 1) - zero)``,

with the straight-through estimator for ``round``: the rounding of AutoRound (arXiv 2309.05516) and the objective of
EfficientQAT's Block-AP (arXiv 2407.11062), where x_q are the inputs that the quantized model really sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightgptq.core.grid import round_scales
from lightgptq.core.types import QuantizedWeight
from lightgptq.errors import QuantizationError

EDGE = 0.45  # furthest that a position starts from its code: half a step away it would flip at once
Batch = tuple[tuple[Any, ...], Mapping[str, Any], Tensor]


@dataclass(frozen=True)
class TuneOptions:
    """How long and how fast.

    steps        gradient steps, one batch each
    rounding_lr  first step size of a position, in codes; it falls linearly to 0, so a position can move by at
                 most about ``steps * rounding_lr / 2``
    scale_lr     first step size of a scale, relative to it
    seed         order of the batches
    """

    steps: int = 200
    rounding_lr: float = 0.005
    scale_lr: float = 0.01
    seed: int = 0


@dataclass
class TuneResult:
    """Tuned weights, and the mean error of the block's output over all batches before and after."""

    weights: dict[str, QuantizedWeight]
    before: float
    after: float


class _Positions(nn.Module):
    """One linear's trainable state: a position (out, in) on the code axis and a log-scale (groups, out)."""

    def __init__(self, q: QuantizedWeight, original: Tensor | None) -> None:
        super().__init__()
        self.group = q.g_idx.long()
        self.max_code = (1 << q.bits) - 1
        self.zeros = q.zeros.float()
        self.start = q.scales.float()
        position = q.codes.float()
        if original is not None:
            step = self.start[self.group].t()
            position = position + ((original.float() - q.dequantize()) / step).clamp_(-EDGE, EDGE)
        self.position = nn.Parameter(position)
        self.ratio = nn.Parameter(torch.ones_like(self.start))

    def forward(self) -> Tensor:
        """The dequantized weight (out, in); gradients pass the rounding unchanged."""
        rounded = self.position.detach().round().clamp_(0, self.max_code)
        codes = self.position + (rounded - self.position.detach())
        scales = self.start * self.ratio
        return (codes - self.zeros[self.group].t()) * scales[self.group].t()

    @torch.no_grad()
    def project(self) -> None:
        """Keeps positions where rounding can still change them, and scales on their side of zero."""
        self.position.clamp_(-0.49, self.max_code + 0.49)
        self.ratio.clamp_(0.1, 10.0)

    @torch.no_grad()
    def result(self, q: QuantizedWeight) -> QuantizedWeight:
        """The integers and float16 scales reached; the layer's own loss is no longer known."""
        codes = self.position.round().clamp_(0, self.max_code).to(torch.uint8)
        scales = round_scales(self.start * self.ratio).half()
        return replace(q, codes=codes, scales=scales, loss=float("nan"))


def tune_block(
    block: nn.Module,
    batches: Sequence[Batch],
    weights: Mapping[str, QuantizedWeight],
    options: TuneOptions = TuneOptions(),
    *,
    originals: Mapping[str, Tensor] | None = None,
    parameter: Callable[[str, Tensor], tuple[str, Tensor]] | None = None,
    objective: Callable[[Tensor, Tensor], Tensor] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> TuneResult:
    """Trains codes and scales of a block's linears so that its output comes nearest the targets.

    block      any module; its parameters are left as they are
    batches    (args, kwargs, target): what the block is called with in the quantized model, and the original
               block's output for the original's inputs; the block's output is a tensor or starts with one
    weights    by the linear's name inside the block
    originals  float (out, in) by the same names: where between two codes a weight starts
    parameter  name and weight (out, in) -> the parameter's name and value in its layout; by default
               ``name.weight`` as it is
    objective  error (a scalar) of an output against its target; by default the mean squared difference. With a
               whole model as block and the divergence of its logits this is end-to-end tuning
    progress   called with step and loss

    The result is never worse than the start on these batches: where training codes and scales together is, scales
    are trained alone, and where that is, the start is returned.
    Raises QuantizationError when there is no batch or the loss is not finite.
    """
    if not batches or not weights:
        raise QuantizationError(
            f"block tuning needs batches and weights, got {len(batches)} and {len(weights)}"
        )
    place = parameter if parameter is not None else _as_weight
    error = objective if objective is not None else _mean_square
    trained = {
        name: _Positions(q, None if originals is None else originals[name]) for name, q in weights.items()
    }

    def output_error(values: Mapping[str, Tensor], batch: Batch) -> Tensor:
        args, kwargs, target = batch
        swapped = dict(place(name, value) for name, value in values.items())
        output = functional_call(block, swapped, args, dict(kwargs))
        output = output[0] if isinstance(output, tuple) else output
        return error(output, target)

    @torch.no_grad()
    def mean_error(candidates: Mapping[str, QuantizedWeight]) -> float:
        values = {name: q.dequantize() for name, q in candidates.items()}
        return sum(float(output_error(values, batch)) for batch in batches) / len(batches)

    before = mean_error(weights)
    _train(trained, batches, options, output_error, progress)
    tuned = {name: trained[name].result(q) for name, q in weights.items()}
    after = mean_error(tuned)
    if after <= before:
        return TuneResult(tuned, before, after)
    if options.rounding_lr > 0:  # too many codes flipped together; scales alone are a smooth problem
        gentle = replace(options, rounding_lr=0.0)
        return tune_block(
            block, batches, weights, gentle, parameter=parameter, objective=objective, progress=progress
        )
    return TuneResult(dict(weights), before, before)


def _train(
    trained: Mapping[str, _Positions],
    batches: Sequence[Batch],
    options: TuneOptions,
    output_error: Callable[[Mapping[str, Tensor], Batch], Tensor],
    progress: Callable[[int, float], None] | None,
) -> None:
    """Adam over positions and scale ratios, both step sizes falling linearly to 0."""
    variables = [variable for one in trained.values() for variable in one.parameters()]
    optimizer = torch.optim.Adam(
        [
            {"params": [one.position for one in trained.values()], "lr": options.rounding_lr},
            {"params": [one.ratio for one in trained.values()], "lr": options.scale_lr},
        ],
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(1, options.steps))
    generator = torch.Generator().manual_seed(options.seed)
    order: list[int] = []
    with torch.enable_grad():
        for step in range(options.steps):
            if not order:
                order = torch.randperm(len(batches), generator=generator).tolist()
            loss = output_error({name: p() for name, p in trained.items()}, batches[order.pop()])
            if not bool(torch.isfinite(loss)):
                raise QuantizationError(
                    f"block tuning reached a loss of {float(loss.detach())} at step {step}; lower its step sizes"
                )
            optimizer.zero_grad()
            loss.backward(inputs=variables)  # and not into the block's own biases and norms
            optimizer.step()
            schedule.step()
            for one in trained.values():
                one.project()
            if progress is not None:
                progress(step, float(loss.detach()))


def _as_weight(name: str, value: Tensor) -> tuple[str, Tensor]:
    return f"{name}.weight", value


def _mean_square(output: Tensor, target: Tensor) -> Tensor:
    return (output.float() - target.float()).square().mean()
