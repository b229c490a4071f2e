"""LinearGroup: linears that share one input, discovered by watching one batch go through the block."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightgptq.layouts import ExpertLinears
from lightgptq.quantization.blocks import BlockInput
from lightgptq.quantization.direct_use import uses_of_weights
from lightgptq.quantization.live_bytes import LiveBytes
from lightgptq.quantization.pause import on_input
from lightgptq.quantization.siblings import complete_siblings


@dataclass(frozen=True)
class LinearGroup:
    """Linears that receive the same tensor and so share one Hessian.

    names        inside the block, in the order of their first call
    live_bytes   activations that one batch holds while it waits here (0 when it was not measured)
    """

    names: tuple[str, ...]
    live_bytes: int = 0


@dataclass(frozen=True)
class Probe:
    """What one batch showed on its way through a block.

    groups          in the order in which they are reached
    peak_bytes      the most that the batch held
    entering_bytes  of its hidden states
    read            linears whose weight the block reads itself
    """

    groups: list[LinearGroup]
    peak_bytes: int
    entering_bytes: int
    read: frozenset[str]


def probe_block(
    module: nn.Module,
    linears: dict[str, nn.Linear],
    enter: Callable[[], BlockInput],
    staged: Collection[str] = (),
) -> Probe:
    """Send one batch through a block, as the pass through it will.

    staged  paths (with the dot) of experts that are to be gone through stage by stage
    """
    entering = 0

    def call() -> None:
        nonlocal entering
        entered = enter()
        entering = entered.hidden().nbytes
        module(*entered.args, **entered.kwargs)

    with LiveBytes(module.parameters()) as tracker, ExitStack() as stack:
        for path in staged:
            experts = module.get_submodule(path.removesuffix("."))
            assert isinstance(experts, ExpertLinears)
            stack.enter_context(experts.announcing(lambda inputs: None))
        read = stack.enter_context(uses_of_weights(linears))
        groups = discover_groups(linears, call, tracker)
    return Probe(groups, tracker.peak, entering, frozenset(read))


def discover_groups(
    linears: dict[str, nn.Linear], call: Callable[[], Any], tracker: LiveBytes | None = None
) -> list[LinearGroup]:
    """Run ``call`` once and see which linears receive the same tensor, in the order in which they are reached.

    Two inputs are the same when they are the same rows of the same memory in the same version: a transposed view, or a
    tensor that was changed in place in between, is another input. Linears that the call never reaches are grouped like
    those of a numbered sibling that it reached (expert 5 like expert 3); without one they come last, each in a group of
    its own.

    tracker  counts what lives meanwhile; by default all but the linears' own parameters
    """
    if tracker is None:
        with LiveBytes(p for module in linears.values() for p in module.parameters()) as tracker:
            return discover_groups(linears, call, tracker)
    keys: dict[tuple[Any, ...], list[str]] = {}
    live: dict[tuple[Any, ...], int] = {}
    seen: set[str] = set()

    def action(name: str, x: Tensor) -> None:
        if name in seen:
            return
        seen.add(name)
        strides = None if x.is_contiguous() else (x.shape, x.stride())
        key = (
            tracker.number(x),
            x.storage_offset(),
            x.numel(),
            x.shape[-1],
            strides,
            x._version,
        )
        if key not in keys:
            live[key] = tracker.live
        keys.setdefault(key, []).append(name)

    with torch.no_grad(), on_input(linears, action):
        call()
    reached = [tuple(names) for names in keys.values()]
    bytes_at = list(live.values())
    completed = complete_siblings(reached, [name for name in linears if name not in seen])
    groups = [LinearGroup(names, bytes_at[like]) for names, like in completed]
    grouped = {name for group in groups for name in group.names}
    groups += [LinearGroup((name,)) for name in linears if name not in grouped]
    return groups
