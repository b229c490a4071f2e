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

from lightgptq.core.trainable import TrainableWeight
from lightgptq.core.types import QuantizedWeight
from lightgptq.errors import QuantizationError

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


def tune_block(
    block: nn.Module,
    batches: Sequence[Batch],
    weights: Mapping[str, QuantizedWeight],
    options: TuneOptions = TuneOptions(),
    *,
    originals: Mapping[str, Tensor] | None = None,
    take: Callable[[Any], Tensor] | None = None,
    objective: Callable[[Tensor, Tensor], Tensor] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> TuneResult:
    """Trains codes and scales of a block's linears so that its output comes nearest the targets.

    block      any module; its parameters are left as they are
    batches    (args, kwargs, target): what the block is called with in the quantized model, and the original
               block's output for the original's inputs
    weights    by the linear's name inside the block
    originals  float (out, in) by the same names: where between two codes a weight starts
    take       the tensor to be compared in what the block returns; by default that itself, or a tuple's first
    objective  error (a scalar) of an output against its target; by default the mean squared difference
    progress   called with step and loss

    The result is never worse than the start on these batches: where training codes and scales together is, scales
    are trained alone, and where that is, the start is returned.
    Raises QuantizationError when there is no batch or the loss is not finite.
    """
    if not batches or not weights:
        raise QuantizationError(
            f"block tuning needs batches and weights, got {len(batches)} and {len(weights)}"
        )
    chosen = take if take is not None else _first
    error = objective if objective is not None else _mean_square
    dtypes = {name: block.get_parameter(f"{name}.weight").dtype for name in weights}
    start = originals or {}
    trained = {
        name: TrainableWeight(q, start.get(name), rounding=options.rounding_lr > 0)
        for name, q in weights.items()
    }

    def output_error(values: Mapping[str, Tensor], batch: Batch) -> Tensor:
        args, kwargs, target = batch
        swapped = {f"{name}.weight": value.to(dtypes[name]) for name, value in values.items()}
        return error(chosen(functional_call(block, swapped, args, dict(kwargs))), target)

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
        return tune_block(block, batches, weights, gentle, take=take, objective=objective, progress=progress)
    return TuneResult(dict(weights), before, before)


def _train(
    trained: Mapping[str, TrainableWeight],
    batches: Sequence[Batch],
    options: TuneOptions,
    output_error: Callable[[Mapping[str, Tensor], Batch], Tensor],
    progress: Callable[[int, float], None] | None,
) -> None:
    """Adam over positions and scale ratios, both step sizes falling linearly to 0."""
    positions = [one.position for one in trained.values() if one.position.requires_grad]
    variables = [*positions, *(one.ratio for one in trained.values())]
    optimizer = torch.optim.Adam(
        [
            {"params": positions, "lr": options.rounding_lr},
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


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _mean_square(output: Tensor, target: Tensor) -> Tensor:
    return (output.float() - target.float()).square().mean()
